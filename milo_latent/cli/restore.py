"""`milo-latent restore`."""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any

from milo_latent.cli.loading import hide_loading_bar

PIPELINE_OPTIONS = {  # of the command: of the pipeline's call
    "prompt": "prompt",
    "negative_prompt": "negative_prompt",
    "cfg_scale": "guidance_scale",
    "control_scale": "controlnet_conditioning_scale",
    "start_point": "start_point",
    "noise_aug": "noise_aug",
    "color_fix": "color_fix",
}


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command to the parser."""
    command = commands.add_parser(
        "restore",
        help="restore a degraded photo, or a folder of them",
        description="Restore a degraded photo, or a folder of them. Without --model nothing is downloaded: the "
        "embedded models are used. Of a folder, photos whose results are there already are left alone.",
    )
    command.set_defaults(run=run)
    command.add_argument("input", type=Path, metavar="IN", help="the photo, or a folder of photos")
    command.add_argument(
        "-o", "--output", type=Path, metavar="OUT", help="the result (default: IN_restored.png, or folder IN_restored)"
    )
    command.add_argument(
        "--task",
        choices=["denoise", "sr", "face", "unaligned_face"],
        help="default: the model's, or denoise; sr enlarges four times; face: an aligned face; unaligned_face: faces "
        "in a photo, with --detector",
    )
    command.add_argument("--model", default="nano", help="shipped weights, a folder, or a hub id (default: nano)")
    command.add_argument("--metric", help="MILO_L instead of the model's own: a name, a folder, or an official .pth")
    command.add_argument(
        "--guidance", type=float, metavar="S", help="strength of MILO guidance, 0 (off) to 1 (default: the task's)"
    )
    command.add_argument(
        "--curriculum", choices=["constant", "linear", "cosine"], help="schedule of the guidance (default: the task's)"
    )
    command.add_argument("--steps", type=int, help="denoising steps (default: the model's or the task's)")
    command.add_argument("--upscale", type=float, metavar="N", help="how much larger (default: the task's)")
    command.add_argument("--seed", type=int, default=0, help="the same seed gives the same file (default: 0)")
    command.add_argument(
        "--tile", type=int, metavar="N", help="restore in tiles of N pixels, 512 say: large images at little memory"
    )
    command.add_argument("--detector", type=Path, metavar="FILE", help="YuNet's .onnx file, for unaligned_face")
    command.add_argument("--device", help="cpu, cuda or mps (default: the best there is)")
    command.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help="of the networks")
    diffusion = command.add_argument_group("diffusion", "for models with prompts (default: the model's own values)")
    diffusion.add_argument("--prompt", metavar="TEXT", help="what the photo shows")
    diffusion.add_argument("--negative-prompt", metavar="TEXT", help="what the result should not be")
    diffusion.add_argument("--cfg-scale", type=float, metavar="S", help="scale of classifier-free guidance, 1 = off")
    diffusion.add_argument("--control-scale", type=float, metavar="S", help="how strictly to follow the cleaned photo")
    diffusion.add_argument("--start-point", choices=["noise", "cond"], help="pure noise, or the noised cleaned photo")
    diffusion.add_argument("--noise-aug", type=int, metavar="T", help="timestep to which the condition is noised")
    diffusion.add_argument("--color-fix", choices=["wavelet", "adain", "none"], help="colours of the cleaned photo")


def run(options: argparse.Namespace) -> str:
    """Restore; return the line to print."""
    import torch

    from milo_latent.restoration.files import check_image_output, restore_file, restore_folder
    from milo_latent.restoration.restore import TASKS, check_restoration, restore_image
    from milo_latent.restoration.restorer import load_restorer

    folder = options.input.is_dir()
    output = options.output or _beside(options.input, folder=folder)
    if not folder:
        if not options.input.is_file():
            raise FileNotFoundError(f"Expected a photo or a folder of photos, got {options.input}, which is not there.")
        check_image_output(output)
    hide_loading_bar()
    dtype = getattr(torch, options.dtype) if options.dtype else None
    restorer = load_restorer(options.model, device=options.device, dtype=dtype, metric=options.metric)
    task: Any = options.task or (restorer.release.task if restorer.release is not None else "denoise")
    restore = partial(
        restore_image,
        model=restorer,
        task=task,
        milo_scale=options.guidance,
        schedule=options.curriculum,
        steps=options.steps,
        seed=options.seed,
        tile=options.tile,
        upscale=options.upscale,
        detector=_detector(options.detector),
        **_pipeline_options(options),
    )
    began = time.perf_counter()
    if folder:
        check_restoration(**restore.keywords)
        count, skipped = restore_folder(options.input, output, restore)
        line = f"{count} photos of {options.input} -> {output} ({skipped} were there already"
    else:
        line = "{} -> {} ({} to {}".format(options.input, output, *restore_file(options.input, output, restore))
    scale = TASKS[task].milo_scale if options.guidance is None else options.guidance
    guided = f"MILO guidance {scale:g} {options.curriculum or TASKS[task].schedule}"
    if restorer.metric is None or scale == 0:
        guided = "no guidance"
    steps = "" if options.steps is None else f"{options.steps} steps, "
    seconds = time.perf_counter() - began
    return f"{task}: {line}, {options.model}, {steps}{guided}, seed {options.seed}) in {seconds:.1f} s"


def _beside(path: Path, *, folder: bool) -> Path:
    """Return where the result of `path` goes if nothing is said: a folder, whose name may hold dots, or a PNG."""
    if not folder:
        return path.with_name(f"{path.stem}_restored.png")
    named = path.resolve() if path.name in ("", "..") else path  # such as "."
    return named.with_name(f"{named.name}_restored")


def _detector(path: Path | None) -> Any:
    if path is None:
        return None
    from milo_latent.restoration.face_detector import YuNet

    return YuNet(path)


def _pipeline_options(options: argparse.Namespace) -> dict[str, Any]:
    given = {theirs: getattr(options, ours) for ours, theirs in PIPELINE_OPTIONS.items()}
    return {name: value for name, value in given.items() if value is not None}
