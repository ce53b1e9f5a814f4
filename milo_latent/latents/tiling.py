"""Large images in pieces: tiles that overlap, blended without seams, at a peak memory that a tile sets."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from milo_latent.checks import check_batch


@dataclass(frozen=True)
class Span:
    """A tile along one axis: cells `start` to `stop` of the input, and the weights of the output's cells.

    Args:
        start: first cell.
        stop: the cell behind the last.
        weights: ((stop - start) * scale,) float32; those of all spans add up to 1 in each cell.
    """

    start: int
    stop: int
    weights: Tensor


def tiled(
    function: Callable[[Tensor], Tensor],
    image: Tensor,
    *,
    tile: int,
    overlap: int,
    margin: int = 0,
    scale: float | Fraction = 1,
    multiple: int = 1,
) -> Tensor:
    """Apply `function` to overlapping tiles and blend what it gives; memory beside input and output is a tile's.

    The result is that of `function(image)`, to rounding, where an output cell depends on nothing farther than
    `margin` from it. Elsewhere the cosine weights hide what differs between tiles.

    Args:
        function: from (B, C, h, w) to (B, C2, h * scale, w * scale); `h` and `w` are `tile`, or less at the end.
        image: (B, C, H, W); what fits in one tile is passed on whole.
        tile: side of the tiles, in cells of `image`.
        overlap: the least that neighbours share, at least 2 * `margin`.
        margin: cells at a tile's inner borders that get no weight, since `function` saw no surroundings there.
        scale: of the sides, such as 8 for a decoder, `Fraction(1, 8)` (or 0.125) for an encoder.
        multiple: tiles start at multiples of this, such as the window or the stride of a network.

    Returns:
        (B, C2, H * scale, W * scale), in the dtype and on the device that `function` returns.

    Raises:
        TypeError: if `image` is not floating point.
        ValueError: if sizes do not fit each other, or `function` returns another size than promised.

    Source: own.

    Example:
        >>> image = torch.rand(1, 3, 100, 70)
        >>> doubled = tiled(lambda each: each * 2, image, tile=32, overlap=8)
        >>> torch.allclose(doubled, image * 2, atol=1e-6)
        True
    """
    check_batch("image", image)
    ratio = Fraction(scale).limit_denominator(1024)
    if max(image.shape[2:]) <= tile:
        return function(image)
    rows, columns = (
        tile_spans(side, tile=tile, overlap=overlap, margin=margin, scale=ratio, multiple=multiple)
        for side in image.shape[2:]
    )
    height, width = (_scaled(side, ratio, "image") for side in image.shape[2:])
    total: Tensor | None = None
    for row, column in itertools.product(rows, columns):
        part = function(image[..., row.start : row.stop, column.start : column.stop])
        if part.shape[2:] != (len(row.weights), len(column.weights)):
            expected = (len(row.weights), len(column.weights))
            raise ValueError(f"Expected tiles of {expected} from the function (scale {scale}), got {part.shape[2:]}.")
        if total is None:
            # half precision would round at each of up to four additions
            total = torch.zeros(*part.shape[:2], height, width, device=part.device, dtype=_wide(part.dtype))
        top, left = int(row.start * ratio), int(column.start * ratio)
        weights = row.weights[:, None].to(total) * column.weights.to(total)
        total[..., top : top + part.shape[2], left : left + part.shape[3]] += part * weights
        dtype = part.dtype
    assert total is not None
    return total.to(dtype)


def tile_spans(
    side: int, *, tile: int, overlap: int, margin: int = 0, scale: float | Fraction = 1, multiple: int = 1
) -> list[Span]:
    """Cut a side into overlapping spans whose weights add up to 1 everywhere.

    Args:
        side: length, in cells.
        tile: see `tiled`.
        overlap: see `tiled`.
        margin: see `tiled`.
        scale: see `tiled`.
        multiple: see `tiled`.

    Returns:
        Spans from first to last; one where `side` fits in a tile.

    Raises:
        ValueError: if the sizes do not fit each other.
    """
    ratio = Fraction(scale).limit_denominator(1024)
    if not 0 <= 2 * margin <= overlap < tile:
        raise ValueError(
            f"Expected 0 <= 2 * margin <= overlap < tile, got margin {margin}, overlap {overlap}, tile {tile}. "
            "Take larger tiles."
        )
    for name, value in (("tile", tile), ("overlap", overlap)):
        if value % multiple:
            raise ValueError(f"Expected `{name}` to be a multiple of {multiple}, got {value}.")
    lengths = [_scaled(value, ratio, name) for name, value in (("overlap", overlap), ("margin", margin))]
    _scaled(multiple if side > tile else side, ratio, "multiple" if side > tile else "side")
    bounds = list(_bounds(side, tile, overlap, multiple))
    profiles = []
    total = torch.zeros(_scaled(side, ratio, "side"))
    for start, stop in bounds:
        profile = _profile(int((stop - start) * ratio), *lengths, first=start == 0, last=stop == side)
        total[int(start * ratio) : int(stop * ratio)] += profile
        profiles.append(profile)
    return [
        Span(start, stop, profile / total[int(start * ratio) : int(stop * ratio)])
        for (start, stop), profile in zip(bounds, profiles, strict=True)
    ]


def _bounds(side: int, tile: int, overlap: int, multiple: int) -> Iterator[tuple[int, int]]:
    """Yield starts and stops; the last tile is moved back to end with the side, not padded beyond it."""
    for start in itertools.count(0, tile - overlap):
        if start + tile >= side:
            last = -(-max(side - tile, 0) // multiple) * multiple
            yield last, side
            return
        yield start, start + tile


def _profile(length: int, overlap: int, margin: int, *, first: bool, last: bool) -> Tensor:
    """Return 1 inside, a cosine's rise from 0 at inner borders, behind `margin` cells of 0, (length,)."""
    rise = overlap - 2 * margin
    phase = (torch.arange(rise, dtype=torch.float32) + 0.5) / max(rise, 1)
    border = torch.cat([torch.zeros(margin), torch.sin(phase * torch.pi / 2) ** 2])
    profile = torch.ones(length)
    if not first:
        profile[: len(border)] *= border
    if not last:
        profile[length - len(border) :] *= border.flip(0)
    return profile


def _scaled(cells: int, ratio: Fraction, name: str) -> int:
    scaled = cells * ratio
    if scaled.denominator != 1:
        raise ValueError(f"Expected `{name}` to be a multiple of {ratio.denominator} (scale {ratio}), got {cells}.")
    return int(scaled)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
