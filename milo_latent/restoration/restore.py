"""One call from a degraded photo to a restored one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from milo_latent.checks import check_batch
from milo_latent.pipelines.diffbir import DiffBIRPipeline
from milo_latent.restoration.faces import restore_faces
from milo_latent.restoration.restorer import load_restorer
from milo_latent.restoration.settings import RestorationSettings


def restore_image(image: Tensor, *, model: str | Path | DiffBIRPipeline = "nano", **settings: Any) -> Tensor:
    """Restore an image, or several of one size.

    Args:
        image: degraded image, (B, 3, H, W), in [0, 1], any size.
        model: a pipeline from `load_restorer`, or what that takes.
        **settings: those of `RestorationSettings`, such as `task`, `milo_scale`, `steps`, `seed`, `tile`, `prompt`.

    Returns:
        Restored image, (B, 3, H * upscale, W * upscale) float32, in [0, 1], on the CPU.

    Raises:
        TypeError: if `image` is not floating point, or for an unknown setting.
        ValueError: for a wrong shape, NaN, settings that cannot work with the model, or a photo without faces.
        MemoryError: if the image is too large for the device.
    """
    pipe = model if isinstance(model, DiffBIRPipeline) else load_restorer(model)
    return restore(image, pipe, RestorationSettings(**settings).resolve(pipe))


def restore(image: Tensor, pipe: DiffBIRPipeline, settings: RestorationSettings) -> Tensor:
    """Restore images as `restore_image` does, with settings that are resolved for `pipe`, and so checked."""
    check_batch("image", image, 3)
    seeds, upscale = settings.seeds(image.shape[0]), settings.upscale
    assert upscale is not None
    run = partial(_run, settings=settings)
    if settings.task != "unaligned_face":
        return run(image, pipe, seeds=seeds, upscale=upscale)
    assert settings.detector is not None
    background = pipe.for_background()
    photos = [
        restore_faces(
            photo,
            detector=settings.detector,
            restore_face=partial(run, pipe=pipe, seeds=[seed], upscale=1.0),
            restore_background=partial(run, pipe=background, seeds=[seed], upscale=upscale),
            upscale=upscale,
        )
        for photo, seed in zip(image.split(1), seeds, strict=True)
    ]
    return torch.cat(photos)


def _run(
    image: Tensor, pipe: DiffBIRPipeline, *, settings: RestorationSettings, seeds: Sequence[int], upscale: float
) -> Tensor:
    try:
        with pipe.tiling(settings.tile):
            result = pipe(
                image=image,
                upscale=upscale,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                output_type="pt",
                callback_on_step_end=settings.guide(pipe),
                **settings.call_arguments,
            )
    except MemoryError as error:
        raise MemoryError(f"{image.shape[3]}x{image.shape[2]} pixels: {error}") from error
    return result.images.float().cpu()
