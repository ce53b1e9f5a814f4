"""Restore files of photos."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from milo_latent import __version__
from milo_latent.batches import Batches
from milo_latent.checks import check_apart
from milo_latent.files import (
    ALPHA_SUFFIXES,
    EXIF_SUFFIXES,
    IMAGE_SUFFIXES,
    Photo,
    check_output,
    open_photo,
    write_image,
)
from milo_latent.jobs import Jobs, Report, run_jobs
from milo_latent.pictures import LUMA
from milo_latent.restoration.faces import Restore
from milo_latent.restoration.settings import RestorationSettings


def restore_file(
    photo: Path,
    output: Path,
    restore: Restore,
    *,
    text: Mapping[str, str] | None = None,
    max_pixels: int | None = None,
) -> tuple[str, str, list[str]]:
    """Restore a photo; a gray one stays gray, and what the format of `output` holds of its metadata is kept.

    `text` is that of `write_image`, left out where the format holds none; `max_pixels` is that of `open_photo`.

    Returns:
        Sizes before and after, WIDTHxHEIGHT, and what of the photo `output` does not hold.

    Raises:
        FileNotFoundError: if there is no such photo, or no folder for `output`.
        ValueError: if the photo is damaged, `output` is the photo itself, or its suffix not that of an image.
    """
    check_output(output, IMAGE_SUFFIXES)
    check_apart(output, photo)
    opened = open_photo(photo, max_pixels=max_pixels)
    return _write_restored(opened, restore(opened.image), output, text=text)


def _write_restored(
    photo: Photo, restored: Tensor, output: Path, *, text: Mapping[str, str] | None
) -> tuple[str, str, list[str]]:
    """Write what became of a photo, (1, 3, H, W); return what `restore_file` does."""
    image, alpha, suffix = photo.image, photo.alpha, output.suffix.lower()
    if torch.equal(image, image[:, :1].expand_as(image)):  # a gray photo
        restored = to_gray(restored)
    if alpha is not None and suffix in ALPHA_SUFFIXES:
        alpha = interpolate(alpha, size=restored.shape[2:], mode="bilinear", align_corners=False)
    else:
        alpha = None
    write_image(output, restored, alpha=alpha, text=text if suffix in EXIF_SUFFIXES else None, like=photo)
    before, after = ("{1}x{0}".format(*each.shape[2:]) for each in (image, restored))
    return before, after, photo.lost_in(output)


def describe_result(model: str, weights: str, settings: RestorationSettings) -> dict[str, str]:
    """Return what a result says of itself, the `text` of `write_image`.

    Args:
        model: what was opened.
        weights: its `pipeline_digest`.
        settings: resolved; `restore_image` makes the result again of them.
    """
    record = {"model": model, "weights": weights, "settings": settings.as_record()}
    return {"Software": f"milo_latent {__version__}", "milo_latent": json.dumps(record)}


def to_gray(image: Tensor) -> Tensor:
    """Return the luma of an image, (B, 3, H, W), in all channels, without the slight tint that models give to gray."""
    return (image * image.new_tensor(LUMA).view(1, 3, 1, 1)).sum(dim=1, keepdim=True).expand_as(image)


def restore_files(
    jobs: Jobs,
    restore: Restore,
    *,
    made: Mapping[str, Any],
    text: Mapping[str, str],
    batch: int = 1,
    upscale: float = 1.0,
    progress: bool = True,
) -> Report:
    """Restore photos by `restore_file`, each as it would be restored alone; the report holds what that returns.

    Args:
        jobs: photos, and files of images.
        restore: restores images, (B, 3, H, W).
        made: that of `run_jobs`.
        text: that of `write_image`.
        batch: how many photos of one size to restore at once, as far as they are small, which is faster; a few of the
            results' values then differ by one of 255.
        upscale: how much larger the results are.
        progress: whether to show a bar.

    Raises:
        ValueError: for a batch below 1, before the first photo.
    """
    batches = Batches(batch, restore, enlargement=upscale)

    def work(photo: Path, result: Path) -> tuple[str, str, list[str]]:
        if batch == 1:
            return restore_file(photo, result, restore, text=text)
        opened, restored = batches(photo)
        return _write_restored(opened, restored, result, text=text)

    return run_jobs(jobs, work, made=made, unit="photo", progress=progress, expect=batches.expect)
