"""Colour fixes: take the colours of the restored image from the cleaned one; pure functions."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from milo_latent.checks import check_choice

ColorFix = Literal["wavelet", "adain", "none"]
COLOR_FIXES: tuple[str, ...] = get_args(ColorFix)
WAVELET_LEVELS = 5


def fix_colour(image: Tensor, colour: Tensor, *, method: ColorFix = "wavelet") -> Tensor:
    """Give `image` the colours of `colour`.

    Args:
        image: whose details are kept, (B, 3, H, W), in [0, 1].
        colour: whose colours are taken, of the same shape.
        method: "wavelet" (low frequencies from `colour`), "adain" (mean and spread of each channel), or "none".

    Returns:
        Image, (B, 3, H, W), not clipped.

    Raises:
        ValueError: for an unknown method, or shapes that differ.
    """
    check_choice("color_fix", method, COLOR_FIXES)
    if image.shape != colour.shape:
        raise ValueError(f"Expected images of one shape, got {tuple(image.shape)} and {tuple(colour.shape)}.")
    if method == "wavelet":
        return image - low_frequencies(image) + low_frequencies(colour)
    return match_statistics(image, colour) if method == "adain" else image


def low_frequencies(image: Tensor, *, levels: int = WAVELET_LEVELS) -> Tensor:
    """Blur with 3x3 binomial kernels, 1, 2, 4, ... pixels apart: what remains of an undecimated wavelet transform.

    Args:
        image: (B, C, H, W).
        levels: the number of blurs.

    Returns:
        Low frequencies, (B, C, H, W).

    Source: `wavelet_decomposition` in DiffBIR's diffbir/utils/common.py.
    """
    channels = image.shape[1]
    row = torch.tensor([1.0, 2.0, 1.0], dtype=image.dtype, device=image.device) / 4
    kernel = torch.outer(row, row).expand(channels, 1, 3, 3)
    for level in range(levels):
        gap = 2**level
        padded = F.pad(image, (gap, gap, gap, gap), mode="replicate")
        image = F.conv2d(padded, kernel, groups=channels, dilation=gap)
    return image


def match_statistics(image: Tensor, colour: Tensor) -> Tensor:
    """Give each channel of `image` the mean and spread of that of `colour`, (B, C, H, W) each (AdaIN)."""
    spread, target_spread = (torch.std(each, dim=(2, 3), keepdim=True) + 1e-5 for each in (image, colour))
    mean, target_mean = (torch.mean(each, dim=(2, 3), keepdim=True) for each in (image, colour))
    return (image - mean) / spread * target_spread + target_mean
