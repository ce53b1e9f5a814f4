"""Compression by real codecs, through Pillow."""

from __future__ import annotations

import torch
from torch import Tensor

from milo_latent.pictures import codec_round_trip, jpeg_round_trip


def jpeg(image: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Compress as JPEG of quality `amount`."""
    return jpeg_round_trip(image, int(amount))


def jpeg2000(image: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    """Compress by the lossy wavelets of JPEG 2000 to 1 / `amount` of the size."""
    options = {"quality_mode": "rates", "quality_layers": [amount], "irreversible": True}
    return codec_round_trip(image, format="JPEG2000", **options)
