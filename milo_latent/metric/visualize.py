"""Error maps as pictures, by pure functions from tensors to tensors; several pictures as one figure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from milo_latent.checks import check_batch, check_range
from milo_latent.extras import import_extra
from milo_latent.pictures import from_8bit, to_8bit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The colors follow this path through Oklab (lightness, green-red, blue-yellow). Lightness rises evenly from dark to
# light, so that equal steps of error look like equal steps of color, also in gray.
OKLAB_PATH = (
    (0.10, 0.00, -0.03),
    (0.30, 0.05, -0.14),
    (0.50, 0.17, -0.02),
    (0.70, 0.13, 0.13),
    (0.90, 0.00, 0.16),
)
BAR_WIDTH, BAR_GAP, TEXT_HEIGHT = 16, 8, 12  # pixels


def color_ramp() -> Tensor:
    """Return the colors of errors from 0 to the largest, (256, 3), RGB in [0, 1], evenly spaced in lightness.

    Source: own path; Oklab to sRGB as published by B. Ottosson, "A perceptual color space for image processing", 2020.
    """
    path = torch.tensor(OKLAB_PATH).T[None]  # (1, 3, points)
    return oklab_to_rgb(F.interpolate(path, size=256, mode="linear", align_corners=True)[0].T)


def oklab_to_rgb(lab: Tensor) -> Tensor:
    """Turn Oklab colors, (N, 3), into sRGB in [0, 1], (N, 3), clipped to the gamut."""
    to_cones = torch.tensor(
        [[1.0, 0.3963377774, 0.2158037573], [1.0, -0.1055613458, -0.0638541728], [1.0, -0.0894841775, -1.2914855480]]
    )
    to_linear = torch.tensor(
        [
            [4.0767416621, -3.3077115913, 0.2309699292],
            [-1.2684380046, 2.6097574011, -0.3413193965],
            [-0.0041960863, -0.7034186147, 1.7076147010],
        ]
    )
    linear = ((lab @ to_cones.T) ** 3 @ to_linear.T).clamp(0, 1)
    return torch.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear.clamp(min=1e-9) ** (1 / 2.4) - 0.055)


def map_scale(error_map: Tensor) -> float:
    """Return the error that is painted in the lightest color by default: the 99.5th percentile of V, (B, 1, h, w).

    It is above 0: the largest error if fewer than 0.5 % of the pixels differ, and 1 if none does.
    """
    errors = error_map.detach().float().cpu().flatten()
    percentile = errors.kthvalue(max(1, round(0.995 * errors.numel()))).values.item()
    candidates = (percentile, errors.max().item(), 1.0)
    return next(value for value in candidates if value > 0)


def color_error_map(
    error_map: Tensor,
    *,
    size: tuple[int, int] | None = None,
    largest: float | None = None,
    image: Tensor | None = None,
    opacity: float = 0.6,
    bar: bool = True,
) -> Tensor:
    """Paint an error map: dark where no difference is visible, light where it is worst.

    Args:
        error_map: V, (B, 1, h, w), 0 = identical.
        size: height and width of the picture; None keeps those of `image`, or of the map.
        largest: the error painted in the lightest color, which must be the same for maps that are to be compared;
            None takes `map_scale`, so that small errors are visible too.
        image: a picture under the colors, (B, 3, H, W), in [0, 1]; None gives colors alone.
        opacity: opacity of the colors over `image`, in [0, 1].
        bar: whether to draw a color bar at the right, with errors written beside it where there is room.

    Returns:
        Pictures, (B, 3, H, W), in [0, 1], wider by the bar if there is one.

    Raises:
        ValueError: if `error_map` is not (B, 1, h, w), `largest` is not above 0 or `opacity` is outside [0, 1].
    """
    check_batch("error_map", error_map, 1)
    check_range("opacity", opacity, 0.0, 1.0)
    largest = map_scale(error_map) if largest is None else largest
    if not largest > 0:
        raise ValueError(f"Expected `largest` above 0, got {largest}.")
    size = size or (tuple(image.shape[2:]) if image is not None else tuple(error_map.shape[2:]))  # type: ignore[assignment]
    errors = F.interpolate(error_map.detach().float().cpu(), size=size, mode="bilinear", align_corners=False)
    colors = _look_up(errors / largest)
    if image is not None:
        colors = opacity * colors + (1 - opacity) * image.float().cpu()
    if not bar:
        return colors
    painted = color_bar(colors.shape[2], largest)
    return torch.cat([colors, painted.expand(colors.shape[0], -1, -1, -1)], dim=3)


def color_bar(height: int, largest: float) -> Tensor:
    """Return a bar of the colors from 0, at the bottom, to `largest`, at the top, with errors written beside it.

    It is a picture on white, (1, 3, height, W), in [0, 1]; a bar lower than 3 lines of text has no text.
    """
    ramp = torch.linspace(1, 0, height).reshape(1, 1, -1, 1)
    painted = _look_up(ramp.expand(1, 1, -1, BAR_WIDTH))
    bar = torch.cat([torch.ones(1, 3, height, BAR_GAP), painted], dim=3)
    if height < 3 * TEXT_HEIGHT:
        return bar
    steps = 4 if height >= 12 * TEXT_HEIGHT else 2
    labels = [f"{largest * step / steps:.3g}" for step in range(steps, -1, -1)]
    font = ImageFont.load_default()
    width = BAR_GAP + max(math.ceil(font.getlength(label)) for label in labels)
    page = Image.new("L", (width, height), 255)
    draw = ImageDraw.Draw(page)
    for step, label in enumerate(labels):
        top, bottom = font.getbbox(label)[1::2]
        line = step / steps * (height - 1) - (top + bottom) / 2
        draw.text((BAR_GAP // 2, min(max(line, -top), height - bottom)), label, fill=0, font=font)
    text = from_8bit(np.asarray(page)[..., None]).expand(1, 3, -1, -1)  # (1, 3, height, width)
    return torch.cat([bar, text], dim=3)


def _look_up(values: Tensor) -> Tensor:
    """Return the color, (B, 3, H, W), of each value in [0, 1], (B, 1, H, W)."""
    ramp = color_ramp()
    index = values.clamp(0, 1).mul(len(ramp) - 1).round().long()[:, 0]  # (B, H, W)
    return ramp[index].permute(0, 3, 1, 2)


def picture_grid(
    pictures: Mapping[str, Tensor],
    *,
    columns: int | None = None,
    width: float = 10.0,
    largest: float | None = None,
    shared_scale: bool = True,
) -> Figure:
    """Draw pictures under their titles: images as they are, maps in the colors of `color_error_map`, with a color bar.

    Args:
        pictures: by title; images, (1, 3, H, W), in [0, 1], and maps, (1, 1, h, w), such as masks and error maps.
        columns: pictures in a row; None puts all into one.
        width: of the figure in inches.
        largest: value of the maps that is painted in the lightest color, one for all of them; None takes `map_scale`.
        shared_scale: whether all maps have one scale and one color bar, or each its own, as maps of different things.

    Returns:
        A figure, which is not shown.

    Raises:
        ImportError: without matplotlib.
        ValueError: if there is no picture, or one is neither (1, 3, H, W) nor (1, 1, h, w).
    """
    for title, picture in pictures.items():
        if picture.ndim != 4 or picture.shape[0] != 1 or picture.shape[1] not in (1, 3):
            raise ValueError(
                f"Expected an image, (1, 3, H, W), or a map, (1, 1, h, w), as {title!r}, got {tuple(picture.shape)}."
            )
    if not pictures:
        raise ValueError("Expected pictures to draw, got none.")
    plt = import_extra("matplotlib.pyplot", "plots", "The figure")
    colors = import_extra("matplotlib.colors", "plots", "The figure").ListedColormap(color_ramp().numpy())
    maps = {title: picture.detach().float().cpu() for title, picture in pictures.items() if picture.shape[1] == 1}
    if maps and largest is None and shared_scale:
        largest = map_scale(torch.cat([each.flatten() for each in maps.values()]))
    columns = min(columns or len(pictures), len(pictures))
    rows = math.ceil(len(pictures) / columns)
    ratio = max(picture.shape[2] / picture.shape[3] for picture in pictures.values())
    figure = plt.figure(figsize=(width, rows * (width / columns * ratio + 0.3)), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, (title, picture) in zip(grid.flat, pictures.items(), strict=False):
        axes.set_title(title, fontsize=10)
        if title not in maps:
            axes.imshow(to_8bit(picture[0]))
            continue
        lightest = map_scale(maps[title]) if largest is None else largest
        painted = axes.imshow(maps[title][0, 0].numpy(), vmin=0, vmax=lightest, cmap=colors)
        if not shared_scale:
            figure.colorbar(painted, ax=axes, shrink=0.8)
    if maps and shared_scale:
        figure.colorbar(painted, ax=grid, shrink=0.8)
    return figure
