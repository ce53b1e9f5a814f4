"""One call from a degraded photo to a restored one, and the table of tasks."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from milo_latent.checks import check_batch, check_choice, check_finite
from milo_latent.diffbir.inputs import check_call
from milo_latent.diffbir.sampling import check_scheduler
from milo_latent.diffbir.versions import UPSCALE, TaskName
from milo_latent.guidance.base import split_guides
from milo_latent.guidance.curriculum import Schedule
from milo_latent.guidance.milo import MILOGuidance
from milo_latent.pipelines.diffbir import DiffBIRPipeline
from milo_latent.restoration.faces import Detector, restore_faces
from milo_latent.restoration.restorer import load_restorer


@dataclass(frozen=True)
class Task:
    """Defaults of a task.

    Args:
        upscale: how much larger the result is than the photo.
        steps: denoising steps, of models that are no official DiffBIR, which has numbers of its own.
        milo_scale: strength of MILO guidance.
        schedule: its curriculum.
    """

    upscale: float = 1.0
    steps: int = 4
    milo_scale: float = 0.5
    schedule: Schedule = "cosine"


TASKS: dict[TaskName, Task] = {name: Task(upscale=factor) for name, factor in UPSCALE.items()}
RESERVED = {"generator", "output_type", "return_dict", "callback_on_step_end"}  # of the pipeline's call, set below
PROMPTS = ("prompt", "negative_prompt", "prompt_embeds", "negative_prompt_embeds")  # likewise
assert set(TASKS) == set(get_args(TaskName))


def restore_image(
    image: Tensor,
    *,
    model: str | Path | DiffBIRPipeline = "nano",
    task: TaskName | None = None,
    milo_scale: float | None = None,
    schedule: Schedule | None = None,
    steps: int | None = None,
    seed: int | Sequence[int] = 0,
    tile: int | None = None,
    upscale: float | None = None,
    detector: Detector | None = None,
    **options: Any,
) -> Tensor:
    """Restore an image, or several of one size.

    Args:
        image: degraded image, (B, 3, H, W), in [0, 1], any size.
        model: a pipeline from `load_restorer`, or what that takes.
        task: "denoise" keeps the size, "sr" enlarges, "face" takes an aligned face, as in FFHQ, "unaligned_face" a
            photo with faces in it; None takes the one that the model was converted for, or "denoise".
        milo_scale: strength of MILO guidance, in [0, 1]; 0 switches it off; None takes the task's.
        schedule: curriculum of the guidance, "constant", "linear" or "cosine"; None takes the task's.
        steps: denoising steps; None takes the model's or the task's.
        seed: the same seed gives the same result; each image of a batch is restored as it would be alone. Several, one
            for each image, are possible.
        tile: side in pixels of the tiles that larger images are restored in, at least 320; None restores them whole,
            or as the pipeline's `enable_tiling` says.
        upscale: how much larger the result is; None takes the task's: 4 for "sr", 2 for "unaligned_face", else 1.
        detector: finds the faces of "unaligned_face", such as `milo_latent.restoration.face_detector.YuNet(path)`.
        **options: of `DiffBIRPipeline`'s call, such as `prompt`, `guidance_scale`, `start_point`, `noise_aug`.

    Returns:
        Restored image, (B, 3, H * upscale, W * upscale) float32, in [0, 1], on the CPU.

    Raises:
        TypeError: if `image` is not floating point.
        ValueError: for a wrong shape, NaN, a task that is unknown or not the model's, guidance where the model has no
            metric, faces without a detector, or a photo without faces.
        MemoryError: if the image is too large for the device.
    """
    check_batch("image", image, 3)
    check_finite("image", image)
    restorer = model if isinstance(model, DiffBIRPipeline) else load_restorer(model)
    task = _task(restorer, task)
    defaults, seeds = TASKS[task], _seeds(seed, image.shape[0])
    guide = _guide(restorer, defaults, milo_scale, schedule)
    factor = defaults.upscale if upscale is None else upscale
    taken = sorted(RESERVED & options.keys())
    if taken:
        raise ValueError(f"Expected none of {taken} in `options`: restore_image sets them; call `model` itself.")
    arguments = _call_arguments(restorer, defaults, steps) | options
    run = partial(_run, guide=guide, tile=tile, arguments=arguments)
    if task != "unaligned_face":
        return run(restorer, image, seeds=seeds, upscale=factor)
    detector = _detector(detector)
    photos = [
        restore_faces(
            photo,
            detector=detector,
            restore_face=partial(run, restorer, seeds=[each], upscale=1.0),
            restore_background=partial(run, restorer.for_background(), seeds=[each], upscale=factor),
            upscale=factor,
        )
        for photo, each in zip(image.split(1), seeds, strict=True)
    ]
    return torch.cat(photos)


@torch.no_grad()
def check_restoration(
    *,
    model: DiffBIRPipeline,
    task: TaskName | None = None,
    milo_scale: float | None = None,
    schedule: Schedule | None = None,
    steps: int | None = None,
    tile: int | None = None,
    upscale: float | None = None,
    detector: Detector | None = None,
    **options: Any,
) -> None:
    """Refuse what no image could be restored with, before the first of many is read; prompts are encoded, and kept.

    Args:
        model: a pipeline.
        task: as of `restore_image`, as are the others.
        milo_scale: see there.
        schedule: see there.
        steps: see there.
        tile: see there.
        upscale: see there.
        detector: see there.
        **options: see there.

    Raises:
        ValueError: as of `restore_image`.
    """
    task, pipeline = _task(model, task), model
    if task == "unaligned_face":
        _detector(detector)
    guide = _guide(model, TASKS[task], milo_scale, schedule)
    with pipeline.tiling(tile):
        pass
    arguments = {name: each.default for name, each in inspect.signature(pipeline.__call__).parameters.items()}
    arguments |= _call_arguments(model, TASKS[task], steps) | options
    arguments |= {"upscale": TASKS[task].upscale if upscale is None else upscale}
    checked = {name: arguments[name] for name in inspect.signature(check_call).parameters if name in arguments}
    check_call(**checked, total_timesteps=pipeline.scheduler.config.num_train_timesteps)
    check_scheduler(pipeline.scheduler, arguments["num_inference_steps"])
    split_guides(guide, pipeline)
    pipeline.check_inputs(arguments["guidance_scale"], ["latents"])
    prompts = {name: arguments[name] for name in PROMPTS}
    pipeline.encode_prompt(**prompts, guided=arguments["guidance_scale"] > 1)


def _detector(detector: Detector | None) -> Detector:
    if detector is None:
        raise ValueError(
            "Expected a `detector` of faces, got None. Pass YuNet(path) of `milo_latent.restoration.face_detector`, "
            "or --detector FILE."
        )
    return detector


def _task(restorer: DiffBIRPipeline, task: TaskName | None) -> TaskName:
    """Return the task: the given one, which must be one of the model's, or the model's own."""
    task = task or (restorer.release.task if restorer.release is not None else "denoise")
    check_choice("task", task, TASKS)
    if restorer.release is not None:
        restorer.release.check_task(task)
    return task


def _seeds(seed: int | Sequence[int], count: int) -> list[int]:
    seeds = [int(seed)] * count if isinstance(seed, int | np.integer) else [int(each) for each in seed]
    if len(seeds) != count:
        raise ValueError(f"Expected one seed, or {count}, one for each image, got {len(seeds)}.")
    return seeds


def _guide(
    restorer: DiffBIRPipeline, defaults: Task, milo_scale: float | None, schedule: Schedule | None
) -> MILOGuidance | None:
    if restorer.metric is None:
        if milo_scale:
            raise ValueError(
                "Expected a model with a `metric` for MILO guidance, got one without. Pass milo_scale=0, or a "
                "metric to load_restorer."
            )
        return None
    scale = defaults.milo_scale if milo_scale is None else milo_scale
    guide = MILOGuidance(restorer.metric, milo_scale=scale, schedule=schedule or defaults.schedule)
    return guide if scale else None  # switched off it asks nothing of the scheduler


def _call_arguments(restorer: DiffBIRPipeline, defaults: Task, steps: int | None) -> dict[str, Any]:
    """Return what the pipeline is given besides the image: an official DiffBIR's own settings, or the steps alone."""
    release = restorer.release
    chosen = {"num_inference_steps": defaults.steps} if release is None else release.call_arguments
    return chosen if steps is None else chosen | {"num_inference_steps": steps}


def _run(
    restorer: DiffBIRPipeline,
    image: Tensor,
    *,
    seeds: Sequence[int],
    upscale: float,
    guide: MILOGuidance | None,
    tile: int | None,
    arguments: dict[str, Any],
) -> Tensor:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    try:
        with restorer.tiling(tile):
            result = restorer(
                image=image,
                upscale=upscale,
                generator=generators,
                output_type="pt",
                callback_on_step_end=guide,
                **arguments,
            )
    except MemoryError as error:
        raise MemoryError(f"{image.shape[3]}x{image.shape[2]} pixels: {error}") from error
    return result.images.float().cpu()
