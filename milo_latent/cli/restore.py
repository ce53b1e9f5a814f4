"""`milo-latent restore`."""

from __future__ import annotations

import argparse
import glob
import os
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from milo_latent.cli.common import (
    TASKS,
    TILE,
    Answer,
    add_command,
    add_file_options,
    add_restorer_options,
    open_restorer,
    piped,
    tell_report,
)

if TYPE_CHECKING:
    from torch import Tensor

    from milo_latent.restoration.settings import RestorationSettings

SCHEDULES = ["constant", "linear", "cosine"]


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command to the parser."""
    command = add_command(
        commands,
        "restore",
        "restore photo.jpg                          # photo_restored.png beside it",
        "restore photos -r -o results --tile 512    # a folder and those in it; the same command resumes",
        "restore - --task sr < small.jpg > large.png",
        help="restore degraded photos",
        description="Restore degraded photos. Without --model nothing is downloaded: the embedded models are used. In "
        "a folder of results, those are left alone that were made of the same files, weights and settings.",
    )
    command.set_defaults(run=run)
    output = "an image, a folder of PNG, or - for standard output (default: IN_restored.png, or folder IN_restored)"
    add_file_options(command, inputs="photos", output=output, required=False)
    add_restorer_options(command)
    _add_settings(command)
    add_diffusion_settings(command)


def _add_settings(command: argparse.ArgumentParser) -> None:
    """Add the options that are settings: `dest` names the field of `RestorationSettings`, or the option itself does."""
    add = command.add_argument
    add("--task", choices=TASKS, help="default: the model's, or denoise; unaligned_face: the faces in a photo")
    add(
        "--guidance",
        dest="milo_scale",
        type=float,
        metavar="STRENGTH",
        help="of MILO, 0 (off) to 1 (default: 0.5 in stage all, else 0)",
    )
    add("--curriculum", dest="schedule", choices=SCHEDULES, help="schedule of the guidance (default: cosine)")
    add("--steps", type=int, metavar="N", help="denoising steps (default: the model's own; else 1, or 4 with guidance)")
    add(
        "--upscale",
        type=float,
        metavar="FACTOR",
        help="how much larger (default: 4 for sr, 2 for unaligned_face, else 1)",
    )
    add("--seed", type=int, default=0, metavar="N", help="the same seed gives the same file (default: 0)")
    add("--tile", type=int, metavar="PIXELS", help=f"restore in tiles of this side, {TILE}, which saves memory")
    add(
        "--batch",
        type=int,
        default=1,
        metavar="N",
        help="photos of one size to restore at once, faster for small ones; changes a few values by one (default: 1)",
    )
    add("--detector", type=Path, metavar="FILE", help="YuNet's .onnx file, for unaligned_face")


def add_diffusion_settings(command: argparse.ArgumentParser) -> None:
    """Add the settings that `DiffBIRPipeline` takes."""
    add = command.add_argument
    add("--stage", choices=["cleaner", "join", "all"], help="the last stage (default: the model's; all with guidance)")
    add(
        "--fidelity",
        type=float,
        metavar="SHARE",
        help="share of the join, 0 (none) to 1 (default: 1 where the model has a join)",
    )
    add = command.add_argument_group("diffusion", "for models with prompts (default: the model's own)").add_argument
    add("--prompt", metavar="TEXT", help="what the photo shows")
    add("--negative-prompt", metavar="TEXT", help="what the result should not be")
    add(
        "--cfg-scale",
        dest="guidance_scale",
        type=float,
        metavar="SCALE",
        help="scale of classifier-free guidance; 1 switches it off",
    )
    add(
        "--control-scale",
        dest="controlnet_conditioning_scale",
        type=float,
        metavar="SCALE",
        help="weight of the cleaned photo",
    )
    add("--start-point", choices=["noise", "cond"], help="pure noise, or the noised cleaned photo")
    add("--noise-aug", type=int, metavar="TIMESTEP", help="timestep to which the condition is noised")
    add("--color-fix", choices=["wavelet", "adain", "none"], help="how to take the colors of the cleaned photo")


def run(options: argparse.Namespace) -> Answer:
    """Restore."""
    return piped(_restore, ".png")(options)


def _restore(options: argparse.Namespace) -> Answer:
    from milo_latent.files import IMAGE_SUFFIXES
    from milo_latent.jobs import find_jobs
    from milo_latent.restoration.files import describe_result, restore_files
    from milo_latent.restoration.hints import task_hint
    from milo_latent.restoration.restore import restore
    from milo_latent.restoration.restorer import pipeline_digest

    options.output = options.output or _beside(options.inputs)
    jobs = find_jobs(
        options.inputs, options.output, suffixes=IMAGE_SUFFIXES, suffix=".png", recursive=options.recursive,
        existing=options.existing,
    )  # fmt: skip
    if not jobs.results:
        return tell_report(jobs.idle, jobs, options, head="restore", unit="photos", told=str)
    pipe = open_restorer(options)
    pipe.set_progress_bar_config(disable=options.quiet or jobs.folder is not None, leave=False)
    settings = given_settings(options).resolve(pipe)
    hints: Counter[str] = Counter()

    def restore_photo(image: Tensor) -> Tensor:
        for each in image.split(1):
            hints.update(task_hint(each, settings))
        return restore(image, pipe, settings)

    weights = pipeline_digest(pipe)
    text = describe_result(str(options.model), weights, settings)
    made = {"weights": weights, **settings.as_text()}
    began = time.perf_counter()
    together = 1 if settings.task == "unaligned_face" else options.batch  # photos differ in their number of faces
    report = restore_files(
        jobs, restore_photo, made=made, text=text, batch=together, upscale=settings.upscale or 1.0,
        progress=not options.quiet,
    )  # fmt: skip
    how, tail = f", {options.model}, {_how(settings)}", f" in {time.perf_counter() - began:.1f} s"
    answer = tell_report(
        report, jobs, options, head=str(settings.task), unit="photos", told="{0[0]} to {0[1]}".format, how=how,
        tail=tail, settings={"model": str(options.model), "weights": weights, **settings.as_record()},
    )  # fmt: skip
    hints.update(f"not kept: {what}." for _, (_, _, lost) in report.made.values() for what in lost)
    lines = [f"{count} photos: {hint}" if jobs.folder else hint for hint, count in hints.items()]
    answer.text = "\n".join(filter(None, [answer.text, *lines]))
    return answer


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


def _beside(inputs: list[str]) -> str:
    """Return where the result goes if nothing is said: into a folder, whose name may hold dots, or a PNG."""
    if len(inputs) > 1 or glob.has_magic(inputs[0]) > Path(inputs[0]).exists():
        raise ValueError(f"Expected -o FOLDER for the results of several photos, got {' '.join(inputs[:4])}.")
    path = Path(inputs[0])
    if not path.is_dir():
        return str(path.with_name(f"{path.stem}_restored.png"))
    named = path.resolve() if path.name in ("", "..") else path  # such as "."
    return os.path.join(named.with_name(f"{named.name}_restored"), "")
