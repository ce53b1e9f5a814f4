"""Compression by real codecs, through Pillow."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def to_pillow(image: Tensor) -> list[Image.Image]:
    """Return the pictures of (B, 3, H, W), rounded to 8 bit."""
    array = image.clamp(0, 1).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    return [Image.fromarray(each) for each in array]


def from_pillow(pictures: Sequence[Image.Image]) -> Tensor:
    """Return pictures of one size as (B, 3, H, W), in [0, 1]."""
    array = np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])
    return torch.from_numpy(array).permute(0, 3, 1, 2).float().div(255).contiguous()


def _through(image: Tensor, **options: Any) -> Tensor:
    pictures = []
    for picture in to_pillow(image):
        buffer = io.BytesIO()
        picture.save(buffer, **options)
        pictures.append(Image.open(buffer))
    return from_pillow(pictures)


def jpeg(image: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Compress as JPEG of quality `amount`."""
    return _through(image, format="JPEG", quality=int(amount))


def jpeg2000(image: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Compress as JPEG 2000 to a share of 1 / `amount` of the size, lossy wavelets."""
    return _through(image, format="JPEG2000", quality_mode="rates", quality_layers=[amount], irreversible=True)
