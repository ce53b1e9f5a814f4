"""Large images in overlapping tiles that blend without seams; the size of a tile bounds the memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from milo_latent.checks import check_batch


class Span(NamedTuple):
    """A tile along one axis: cells `start` to `stop` of the input."""

    start: int
    stop: int
    weights: Tensor  # of the output's cells, ((stop - start) * scale,); over all spans they add up to 1 in each cell


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
    """Apply `function` to overlapping tiles and blend the results; memory beside input and output is that of a tile.

    The result equals `function(image)`, up to rounding, if a cell of the output depends on no input farther away than
    `margin`. Otherwise weights that rise like a cosine hide the differences between tiles.

    Args:
        function: maps (B, C, h, w) to (B, C2, h * scale, w * scale); h and w are at most `tile`.
        image: (B, C, H, W); passed on whole if it fits into one tile.
        tile: side of the tiles, in cells of `image`.
        overlap: the least that neighbors share, at least 2 * `margin`.
        margin: width of the tiles' inner borders that get no weight, since `function` did not see their surroundings.
        scale: output cells for an input cell along a side, such as 8 for a decoder, `Fraction(1, 8)` for an encoder.
        multiple: tiles start at multiples of this, such as the stride of a network.

    Returns:
        (B, C2, H * scale, W * scale), with the dtype and device of `function`'s results.

    Raises:
        TypeError: if `image` is not floating point.
        ValueError: if the sizes do not fit each other, or `function` returns another size.

    Source: own.

    Example:
        >>> image = torch.rand(1, 3, 100, 70)
        >>> doubled = tiled(lambda each: each * 2, image, tile=32, overlap=8)
        >>> torch.allclose(doubled, image * 2, atol=1e-6)
        True
    """
    check_batch("image", image)
    if max(image.shape[2:]) <= tile:
        return function(image)
    ratio = Fraction(scale).limit_denominator(1024)
    rows, columns = (
        tile_spans(side, tile=tile, overlap=overlap, margin=margin, ratio=ratio, multiple=multiple)
        for side in image.shape[2:]
    )
    total: Tensor | None = None
    for row, column in itertools.product(rows, columns):
        part = function(image[..., row.start : row.stop, column.start : column.stop])
        expected = (len(row.weights), len(column.weights))
        if part.shape[2:] != expected:
            raise ValueError(f"Expected tiles of {expected} from the function (scale {scale}), got {part.shape[2:]}.")
        if total is None:  # in float32 at least: half precision would round at each of up to four additions
            dtype = torch.promote_types(part.dtype, torch.float32)
            sides = [int(side * ratio) for side in image.shape[2:]]
            total = torch.zeros(*part.shape[:2], *sides, device=part.device, dtype=dtype)
        top, left = int(row.start * ratio), int(column.start * ratio)
        weights = row.weights[:, None].to(total) * column.weights.to(total)
        total[..., top : top + expected[0], left : left + expected[1]] += part * weights
    assert total is not None
    return total.to(part.dtype)


def tile_spans(
    side: int, *, tile: int, overlap: int, margin: int = 0, ratio: Fraction = Fraction(1), multiple: int = 1
) -> list[Span]:
    """Cut a side of `side` cells into overlapping spans, from first to last, whose weights add up to 1 everywhere.

    The other arguments are those of `tiled`, `ratio` being its `scale`.

    Raises:
        ValueError: if the sizes do not fit each other.
    """
    if not 0 <= 2 * margin <= overlap < tile:
        raise ValueError(
            f"Expected 0 <= 2 * margin <= overlap < tile, got margin {margin}, overlap {overlap}, tile {tile}. "
            "Choose larger tiles."
        )
    for name, value in (("tile", tile), ("overlap", overlap)):
        if value % multiple:
            raise ValueError(f"Expected `{name}` to be a multiple of {multiple}, got {value}.")
    rise, border = (_scaled(name, cells, ratio) for name, cells in (("overlap", overlap), ("margin", margin)))
    if side > tile:
        _scaled("multiple", multiple, ratio)
    total, bounds = torch.zeros(_scaled("side", side, ratio)), list(_bounds(side, tile, overlap, multiple))
    places = [slice(int(start * ratio), int(stop * ratio)) for start, stop in bounds]
    profiles = [
        _profile(place.stop - place.start, rise, border, first=start == 0, last=stop == side)
        for place, (start, stop) in zip(places, bounds, strict=True)
    ]
    for place, profile in zip(places, profiles, strict=True):
        total[place] += profile
    parts = zip(bounds, places, profiles, strict=True)
    return [Span(start, stop, profile / total[place]) for (start, stop), place, profile in parts]


def _bounds(side: int, tile: int, overlap: int, multiple: int) -> Iterator[tuple[int, int]]:
    """Yield starts and stops; the last tile is moved back so that it ends with the side."""
    for start in itertools.count(0, tile - overlap):
        if start + tile >= side:
            last = -(-max(side - tile, 0) // multiple) * multiple
            yield last, side
            return
        yield start, start + tile


def _profile(length: int, overlap: int, margin: int, *, first: bool, last: bool) -> Tensor:
    """Return weights, (length,): 1 inside; at inner borders 0 over `margin` cells, then a rise like a cosine's."""
    rise = overlap - 2 * margin
    phase = (torch.arange(rise, dtype=torch.float32) + 0.5) / max(rise, 1)
    border = torch.cat([torch.zeros(margin), torch.sin(phase * torch.pi / 2) ** 2])
    profile = torch.ones(length)
    if not first:
        profile[: len(border)] *= border
    if not last:
        profile[length - len(border) :] *= border.flip(0)
    return profile


def _scaled(name: str, cells: int, ratio: Fraction) -> int:
    scaled = cells * ratio
    if scaled.denominator != 1:
        raise ValueError(f"Expected `{name}` to be a multiple of {ratio.denominator} (scale {ratio}), got {cells}.")
    return int(scaled)
