"""`milo-latent restore`."""

from __future__ import annotations

import argparse
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from milo_latent.cli.common import TASKS, add_restorer_options, open_restorer

if TYPE_CHECKING:
    from torch import Tensor

    from milo_latent.restoration.settings import RestorationSettings

SCHEDULES = ["constant", "linear", "cosine"]


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command to the parser."""
    command = commands.add_parser(
        "restore",
        help="restore a degraded photo, or a folder of them",
        description="Restore a degraded photo, or a folder of them. Without --model nothing is downloaded: the "
        "embedded models are used. Photos of a folder are left alone whose results are there already, made of the same "
        "files, weights and settings.",
    )
    command.set_defaults(run=run)
    command.add_argument("input", type=Path, metavar="IN", help="the photo, or a folder of photos")
    command.add_argument(
        "-o", "--output", type=Path, metavar="OUT", help="the result (default: IN_restored.png, or folder IN_restored)"
    )
    add_restorer_options(command)
    _add_settings(command)
    add_diffusion_settings(command)


def _add_settings(command: argparse.ArgumentParser) -> None:
    """Add the options that are settings: `dest` names the field of `RestorationSettings`, or the option itself does."""
    add = command.add_argument
    add("--task", choices=TASKS, help="default: the model's, or denoise; unaligned_face: the faces in a photo")
    add("--guidance", dest="milo_scale", type=float, help="of MILO, 0 (off) to 1 (default: 0.5 in stage all, else 0)")
    add("--curriculum", dest="schedule", choices=SCHEDULES, help="schedule of the guidance (default: cosine)")
    add("--steps", type=int, help="denoising steps (default: the model's own; else 1, or 4 with guidance)")
    add("--upscale", type=float, help="how much larger (default: 4 for sr, 2 for unaligned_face, else 1)")
    add("--seed", type=int, default=0, help="the same seed gives the same file (default: 0)")
    add("--tile", type=int, help="restore in tiles of this side in pixels, such as 512, which saves memory")
    add("--detector", type=Path, metavar="FILE", help="YuNet's .onnx file, for unaligned_face")


def add_diffusion_settings(command: argparse.ArgumentParser) -> None:
    """Add the settings that `DiffBIRPipeline` takes."""
    add = command.add_argument
    add("--stage", choices=["cleaner", "join", "all"], help="the last stage (default: the model's; all with guidance)")
    add("--fidelity", type=float, help="share of the join, 0 (none) to 1 (default: 1 where the model has a join)")
    add = command.add_argument_group("diffusion", "for models with prompts (default: the model's own)").add_argument
    add("--prompt", help="what the photo shows")
    add("--negative-prompt", help="what the result should not be")
    add("--cfg-scale", dest="guidance_scale", type=float, help="scale of classifier-free guidance; 1 switches it off")
    add("--control-scale", dest="controlnet_conditioning_scale", type=float, help="weight of the cleaned photo")
    add("--start-point", choices=["noise", "cond"], help="pure noise, or the noised cleaned photo")
    add("--noise-aug", type=int, help="timestep to which the condition is noised")
    add("--color-fix", choices=["wavelet", "adain", "none"], help="how to take the colors of the cleaned photo")


def run(options: argparse.Namespace) -> str:
    """Restore; return the line to print."""
    from milo_latent.checks import check_apart
    from milo_latent.files import IMAGE_SUFFIXES, check_output
    from milo_latent.restoration.files import restore_file, restore_folder
    from milo_latent.restoration.hints import task_hint
    from milo_latent.restoration.restore import restore
    from milo_latent.restoration.restorer import pipeline_digest

    folder = options.input.is_dir()
    output = options.output or _beside(options.input, folder=folder)
    if not folder:
        if not options.input.is_file():
            raise FileNotFoundError(f"Expected a photo or a folder, got {options.input}, which does not exist.")
        check_output(output, IMAGE_SUFFIXES)
        check_apart(output, options.input)
    pipe = open_restorer(options)
    settings = given_settings(options).resolve(pipe)
    hints: Counter[str] = Counter()

    def restore_photo(image: Tensor) -> Tensor:
        hints.update(task_hint(image, settings))
        return restore(image, pipe, settings)

    began = time.perf_counter()
    if folder:
        made = {"weights": pipeline_digest(pipe), **settings.as_text()}
        restored, skipped = restore_folder(options.input, output, restore_photo, made=made)
        line = f"{restored} photos of {options.input} -> {output} ({skipped} were there already"
    else:
        before, after = restore_file(options.input, output, restore_photo)
        line = f"{options.input} -> {output} ({before} to {after}"
    seconds = time.perf_counter() - began
    lines = [f"{settings.task}: {line}, {options.model}, {_how(settings)}) in {seconds:.1f} s"]
    return "\n".join(lines + [f"{count} photos: {hint}" if folder else hint for hint, count in hints.items()])


def _how(settings: RestorationSettings) -> str:
    """Describe how photos were restored, by resolved settings."""
    joined = f", fidelity {settings.fidelity:g}" if settings.fidelity else ""
    if settings.stage != "all":
        return f"stage {settings.stage}{joined}"
    guided = f"MILO guidance {settings.milo_scale:g} {settings.schedule}" if settings.milo_scale else "no guidance"
    return f"{settings.steps} steps, {guided}{joined}, seed {settings.seed}"


def given_settings(options: argparse.Namespace) -> RestorationSettings:
    """Return the settings among the command's options."""
    from milo_latent.restoration.face_detector import YuNet
    from milo_latent.restoration.settings import RestorationSettings

    names = RestorationSettings.__dataclass_fields__.keys() & vars(options).keys()
    given = {name: getattr(options, name) for name in names}
    if options.detector is not None:
        given["detector"] = YuNet(options.detector)
    return RestorationSettings(**given)


def _beside(path: Path, *, folder: bool) -> Path:
    """Return where the result of `path` goes if nothing is said: a folder, whose name may hold dots, or a PNG."""
    if not folder:
        return path.with_name(f"{path.stem}_restored.png")
    named = path.resolve() if path.name in ("", "..") else path  # such as "."
    return named.with_name(f"{named.name}_restored")
