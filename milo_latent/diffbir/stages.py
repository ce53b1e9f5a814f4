"""The stages of DiffBIR that see whole images, each in tiles where that is asked for; pure functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from milo_latent.checks import check_choice
from milo_latent.diffbir.colour import ColorFix, fix_colour, low_frequencies
from milo_latent.diffbir.official_tiles import official_tiled
from milo_latent.latents.codec import check_tile, pad_image, vae_scale_factor
from milo_latent.latents.tiling import tiled

Stage = Literal["cleaner", "encoder", "diffusion", "decoder"]
STAGES: tuple[str, ...] = get_args(Stage)
BLUR_REACH = 31  # pixels that the wavelet fix's low frequencies reach: 1 + 2 + 4 + 8 + 16
OFFICIAL_MULTIPLE = 64  # to which the official code pads images
SMALLEST_TILE = 64  # pixels


@dataclass(frozen=True)
class Tile:
    """Tiles of a stage.

    Args:
        size: of a side, in pixels.
        overlap: the least that neighbours share, in pixels.
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

    def fits(self, sides: tuple[int, ...], cell: int = 1) -> bool:
        """Tell whether both sides, in cells of `cell` pixels, hold a tile; the official code uses tiles only then."""
        return min(sides) >= self.size // cell

    def official(self, cell: int = 1) -> Callable[..., Tensor]:
        """Return `official_tiled` with these sizes, in cells of `cell` pixels."""
        size = self.size // cell
        return partial(official_tiled, tile=size, stride=size - self.overlap // cell)

    def blended(self, multiple: int) -> Callable[..., Tensor]:
        """Return `tiled` with these sizes, for tiles that start at multiples of so many pixels."""
        return partial(tiled, **self.aligned(multiple))


class TilingMixin:
    """What switches a pipeline's tiles on and off."""

    _tiles: dict[str, Tile]
    vae: Any

    def enable_tiling(self, tile: int = 512, overlap: int | None = None, *, stages: Sequence[str] = STAGES) -> None:
        """Run stages in tiles that overlap and blend, so that memory does not grow with the image.

        Call it again for stages of another tile size. Images that fit in one tile are processed whole.

        Args:
            tile: side in pixels, at least 64; at least 320 for "encoder" and "decoder".
            overlap: the least that neighbours share, in pixels; None means a quarter of the tile.
            stages: of "cleaner", "encoder", "diffusion", "decoder" (which takes the colour fix along).

        Raises:
            ValueError: for unknown stages or sizes that do not fit each other.
        """
        for stage in stages:
            check_choice("stages", stage, STAGES)
        chosen = Tile(tile, tile // 4 if overlap is None else overlap)
        if self.vae is not None and {"encoder", "decoder"} & set(stages):
            check_tile(self.vae, tile - tile % vae_scale_factor(self.vae), given=tile)
        self._tiles = self._tiles | dict.fromkeys(stages, chosen)  # anew: other pipelines may hold the same ones

    def _tile_size(self, stage: str, multiple: int = 8) -> int | None:
        tile = self._tiles.get(stage)
        return None if tile is None else tile.size // multiple * multiple

    def disable_tiling(self) -> None:
        """Process whole images again."""
        self._tiles = {}

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

    def enable_vae_tiling(self, tile: int = 512, overlap: int | None = None) -> None:
        """Encode and decode in tiles; see `enable_tiling`."""
        self.enable_tiling(tile, overlap, stages=("encoder", "decoder"))

    def disable_vae_tiling(self) -> None:
        """Encode and decode whole images again."""
        self._tiles = {stage: tile for stage, tile in self._tiles.items() if stage not in ("encoder", "decoder")}


def pad(image: Tensor, multiple: int, *, smallest: int = 1, official: bool = False) -> Tensor:
    """Pad images at the bottom and right to multiples: by repeating the border, or in black as the official code does.

    Args:
        image: (B, C, H, W).
        multiple: of which H and W become multiples.
        smallest: the least sides of the result.
        official: black instead.

    Returns:
        Padded images.
    """
    if not official:
        return pad_image(image, multiple, smallest=smallest)
    height, width = image.shape[2:]
    return F.pad(image, (0, -width % multiple, 0, -height % multiple))


def cleaner_tiles(
    tile: Tile | None, sides: tuple[int, ...], multiple: int, *, official: bool
) -> Callable[..., Tensor] | None:
    """Return what applies a cleaner to tiles of an image, None for the whole.

    Args:
        tile: of the cleaner, or None.
        sides: height and width of the image that the cleaner sees.
        multiple: of the cleaner, where tiles start.
        official: whether to place and weigh tiles as the official code does.
    """
    if tile is None or (official and not tile.fits(sides)):
        return None
    return tile.official() if official else tile.blended(multiple)


def predict(
    function: Callable[[Tensor, Tensor], Tensor],
    latents: Tensor,
    condition: Tensor,
    *,
    pixels: int,
    tile: Tile | None = None,
    multiple: int = 1,
    official: bool = False,
) -> Tensor:
    """Apply the networks of a denoising step, to all latents or to tiles whose outputs are blended.

    Args:
        function: from latents and condition, (B, C, h, w) each, to the model output.
        latents: (B, C, h, w).
        condition: of the same shape.
        pixels: width of a latent cell.
        tile: where not whole.
        multiple: pixels of which a tile's side and place are multiples.
        official: whether to place and weigh tiles as the official code does, `tile.overlap` being size - stride.

    Returns:
        Model output, (B, C, h, w).
    """
    if tile is None:
        return function(latents, condition)
    channels = latents.shape[1]
    both = torch.cat([latents, condition.to(latents.dtype)], dim=1)

    def run(each: Tensor) -> Tensor:
        return function(each[:, :channels], each[:, channels:])

    if official:
        if not tile.fits(tuple(latents.shape[2:]), pixels):
            return function(latents, condition)
        return tile.official(pixels)(run, both)
    return tiled(run, both, **tile.aligned(max(multiple, pixels), pixels))


def put_colour(image: Tensor, colour: Tensor, *, method: ColorFix, tile: Tile | None = None) -> Tensor:
    """Give `image` the colours of `colour`, (B, 3, H, W) each; in tiles the same, since they see as far as the blur."""
    if tile is None or method != "wavelet":
        return fix_colour(image, colour, method=method)
    overlap = max(tile.overlap, 2 * BLUR_REACH)
    size = max(tile.size, 2 * overlap)
    # blurring is linear: image - blurred(image) + blurred(colour), with one tensor less
    return tiled(low_frequencies, colour - image, tile=size, overlap=overlap, margin=BLUR_REACH).add_(image)
