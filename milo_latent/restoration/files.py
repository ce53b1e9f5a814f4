"""Restore files of photos."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from milo_latent.checks import check_apart
from milo_latent.files import ALPHA_SUFFIXES, IMAGE_SUFFIXES, check_output, read_photo, write_image
from milo_latent.jobs import Jobs, Report, run_jobs
from milo_latent.pictures import LUMA
from milo_latent.restoration.faces import Restore


def restore_file(
    photo: Path,
    output: Path,
    restore: Restore,
    *,
    text: Mapping[str, str] | None = None,
    max_pixels: int | None = None,
) -> tuple[str, str]:
    """Restore a photo; a gray one stays gray, and transparency is kept where the format of `output` holds it.

    `text` is that of `write_image`, `max_pixels` that of `read_photo`.

    Returns:
        Sizes before and after, WIDTHxHEIGHT.

    Raises:
        FileNotFoundError: if there is no such photo, or no folder for `output`.
        ValueError: if the photo is damaged, `output` is the photo itself, or its suffix not that of an image.
    """
    check_output(output, IMAGE_SUFFIXES)
    check_apart(output, photo)
    image, alpha = read_photo(photo, max_pixels=max_pixels)
    restored = restore(image)
    if torch.equal(image, image[:, :1].expand_as(image)):  # a gray photo
        restored = to_gray(restored)
    if alpha is not None and output.suffix.lower() in ALPHA_SUFFIXES:
        alpha = interpolate(alpha, size=restored.shape[2:], mode="bilinear", align_corners=False)
    else:
        alpha = None
    write_image(output, restored, alpha=alpha, text=text)
    before, after = ("{1}x{0}".format(*each.shape[2:]) for each in (image, restored))
    return before, after


def to_gray(image: Tensor) -> Tensor:
    """Return the luma of an image, (B, 3, H, W), in all channels, without the slight tint that models give to gray."""
    return (image * image.new_tensor(LUMA).view(1, 3, 1, 1)).sum(dim=1, keepdim=True).expand_as(image)


def restore_files(jobs: Jobs, restore: Restore, *, made: Mapping[str, Any], progress: bool = True) -> Report:
    """Restore photos by `restore_file`, each as it would be restored alone; the report holds their sizes.

    `made` and `progress` are those of `run_jobs`.
    """

    def work(photo: Path, result: Path) -> tuple[str, str]:
        return restore_file(photo, result, restore)

    return run_jobs(jobs, work, made=made, unit="photo", progress=progress)
