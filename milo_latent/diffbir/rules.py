"""Where DiffBIR's official code computes otherwise than this package: `DEFAULT` and `OFFICIAL`, side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import numpy as np
import PIL.Image
from torch import Tensor
from torch.nn import functional as F

from milo_latent.diffbir.tiles import Tile, official_tiled
from milo_latent.latents.codec import pad_image
from milo_latent.latents.tiling import tiled
from milo_latent.pictures import from_8bit, to_8bit

Compatibility = Literal["official"]
COMPATIBILITIES: tuple[str, ...] = get_args(Compatibility)
SMALLEST_LATENTS = 16  # cells a side: the metric's four levels need them


@dataclass(frozen=True)
class Rules:
    """The choices of a restoration in which this package and the official code differ.

    Args:
        whole_side: from a scaled side to whole pixels.
        enlarge: from an image, (B, 3, H, W) in [0, 1], to one of a given height and width, before it is cleaned.
        pad: from (B, C, H, W), a multiple and the least side to images whose sides are multiples, with `smallest=`.
        clips: whether the cleaned and the decoded image are clipped to [0, 1].
        tiles_must_fit: whether images are processed whole if either side is below a tile's, not only if both are.
        pads_tiles: whether images are padded for the networks even if encoder or diffusion work in tiles.
        place_tiles: from a tile, a multiple and a cell, both in pixels, to what applies a function to tiles.
        enlarges_tiled_first: whether SwinIR's image is enlarged to 512 pixels before it is cleaned in tiles, not after.
        start_timestep: from the timesteps and their number in training to the one that `start_point="cond"` noises to.
        guidance_growth: from `guidance_scale` to the amount by which `rescale_cfg` increases it, from 1.
        quantize: from the restored image, in [0, 1], to the one that is returned.
    """

    whole_side: Callable[[float], int]
    enlarge: Callable[[Tensor, tuple[int, int]], Tensor]
    pad: Callable[..., Tensor]
    clips: bool
    tiles_must_fit: bool
    pads_tiles: bool
    place_tiles: Callable[[Tile, int, int], Callable[..., Tensor]]
    enlarges_tiled_first: bool
    start_timestep: Callable[[Tensor, int], int]
    guidance_growth: Callable[[float], float]
    quantize: Callable[[Tensor], Tensor]

    def scaled_size(self, image: Tensor, factor: float) -> tuple[int, int]:
        """Return height and width of (B, C, H, W) times `factor`, at least 1."""
        height, width = (max(1, self.whole_side(side * factor)) for side in image.shape[2:])
        return height, width

    def tiles(
        self, tile: Tile | None, sides: Sequence[int], *, multiple: int = 1, cell: int = 1
    ) -> Callable[..., Tensor] | None:
        """Return what applies a function to tiles of an image, called as `tiled`; None for the whole image.

        Args:
            tile: the size of the tiles; None for the whole image.
            sides: height and width of the image, in cells.
            multiple: pixels, at multiples of which tiles start where these rules heed it, since networks see the same
                windows there.
            cell: width of a cell, in pixels.
        """
        if tile is None or (self.tiles_must_fit and not tile.fits(sides, cell)):
            return None
        return self.place_tiles(tile, multiple, cell)


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize (B, 3, H, W) to `size`, height and width: bicubic, antialiased where it shrinks; may leave [0, 1]."""
    if tuple(image.shape[2:]) == tuple(size):
        return image
    return F.interpolate(image, size=size, mode="bicubic", antialias=True, align_corners=False)


def resize_8bit(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize (B, 3, H, W), in [0, 1], in 8 bit by Pillow's bicubic filter, as the official command line does."""
    pictures = [PIL.Image.fromarray(each).resize(size[::-1], PIL.Image.Resampling.BICUBIC) for each in to_8bit(image)]
    return from_8bit(np.stack([np.asarray(picture) for picture in pictures])).to(image)


def pad_black(image: Tensor, multiple: int, *, smallest: int = 1) -> Tensor:
    """Pad (B, C, H, W) with zeros at the bottom and right to multiples, however small, as the official code does."""
    height, width = image.shape[2:]
    return F.pad(image, (0, -width % multiple, 0, -height % multiple))


def truncate(image: Tensor) -> Tensor:
    """Cut values in [0, 1] down to the next multiple of 1/255, where rounding would be exact to half of it."""
    return (image * 255.0).clamp(0, 255).floor() / 255.0


def _blended(tile: Tile, multiple: int, cell: int) -> Callable[..., Tensor]:
    return partial(tiled, **tile.aligned(max(multiple, cell), cell))


def _official(tile: Tile, multiple: int, cell: int) -> Callable[..., Tensor]:
    size = tile.size // cell
    return partial(official_tiled, tile=size, stride=size - tile.overlap // cell)


DEFAULT = Rules(
    whole_side=round,
    enlarge=lambda image, size: resize(image, size).clamp(0, 1),
    pad=pad_image,  # repeats the border, which networks do not take for an edge
    clips=True,
    tiles_must_fit=False,
    pads_tiles=True,
    place_tiles=_blended,
    enlarges_tiled_first=True,
    start_timestep=lambda timesteps, total: int(timesteps[0]),
    guidance_growth=lambda scale: scale - 1.0,  # to `scale`
    quantize=lambda image: image,
)
OFFICIAL = Rules(
    whole_side=int,
    enlarge=resize_8bit,
    pad=pad_black,
    clips=False,
    tiles_must_fit=True,
    pads_tiles=False,
    place_tiles=_official,
    enlarges_tiled_first=False,
    start_timestep=lambda timesteps, total: total - 1,
    guidance_growth=lambda scale: scale,  # to `scale + 1`
    quantize=truncate,
)
RULES = {None: DEFAULT, "official": OFFICIAL}
