"""One call from a degraded photo to a restored one, and the table of tasks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from milo_latent.checks import check_batch, check_choice, check_finite
from milo_latent.guidance.callback import MILOGuidance
from milo_latent.guidance.curriculum import Schedule
from milo_latent.metric.network import MILO
from milo_latent.pipelines.diffbir import DiffBIRPipeline
from milo_latent.resources import available_weights, weights_dir

TaskName = Literal["denoise", "sr"]


@dataclass(frozen=True)
class Task:
    """Defaults of a task.

    Args:
        upscale: how much larger the result is than the photo.
        steps: denoising steps.
        milo_scale: strength of MILO guidance.
        schedule: its curriculum.
    """

    upscale: float = 1.0
    steps: int = 20
    milo_scale: float = 0.5
    schedule: Schedule = "cosine"


TASKS: dict[TaskName, Task] = {"denoise": Task(), "sr": Task(upscale=4.0)}
assert set(TASKS) == set(get_args(TaskName))


@dataclass(frozen=True)
class Restorer:
    """A pipeline and the metric that guides it.

    Args:
        pipeline: on its device.
        metric: MILO_L for the pipeline's latents; None if there is none, and so no guidance.
    """

    pipeline: DiffBIRPipeline
    metric: MILO | None


def best_device() -> str:
    """Return "cuda", "mps" or "cpu", the first that is there."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def load_restorer(
    model: str | Path = "nano", *, device: str | None = None, dtype: torch.dtype | None = None
) -> Restorer:
    """Open a pipeline with its metric.

    Args:
        model: the name of a shipped set, a pipeline folder, or a hub id; its `metric` folder is the metric.
        device: "cpu", "cuda", "mps"; None takes the best there is.
        dtype: of the networks; None means float32, whatever the files hold.

    Returns:
        Pipeline and metric.

    Raises:
        FileNotFoundError: if there is no such model.
        ValueError: if there is no such device.
    """
    folder = weights_dir(str(model)) if str(model) in available_weights() else Path(model)
    if not folder.is_dir() and (folder.is_absolute() or str(model).count("/") != 1):
        raise FileNotFoundError(
            f"Expected a model, got {str(model)!r}: neither a shipped set ({', '.join(available_weights())}), "
            "nor a folder, nor a hub id such as owner/name."
        )
    source = folder if folder.is_dir() else str(model)
    pipeline = DiffBIRPipeline.from_pretrained(source, dtype=dtype or torch.float32)
    metric_folder = Path(pipeline.name_or_path) / "metric"
    metric = MILO.from_pretrained(metric_folder) if metric_folder.is_dir() else None
    return Restorer(pipeline.to(_check_device(device or best_device())), metric)


def _check_device(name: str) -> str:
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first_line = str(error).splitlines()[0]
        raise ValueError(
            f"Expected a device that is there, such as {best_device()!r}, got {name!r}: {first_line}"
        ) from error
    return name


def restore_image(
    image: Tensor,
    *,
    model: str | Path | Restorer = "nano",
    task: TaskName = "denoise",
    milo_scale: float | None = None,
    schedule: Schedule | None = None,
    steps: int | None = None,
    seed: int = 0,
    tile: int | None = None,
) -> Tensor:
    """Restore an image, or several of one size.

    Args:
        image: degraded image, (B, 3, H, W), in [0, 1], any size.
        model: a restorer from `load_restorer`, or what that takes.
        task: "denoise" keeps the size, "sr" makes it four times as large.
        milo_scale: strength of MILO guidance, in [0, 1]; 0 switches it off; None takes the task's.
        schedule: curriculum of the guidance, "constant", "linear" or "cosine"; None takes the task's.
        steps: denoising steps; None takes the task's.
        seed: the same seed gives the same result; each image of a batch is restored as it would be alone.
        tile: side in pixels of the tiles that larger images are restored in, at least 320; None restores them whole,
            or as the pipeline's `enable_tiling` says.

    Returns:
        Restored image, (B, 3, H * upscale, W * upscale) float32, in [0, 1], on the CPU.

    Raises:
        TypeError: if `image` is not floating point.
        ValueError: for a wrong shape, NaN, an unknown task, or guidance where the model has no metric.
        MemoryError: if the image is too large for the device.
    """
    check_choice("task", task, TASKS)
    check_batch("image", image, 3)
    check_finite("image", image)
    restorer = model if isinstance(model, Restorer) else load_restorer(model)
    defaults = TASKS[task]
    scale = defaults.milo_scale if milo_scale is None else milo_scale
    if restorer.metric is None and milo_scale:
        raise ValueError(
            "Expected a model with a `metric` folder for MILO guidance, got one without. Pass milo_scale=0."
        )
    guide = None
    if restorer.metric is not None:
        guide = MILOGuidance(restorer.metric, milo_scale=scale, schedule=schedule or defaults.schedule)
    generators = [torch.Generator().manual_seed(seed) for _ in range(image.shape[0])]
    try:
        with restorer.pipeline.tiling(tile):
            result = restorer.pipeline(
                image=image,
                upscale=defaults.upscale,
                num_inference_steps=defaults.steps if steps is None else steps,
                generator=generators,
                output_type="pt",
                callback_on_step_end=guide,
            )
    except MemoryError as error:
        raise MemoryError(f"{image.shape[3]}x{image.shape[2]} pixels: {error}") from error
    return result.images.float().cpu()
