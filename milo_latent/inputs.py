"""Images and latents as people have them, turned into tensors; everything that takes images takes them by this."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias, TypeGuard

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from milo_latent.checks import check_batch
from milo_latent.files import read_image, read_latents
from milo_latent.pictures import picture_to_tensor

OneInput: TypeAlias = Tensor | np.ndarray | Image.Image | str | Path
Images: TypeAlias = OneInput | Sequence[OneInput]
Latents: TypeAlias = Tensor | np.ndarray | str | Path
PATHS = (str, Path)  # a tuple, since torch 2.6 does not compile unions
HIGHEST = {torch.uint8: 255, torch.uint16: 65535}  # the value that stands for 1


def images_to_tensor(images: Images, name: str = "image") -> Tensor:
    """Return images as one batch, (B, 3, H, W) floating point; a batch in floating point is returned as it is.

    Args:
        images: a picture of Pillow, whose orientation and color profile are applied; the path of an image file; an
            array, (H, W, 3), (H, W) or (B, H, W, 3); a tensor, (3, H, W) or (B, 3, H, W); or several of one size as a
            list. Arrays and tensors hold 8 or 16 bit, or floating point in [0, 1], which is not checked here.
        name: of the images in messages.

    Raises:
        FileNotFoundError: for a path where nothing is.
        TypeError: for anything else, or another dtype.
        ValueError: for no images, other shapes, sizes that differ, or a damaged file.
    """
    if _are_several(images):
        batches = [images_to_tensor(each, name) for each in images]
        sizes = sorted({(batch.shape[3], batch.shape[2]) for batch in batches})
        if len(sizes) > 1:
            raise ValueError(f"Expected `{name}` of one size in a batch, got {sizes}. Pass them one by one.")
        tensor = torch.cat(batches) if batches else torch.empty(0, 3, 0, 0)
    elif isinstance(images, str | Path):
        tensor = read_image(images)
    elif isinstance(images, Image.Image):
        tensor = picture_to_tensor(ImageOps.exif_transpose(images))[None]
    elif isinstance(images, np.ndarray):
        tensor = _array_to_tensor(images, name)
    elif isinstance(images, Tensor):
        tensor = _in_unit_range(images[None] if images.ndim == 3 else images)
    else:
        raise TypeError(
            f"Expected `{name}` as a PIL image, a path, an array (H, W, 3), a tensor ([B, ]3, H, W) or a list of them, "
            f"got {type(images).__name__}."
        )
    check_batch(name, tensor)
    if tensor.shape[1] != 3:
        raise ValueError(f"Expected `{name}` as RGB, 3 channels, ([B, ]3, H, W), got {tuple(tensor.shape)}.")
    if 0 in tensor.shape:
        raise ValueError(f"Expected `{name}` of at least one pixel, got none.")
    return tensor


def latents_to_tensor(latents: Latents, name: str = "latents") -> Tensor:
    """Return scaled latents as one batch, (B, C, h, w); a batch is returned as it is.

    Args:
        latents: a tensor or an array, (C, h, w) or (B, C, h, w), or the path of a file as of `read_latents`.
        name: of the latents in messages.

    Raises:
        FileNotFoundError: for a path where nothing is.
        TypeError: for an image or anything else, or if they are not floating point.
        ValueError: for another shape, or a damaged file.
    """
    if isinstance(latents, PATHS):
        return read_latents(latents)
    if isinstance(latents, np.ndarray):
        latents = torch.from_numpy(np.ascontiguousarray(latents))
    if not isinstance(latents, Tensor):
        raise TypeError(
            f"Expected `{name}` as latents, a tensor or an array ([B, ]C, h, w) or a path, got "
            f"{type(latents).__name__}. `encode_image(vae, image)` makes them of an image."
        )
    tensor = latents[None] if latents.ndim == 3 else latents
    check_batch(name, tensor)
    return tensor


def is_one_image(images: Images) -> bool:
    """Return whether `images` is a single image, without a batch axis."""
    return not _are_several(images) and getattr(images, "ndim", 3) < 4


def _are_several(images: Images) -> TypeGuard[Sequence[OneInput]]:
    return isinstance(images, list | tuple)


def _array_to_tensor(array: np.ndarray, name: str) -> Tensor:
    """Return an array, (H, W), (H, W, 3), or (B, H, W, 3), as images, (B, 3, H, W) float32."""
    pixels = array[..., None] if array.ndim == 2 else array
    if pixels.ndim not in (3, 4) or pixels.shape[-1] not in (1, 3):
        raise ValueError(
            f"Expected `{name}` as an array (H, W, 3), (H, W) or (B, H, W, 3), got {array.shape}. Arrays have their "
            "channels last, and no transparency."
        )
    tensor = torch.tensor(pixels).movedim(-1, -3)
    tensor = _in_unit_range(tensor if tensor.ndim == 4 else tensor[None])
    tensor = tensor.float() if tensor.is_floating_point() else tensor
    return tensor.expand(-1, 3, -1, -1).contiguous()


def _in_unit_range(tensor: Tensor) -> Tensor:
    """Return 8 and 16 bit as float32 in [0, 1]; other dtypes stay."""
    return tensor.float() / HIGHEST[tensor.dtype] if tensor.dtype in HIGHEST else tensor
