"""One call from a degraded photo to a restored one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor

from milo_latent.checks import check_batch, check_choice
from milo_latent.diffbir.inputs import to_output
from milo_latent.inputs import Images, images_to_tensor, is_one_image
from milo_latent.pipelines.diffbir import DiffBIRPipeline
from milo_latent.restoration.faces import restore_faces
from milo_latent.restoration.restorer import load_restorer
from milo_latent.restoration.settings import RestorationSettings

OutputType: TypeAlias = Literal["pil", "np", "pt"]


def restore_image(
    image: Images,
    *,
    model: str | Path | DiffBIRPipeline = "nano",
    output_type: OutputType | None = None,
    **settings: Any,
) -> Any:
    """Restore an image, or several of one size.

    Args:
        image: degraded image of any size: a picture, a path, an array (H, W, 3) or (B, H, W, 3), a tensor (3, H, W) or
            (B, 3, H, W), or a list of them; arrays and tensors in 8 or 16 bit, or floating point in [0, 1].
        model: a pipeline from `load_restorer`, or what that takes.
        output_type: "pil", "np" or "pt", as of diffusers' pipelines; None gives pictures for pictures and paths, an
            array for an array, and a tensor for a tensor.
        **settings: those of `RestorationSettings`, such as `task`, `milo_scale`, `steps`, `seed`, `tile`, `prompt`.

    Returns:
        Restored image, `upscale` times as large: for "pil" a picture, for "np" an array, (H, W, 3), for "pt" a tensor
        (3, H, W), on the CPU, both float32 in [0, 1]. A batch or a list gives a list of pictures, or a batch.

    Raises:
        FileNotFoundError: for a path where nothing is.
        TypeError: if `image` is no image, or for an unknown setting.
        ValueError: for a wrong shape, NaN, settings that cannot work with the model, or a photo without faces.
        MemoryError: if the image is too large for the device.
    """
    kind = output_type or _output_type(image)
    check_choice("output_type", kind, get_args(OutputType))
    pipe = model if isinstance(model, DiffBIRPipeline) else load_restorer(model)
    restored = restore(images_to_tensor(image), pipe, RestorationSettings(**settings).resolve(pipe))
    results = to_output(restored, kind)
    return results[0] if is_one_image(image) else results


def _output_type(image: Images) -> str:
    """Return in which form an image came; that of a list is that of its first."""
    first = image[0] if isinstance(image, list | tuple) and image else image
    return "pt" if isinstance(first, Tensor) else "np" if isinstance(first, np.ndarray) else "pil"


def restore(
    image: Tensor, pipe: DiffBIRPipeline, settings: RestorationSettings, *, callbacks: Sequence[Any] | None = None
) -> Tensor:
    """Restore images as `restore_image` does, with settings that are resolved for `pipe`, and so checked.

    `callbacks` are given to the pipeline as its `callback_on_step_end`, in place of the settings' guide.
    """
    check_batch("image", image, 3)
    seeds, upscale = settings.seeds(image.shape[0]), settings.upscale
    assert upscale is not None
    run = partial(_run, settings=settings, callbacks=callbacks)
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
    image: Tensor,
    pipe: DiffBIRPipeline,
    *,
    settings: RestorationSettings,
    callbacks: Sequence[Any] | None,
    seeds: Sequence[int],
    upscale: float,
) -> Tensor:
    try:
        with pipe.tiling(settings.tile):
            result: Any = pipe(
                image=image,
                upscale=upscale,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                output_type="pt",
                callback_on_step_end=settings.guide(pipe) if callbacks is None else list(callbacks),
                **settings.call_arguments,
            )
    except MemoryError as error:
        raise MemoryError(f"{image.shape[3]}x{image.shape[2]} pixels: {error}") from error
    return result.images.float().cpu()
