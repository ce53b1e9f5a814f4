"""The command `milo-latent`: parses, calls, prints; computes nothing."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

DESCRIPTION = """\
Restore photos, steered by MILO in the latent space of a diffusion model, and measure what a person would see.

  milo-latent restore photo.jpg                 a restored photo_restored.png beside it
  milo-latent score --ref a.npy --dist b.npy    how visible the difference of two latents is
  milo-latent encode photo.jpg -o photo.npy     the latents of a photo
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="milo-latent", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="store_true", help="print the version and stop")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")
    _add_restore(commands)
    _add_score(commands)
    _add_encode(commands)
    return parser


def _add_restore(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "restore",
        help="restore a degraded photo",
        description="Restore a degraded photo. Without --model nothing is downloaded: the embedded models are used.",
    )
    command.set_defaults(run=run_restore)
    command.add_argument("input", type=Path, metavar="IN", help="the photo")
    command.add_argument("-o", "--output", type=Path, metavar="OUT", help="the result (default: IN_restored.png)")
    command.add_argument(
        "--task", choices=["denoise", "sr"], default="denoise", help="default: denoise; sr enlarges four times"
    )
    command.add_argument("--model", default="nano", help="shipped weights, a folder, or a hub id (default: nano)")
    command.add_argument(
        "--guidance", type=float, metavar="S", help="strength of MILO guidance, 0 (off) to 1 (default: the task's)"
    )
    command.add_argument(
        "--curriculum", choices=["constant", "linear", "cosine"], help="schedule of the guidance (default: the task's)"
    )
    command.add_argument("--steps", type=int, help="denoising steps (default: the task's)")
    command.add_argument("--seed", type=int, default=0, help="the same seed gives the same file (default: 0)")
    command.add_argument("--device", help="cpu, cuda or mps (default: the best there is)")


def _add_score(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "score",
        help="score the visible difference of two images or two latents",
        description="Print MILO's raw error (unbounded) and quality score (towards 1 = worst); 0 = identical.",
    )
    command.set_defaults(run=run_score)
    command.add_argument("--ref", type=Path, required=True, help="reference image, or latents (.npy, .safetensors)")
    command.add_argument("--dist", type=Path, required=True, help="distorted image or latents")
    command.add_argument(
        "--weights", metavar="NAME|FOLDER|FILE", help="shipped weights, a folder, or an official .pth (latents: nano)"
    )


def _add_encode(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "encode", help="encode a photo into latents", description="Encode a photo into latents."
    )
    command.set_defaults(run=run_encode)
    command.add_argument("input", type=Path, metavar="IN", help="the photo")
    command.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help=".npy or .safetensors")
    command.add_argument("--model", default="nano", help="as of restore (default: nano)")


def run_restore(options: argparse.Namespace) -> str:
    """Restore a photo; return the line to print."""
    from milo_latent.files import ALPHA_SUFFIXES, IMAGE_SUFFIXES, read_alpha, read_image, write_image
    from milo_latent.restore import TASKS, load_restorer, restore_image

    image, alpha = read_image(options.input), read_alpha(options.input)
    output = options.output or options.input.with_name(f"{options.input.stem}_restored.png")
    if output.suffix.lower() not in IMAGE_SUFFIXES:
        raise ValueError(f"Expected an image suffix, one of {sorted(IMAGE_SUFFIXES)}, got {output.name!r}.")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"Expected a folder to write into, got {output.parent}, which does not exist.")
    _hide_loading_bar()
    restorer = load_restorer(options.model, device=options.device)
    task = TASKS[options.task]
    guidance = task.milo_scale if options.guidance is None else options.guidance
    curriculum, steps = options.curriculum or task.schedule, task.steps if options.steps is None else options.steps
    began = time.perf_counter()
    restored = restore_image(
        image,
        model=restorer,
        task=options.task,
        milo_scale=guidance,
        schedule=curriculum,
        steps=steps,
        seed=options.seed,
    )
    seconds = time.perf_counter() - began
    if alpha is not None and output.suffix.lower() in ALPHA_SUFFIXES:
        alpha = _resize_alpha(alpha, restored.shape[2:])
    write_image(output, restored, alpha=alpha if output.suffix.lower() in ALPHA_SUFFIXES else None)
    sizes = "{}x{} to {}x{}".format(*image.shape[:1:-1], *restored.shape[:1:-1])
    guided = f"MILO guidance {guidance:g} {curriculum}" if guidance else "no guidance"
    return (
        f"{options.task}: {options.input} -> {output} ({sizes}, {options.model}, {steps} steps, {guided}, "
        f"seed {options.seed}) in {seconds:.1f} s"
    )


def _hide_loading_bar() -> None:
    """Leave the bar of the denoising steps as the only one."""
    from diffusers.utils import logging

    logging.disable_progress_bar()


def _resize_alpha(alpha: Any, size: Any) -> Any:
    from torch.nn.functional import interpolate

    return interpolate(alpha, size=size, mode="bilinear", align_corners=False)


def run_score(options: argparse.Namespace) -> str:
    """Score two files; return the line to print."""
    import torch

    from milo_latent.files import LATENT_SUFFIXES, read_image, read_latents
    from milo_latent.metric.network import MILO

    latent = [path.suffix.lower() in LATENT_SUFFIXES for path in (options.ref, options.dist)]
    if latent[0] != latent[1]:
        raise ValueError(f"Expected two images or two latent files, got {options.ref.name} and {options.dist.name}.")
    if options.weights is None and not latent[0]:
        raise ValueError("Scoring images needs MILO_I weights: pass --weights with the official MILO.pth.")
    read = read_latents if latent[0] else read_image
    weights = options.weights or "nano"
    metric = MILO.from_pretrained(weights)
    with torch.inference_mode():
        result = metric.compare(ref=read(options.ref), dist=read(options.dist))
    name = "MILO_L" if latent[0] else "MILO_I"
    return (
        f"{name} ({weights}): raw error {result.score.mean().item():.10f}, quality {result.quality.mean().item():.10f} "
        "(0 = identical)"
    )


def run_encode(options: argparse.Namespace) -> str:
    """Encode a photo; return the line to print."""
    import torch

    from milo_latent.codec import encode_image
    from milo_latent.files import read_image, write_latents
    from milo_latent.restore import load_restorer

    image = read_image(options.input)
    _hide_loading_bar()
    vae = load_restorer(options.model).pipeline.vae
    with torch.inference_mode():
        latents = encode_image(vae, image)
    metadata = {
        "vae": str(options.model),
        "scaling_factor": str(vae.config.scaling_factor),
        "source_size": f"{image.shape[3]}x{image.shape[2]}",
    }
    write_latents(options.output, latents, metadata=metadata)
    return f"encode: {options.input} -> {options.output} {tuple(latents.shape[1:])}"


def main(arguments: list[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: without the program's name; None reads those of the process.

    Returns:
        Exit code: 0, or 1 after one line on standard error that says what was wrong; wrong arguments exit with 2.
    """
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.version:
        from milo_latent import __version__

        print(f"milo-latent {__version__}")
        return 0
    if options.command is None:
        parser.print_help()
        return 2
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        print(options.run(options))
    except (ValueError, TypeError, OSError, MemoryError) as error:
        print(f"milo-latent: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("milo-latent: interrupted, nothing written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
