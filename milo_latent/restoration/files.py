"""Restore files and folders of photos."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from milo_latent.checks import check_apart
from milo_latent.files import ALPHA_SUFFIXES, IMAGE_SUFFIXES, check_output, process_folder, read_photo, write_image
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


def restore_folder(photos: Path, output: Path, restore: Restore, *, made: Mapping[str, Any]) -> tuple[int, int]:
    """Restore every photo of a folder, each as it would be restored alone; photos with a result already are skipped.

    The results are PNG files of the photos' names. `made`, returns and errors are those of `process_folder`; results
    that would lie among the photos are refused too.
    """
    if output.resolve() == photos.resolve():
        raise ValueError(f"Expected another folder for the results than that of the photos, got {output} for both.")
    return process_folder(
        photos,
        output,
        lambda photo, result: restore_file(photo, result, restore),
        made=made,
        inputs=IMAGE_SUFFIXES,
        suffix="png",
        unit="photos",
    )
