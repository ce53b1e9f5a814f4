"""`milo-latent restore`."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from milo_latent.cli.loading import hide_loading_bar


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command to the parser."""
    command = commands.add_parser(
        "restore",
        help="restore a degraded photo",
        description="Restore a degraded photo. Without --model nothing is downloaded: the embedded models are used.",
    )
    command.set_defaults(run=run)
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
    command.add_argument(
        "--tile", type=int, metavar="N", help="restore in tiles of N pixels, 512 say: large images at little memory"
    )
    command.add_argument("--seed", type=int, default=0, help="the same seed gives the same file (default: 0)")
    command.add_argument("--device", help="cpu, cuda or mps (default: the best there is)")


def run(options: argparse.Namespace) -> str:
    """Restore a photo; return the line to print."""
    from milo_latent.files import ALPHA_SUFFIXES, IMAGE_SUFFIXES, read_alpha, read_image, write_image
    from milo_latent.restore import TASKS, load_restorer, restore_image

    image, alpha = read_image(options.input), read_alpha(options.input)
    output = options.output or options.input.with_name(f"{options.input.stem}_restored.png")
    if output.suffix.lower() not in IMAGE_SUFFIXES:
        raise ValueError(f"Expected an image suffix, one of {sorted(IMAGE_SUFFIXES)}, got {output.name!r}.")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"Expected a folder to write into, got {output.parent}, which does not exist.")
    hide_loading_bar()
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
        tile=options.tile,
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


def _resize_alpha(alpha: Any, size: Any) -> Any:
    from torch.nn.functional import interpolate

    return interpolate(alpha, size=size, mode="bilinear", align_corners=False)
