"""Stage 1: what its networks, the cleaners, have in common, and their use: enlarge, pad, clean, crop, resize."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from diffusers import ConfigMixin, ModelMixin
from torch import Tensor, nn

from milo_latent.checks import check_batch
from milo_latent.diffbir.rules import DEFAULT, Rules, resize
from milo_latent.diffbir.tiles import Tile
from milo_latent.latents.codec import working_device


class Cleaner(ModelMixin, ConfigMixin):
    """A network from images to images, and how the official pipeline treats the images that it is given."""

    scale: int = 1  # how many times larger the result is than the image
    multiple: int = 1  # pixels to whose multiples the cleaner pads; tiles that start there see the same windows
    short_side: ClassVar[int] = 512  # of its results at least: stage 2 was trained there, and does poorly on less
    enlarge_first: ClassVar[bool] = False  # whether smaller images are enlarged to it before they are cleaned
    outer_multiple: ClassVar[int] = 1  # to which the pipeline pads images, other than the cleaner itself


def channels_last(image: Tensor) -> Tensor:
    """Lay (B, C, H, W) out with channels last, as convolutions then keep it, which makes them 4 to 10 % faster."""
    return image.contiguous(memory_format=torch.channels_last)


def clean_image(
    cleaner: nn.Module,
    image: Tensor,
    *,
    output_size: tuple[int, int] | None = None,
    tile: Tile | None = None,
    rules: Rules = DEFAULT,
) -> Tensor:
    """Run stage 1 as the official pipeline does for SwinIR, SCUNet and BSRNet, and plainly for any other cleaner.

    A cleaner that keeps the size sees the image at `output_size`; one that enlarges sees the image itself, and its
    result is resized. For the three official cleaners a result whose short side is below 512 is enlarged to it, since
    stage 2 was trained there: the final image is what goes back to `output_size`.

    Args:
        cleaner: any module from images (B, 3, H, W), in [0, 1], to images; `scale` says how much larger, 1 without it.
        image: degraded image, (B, 3, H, W), in [0, 1], of any size.
        output_size: height and width of the restored image; None means those of `image` times the cleaner's scale.
        tile: size of the tiles that the image is cleaned in; None cleans it whole.
        rules: of compatibility.

    Returns:
        Cleaned image, (B, 3, H', W') float32; in [0, 1] where the rules clip it.

    Raises:
        TypeError: if `image` is not floating point.
        ValueError: if it is not (B, 3, H, W), or the cleaner returns another size than its scale says.

    Source: `apply_cleaner` of the three pipelines in DiffBIR's diffbir/pipeline.py.
    """
    check_batch("image", image, 3)
    scale, short_side = int(getattr(cleaner, "scale", 1)), getattr(cleaner, "short_side", 0)
    size = output_size or (image.shape[2] * scale, image.shape[3] * scale)
    if scale == 1 and size != tuple(image.shape[2:]):
        image = rules.enlarge(image, size)
    tiles = rules.tiles(tile, image.shape[2:], multiple=getattr(cleaner, "multiple", 1))
    if getattr(cleaner, "enlarge_first", False) and (tiles is None or rules.enlarges_tiled_first):
        image = enlarge_short_side(image, short_side)
    cleaned = _run(cleaner, image, scale, tiles, rules)
    if scale != 1:
        cleaned = resize(cleaned, size if min(size) >= short_side else short_side_size(cleaned, short_side))
    cleaned = enlarge_short_side(cleaned, short_side)
    return cleaned.clamp(0, 1) if rules.clips else cleaned


def _run(cleaner: nn.Module, image: Tensor, scale: int, tiles: Callable[..., Tensor] | None, rules: Rules) -> Tensor:
    """Return the cleaner's result without padding, (B, 3, scale * H, scale * W) float32."""
    height, width = image.shape[2:]
    parameter = next(cleaner.parameters(), image)
    padded = image.to(device=working_device(parameter.device, image), dtype=parameter.dtype)
    if tiles is None:
        padded = rules.pad(padded, getattr(cleaner, "outer_multiple", 1))
    cleaned = cleaner(padded) if tiles is None else tiles(cleaner, padded, scale=scale)
    expected = (padded.shape[2] * scale, padded.shape[3] * scale)
    if tuple(cleaned.shape[2:]) != expected:
        raise ValueError(
            f"Expected {expected} pixels from a cleaner of scale {scale} for {tuple(padded.shape[2:])}, got "
            f"{tuple(cleaned.shape[2:])}. Give the cleaner a `scale`, such as `cleaner.scale = 4`."
        )
    return cleaned[..., : scale * height, : scale * width].float()


def short_side_size(image: Tensor, short_side: int) -> tuple[int, int]:
    """Return height and width of `image`, (B, 3, H, W), when its short side becomes `short_side`; cut, not rounded."""
    height, width = image.shape[2:]
    if height == width:
        return short_side, short_side
    if height < width:
        return short_side, int(width * (short_side / height))
    return int(height * (short_side / width)), short_side


def enlarge_short_side(image: Tensor, short_side: int) -> Tensor:
    """Resize (B, 3, H, W) so that its short side is `short_side`, if it is less."""
    return resize(image, short_side_size(image, short_side)) if min(image.shape[2:]) < short_side else image
