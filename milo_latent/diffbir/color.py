"""Color fixes: give the restored image the colors of the cleaned one; pure functions."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from milo_latent.checks import check_choice
from milo_latent.diffbir.tiles import Tile
from milo_latent.latents.tiling import tiled

ColorFix = Literal["wavelet", "adain", "none"]
COLOR_FIXES: tuple[str, ...] = get_args(ColorFix)
GAPS = (1, 2, 4, 8, 16)  # pixels between the taps of the blurs, whose sum is what the low frequencies depend on


def fix_color(image: Tensor, colors: Tensor, *, method: ColorFix = "wavelet", tile: Tile | None = None) -> Tensor:
    """Give `image` the colors of another image.

    Args:
        image: whose details are kept, (B, 3, H, W), in [0, 1].
        colors: whose colors are taken, of the same shape.
        method: "wavelet" (low frequencies of `colors`), "adain" (mean and standard deviation of each channel), or
            "none".
        tile: of the wavelet fix, whose result is the same in tiles; None fixes the image whole.

    Returns:
        Image, (B, 3, H, W), not clipped.

    Raises:
        ValueError: for an unknown method, or shapes that differ.
    """
    check_choice("color_fix", method, COLOR_FIXES)
    if image.shape != colors.shape:
        raise ValueError(f"Expected images of one shape, got {tuple(image.shape)} and {tuple(colors.shape)}.")
    if method != "wavelet":
        return match_statistics(image, colors) if method == "adain" else image
    if tile is None:
        return image - low_frequencies(image) + low_frequencies(colors)
    overlap = max(tile.overlap, 2 * sum(GAPS))
    size = max(tile.size, 2 * overlap)
    # blurring is linear, so one blur of the difference is enough and needs one tensor less
    return tiled(low_frequencies, colors - image, tile=size, overlap=overlap, margin=sum(GAPS)).add_(image)


def low_frequencies(image: Tensor) -> Tensor:
    """Blur (B, C, H, W) with 3x3 binomial kernels of growing gaps: the coarse part of an undecimated wavelet transform.

    Source: `wavelet_decomposition` in DiffBIR's diffbir/utils/common.py.
    """
    channels = image.shape[1]
    row = torch.tensor([1.0, 2.0, 1.0], dtype=image.dtype, device=image.device) / 4
    kernel = torch.outer(row, row).expand(channels, 1, 3, 3)
    for gap in GAPS:
        padded = F.pad(image, (gap, gap, gap, gap), mode="replicate")
        image = F.conv2d(padded, kernel, groups=channels, dilation=gap)
    return image


def match_statistics(image: Tensor, colors: Tensor) -> Tensor:
    """Give each channel of `image` the mean and standard deviation of `colors`, (B, C, H, W) each (AdaIN)."""
    deviation, target_deviation = (torch.std(each, dim=(2, 3), keepdim=True) + 1e-5 for each in (image, colors))
    mean, target_mean = (torch.mean(each, dim=(2, 3), keepdim=True) for each in (image, colors))
    return (image - mean) / deviation * target_deviation + target_mean
