"""Tiles of the pipeline's stages: their sizes, how the official code places and weighs them, switching them on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from milo_latent.checks import check_choice
from milo_latent.latents.codec import check_tile

Stage = Literal["cleaner", "encoder", "diffusion", "decoder"]
STAGES: tuple[str, ...] = get_args(Stage)
SMALLEST_TILE = 64  # pixels
VARIANCE = 0.01  # of the official Gaussian, in units of a tile's side squared


@dataclass(frozen=True)
class Tile:
    """Size of a stage's tiles.

    Args:
        size: of a side, in pixels.
        overlap: the least that neighbors share, in pixels.

    Raises:
        ValueError: for sizes that do not fit each other.
    """

    size: int
    overlap: int

    def __post_init__(self) -> None:
        """Refuse sizes that do not fit each other."""
        whole = isinstance(self.size, Integral) and isinstance(self.overlap, Integral)
        if not whole or self.size < SMALLEST_TILE or not 0 <= self.overlap < self.size:
            raise ValueError(
                f"Expected a tile of at least {SMALLEST_TILE} pixels and 0 <= overlap < tile, whole numbers, got tile "
                f"{self.size} and overlap {self.overlap}."
            )

    def aligned(self, unit: int, cell: int = 1) -> dict[str, Any]:
        """Return arguments of `tiled` for tiles that start at multiples of `unit` pixels, in cells of `cell` pixels."""
        size = max(self.size // unit, 1) * unit
        overlap = min(-(-self.overlap // unit) * unit, size - unit)
        return {"tile": size // cell, "overlap": overlap // cell, "multiple": unit // cell}

    def fits(self, sides: Sequence[int], cell: int = 1) -> bool:
        """Return whether both sides, in cells of `cell` pixels, hold a tile."""
        return min(sides) >= self.size // cell


class TilingMixin:
    """Switches the tiles of a pipeline's stages on and off."""

    _tiles: dict[str, Tile]
    vae: Any

    def enable_tiling(self, tile: int = 512, overlap: int | None = None, *, stages: Sequence[str] = STAGES) -> None:
        """Run stages in tiles that overlap and blend, so that memory does not grow with the image.

        Another call sets the tiles of other stages. Images that fit in one tile are processed whole.

        Args:
            tile: side in pixels, at least 64; at least 320 for "encoder" and "decoder".
            overlap: the least that neighbors share, in pixels; None means a quarter of the tile.
            stages: of "cleaner", "encoder", "diffusion" and "decoder", which includes the color fix.

        Raises:
            ValueError: for unknown stages or sizes that do not fit each other.
        """
        for stage in stages:
            check_choice("stages", stage, STAGES)
        chosen = Tile(tile, tile // 4 if overlap is None else overlap)
        if self.vae is not None and {"encoder", "decoder"} & set(stages):
            check_tile(self.vae, tile)
        self._tiles = self._tiles | dict.fromkeys(stages, chosen)  # a new dictionary: pipelines may share the old one

    def disable_tiling(self) -> None:
        """Process whole images again."""
        self._tiles = {}

    def enable_vae_tiling(self, tile: int = 512, overlap: int | None = None) -> None:
        """Encode and decode in tiles, as `enable_tiling` does for all stages."""
        self.enable_tiling(tile, overlap, stages=("encoder", "decoder"))

    def disable_vae_tiling(self) -> None:
        """Encode and decode whole images again."""
        self._tiles = {stage: tile for stage, tile in self._tiles.items() if stage not in ("encoder", "decoder")}

    @contextmanager
    def tiling(self, tile: int | None) -> Iterator[None]:
        """Run all stages in tiles inside this block; None changes nothing."""
        kept = dict(self._tiles)
        if tile is not None:
            self.enable_tiling(tile)
        try:
            yield
        finally:
            self._tiles = kept

    def _tile_size(self, stage: str) -> int | None:
        tile = self._tiles.get(stage)
        return None if tile is None else tile.size


def official_tiled(
    function: Callable[[Tensor], Tensor],
    image: Tensor,
    *,
    tile: int,
    stride: int,
    scale: int = 1,
) -> Tensor:
    """Apply `function` to tiles placed and weighed as in the official code; `tiled` blends them better.

    Args:
        function: from (B, C, tile, tile) to (B, C2, tile * scale, tile * scale).
        image: (B, C, H, W), both sides at least `tile`.
        tile: side of the tiles.
        stride: from the start of one tile to the next, at most `tile`.
        scale: by which `function` enlarges the sides.

    Returns:
        Weighted mean of the tiles' results, (B, C2, H * scale, W * scale).

    Raises:
        ValueError: if the image is smaller than a tile, or tiles would leave gaps.

    Source: `make_tiled_fn` in DiffBIR's diffbir/utils/common.py.
    """
    height, width = image.shape[2:]
    if min(height, width) < tile or not 1 <= stride <= tile:
        raise ValueError(
            f"Expected sides of at least {tile} and a stride of 1 to {tile}, got {height}x{width}, {stride}."
        )
    side = tile * scale
    weight = gaussian_weights(side)
    total: Tensor | None = None
    for top in tile_starts(height, tile, stride):
        for left in tile_starts(width, tile, stride):
            part = function(image[..., top : top + tile, left : left + tile])
            if total is None:
                weight = weight.to(part)
                total = part.new_zeros(*part.shape[:2], height * scale, width * scale)
                count = torch.zeros_like(total[:1, :1])
            rows, columns = (slice(at * scale, at * scale + side) for at in (top, left))
            total[..., rows, columns] += part * weight
            count[..., rows, columns] += weight
    assert total is not None
    return total / count


def tile_starts(side: int, tile: int, stride: int) -> list[int]:
    """Return where tiles start: at every `stride`, and where the last one ends with the side."""
    starts = list(range(0, side - tile + 1, stride))
    return starts if starts[-1] + tile == side else [*starts, side - tile]


def gaussian_weights(side: int) -> Tensor:
    """Return the official weights of a tile, (side, side) float64: centered across, half a cell too low down."""
    centers = torch.tensor([[side / 2], [(side - 1) / 2]], dtype=torch.float64)  # down, across
    distance = (torch.arange(side) - centers) / side  # (2, side)
    profiles = torch.exp(-distance.square() / (2 * VARIANCE)) / (2 * torch.pi * VARIANCE) ** 0.5
    return torch.outer(*profiles)
