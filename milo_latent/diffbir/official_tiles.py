"""Tiles placed and weighed as the official code does: for results equal to its; `tiled` blends better."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

SPREAD = 0.01  # variance of the gaussian, of a tile's side squared


def official_tiled(
    function: Callable[[Tensor], Tensor],
    image: Tensor,
    *,
    tile: int,
    stride: int,
    scale: float | Fraction = 1,
    weights: Literal["gaussian", "uniform"] = "gaussian",
) -> Tensor:
    """Apply `function` to overlapping tiles and take the weighted mean of what it gives.

    Args:
        function: from (B, C, tile, tile) to (B, C2, tile * scale, tile * scale).
        image: (B, C, H, W), both sides at least `tile`.
        tile: side of the tiles.
        stride: between them, at most `tile`.
        scale: of the sides.
        weights: "gaussian", or "uniform" for the plain mean.

    Returns:
        (B, C2, H * scale, W * scale).

    Raises:
        ValueError: if the image is smaller than a tile, or tiles would leave gaps.

    Source: `make_tiled_fn` in DiffBIR's diffbir/utils/common.py.
    """
    height, width = image.shape[2:]
    if min(height, width) < tile or not 1 <= stride <= tile:
        raise ValueError(
            f"Expected sides of at least {tile} and a stride of 1 to {tile}, got {height}x{width}, {stride}."
        )
    ratio = Fraction(scale).limit_denominator(1024)
    side = int(tile * ratio)
    weight = gaussian_weights(side) if weights == "gaussian" else torch.ones(side, side, dtype=torch.float64)
    total: Tensor | None = None
    for top in tile_starts(height, tile, stride):
        for left in tile_starts(width, tile, stride):
            part = function(image[..., top : top + tile, left : left + tile])
            if total is None:
                weight = weight.to(part)
                total = part.new_zeros(*part.shape[:2], int(height * ratio), int(width * ratio))
                count = torch.zeros_like(total[:1, :1])
            rows, columns = (slice(int(at * ratio), int(at * ratio) + side) for at in (top, left))
            total[..., rows, columns] += part * weight
            count[..., rows, columns] += weight
    assert total is not None
    return total / count


def tile_starts(side: int, tile: int, stride: int) -> list[int]:
    """Return where tiles start: every `stride`, and one that ends with the side."""
    starts = list(range(0, side - tile + 1, stride))
    return starts if starts[-1] + tile == side else [*starts, side - tile]


def gaussian_weights(height: int, width: int | None = None) -> Tensor:
    """Return the official weights of a tile, (height, width) float64: centred across, half a cell too low down."""
    width = height if width is None else width

    def profile(side: int, centre: float) -> Tensor:
        distance = (torch.arange(side, dtype=torch.float64) - centre) / side
        return torch.exp(-distance.square() / (2 * SPREAD)) / (2 * torch.pi * SPREAD) ** 0.5

    return torch.outer(profile(height, height / 2), profile(width, (width - 1) / 2))
