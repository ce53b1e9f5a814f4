"""Stage 1 around its network: enlarge, pad, clean (in tiles), crop, resize; pure functions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from milo_latent.checks import check_batch
from milo_latent.diffbir.bsrnet import BSRNet
from milo_latent.diffbir.scunet import SCUNet
from milo_latent.diffbir.swinir import SwinIR

SHORT_SIDE = 512  # the official stage 2 was trained on 512x512 pixels, and does poorly on less


@dataclass(frozen=True)
class Rule:
    """How the official pipeline treats images around a cleaner.

    Args:
        short_side: the least short side of the result; 0 means any.
        enlarge_first: whether a smaller image is enlarged before it is cleaned, not after.
        black_multiple: of pixels, to which the official code pads in black; 0 means that the cleaner pads by itself.
    """

    short_side: int = 0
    enlarge_first: bool = False
    black_multiple: int = 0


RULES: dict[type[nn.Module], Rule] = {
    SwinIR: Rule(SHORT_SIDE, enlarge_first=True, black_multiple=64),
    SCUNet: Rule(SHORT_SIDE),
    BSRNet: Rule(SHORT_SIDE),
}
ANY_CLEANER = Rule()


def clean_image(
    cleaner: nn.Module,
    image: Tensor,
    *,
    output_size: tuple[int, int] | None = None,
    tiles: Callable[..., Tensor] | None = None,
    official: bool = False,
) -> Tensor:
    """Run stage 1 as the official pipeline does for SwinIR, SCUNet and BSRNet, and plainly for any other cleaner.

    A cleaner that keeps the size sees the image at `output_size`; one that enlarges sees the image itself, and its
    result is resized. For the three official cleaners a result whose short side is below 512 is enlarged to it, since
    stage 2 was trained there: the final image is what goes back to `output_size`.

    Args:
        cleaner: any module from images (B, 3, H, W), in [0, 1], to images; `scale` says how much larger, 1 without it.
        image: degraded image, (B, 3, H, W), in [0, 1], of any size.
        output_size: height and width of the restored image; None means those of `image` times the cleaner's scale.
        tiles: called as `tiles(function, image, scale=..., multiple=...)`, such as
            `functools.partial(tiled, tile=512, overlap=128)`; None cleans the image whole. `multiple` is the
            cleaner's: where tiles start elsewhere, attention sees other windows, and the result is another.
        official: do as the official code where it does worse: resize 8-bit values first, pad in black, clip nothing,
            for SwinIR in tiles enlarge last, and call `tiles` without `multiple`.

    Returns:
        Cleaned image, (B, 3, H', W') float32; in [0, 1] unless `official`.

    Raises:
        TypeError: if `image` is not floating point.
        ValueError: if it is not (B, 3, H, W), or the cleaner returns another size than its scale says.

    Source: `apply_cleaner` of the three pipelines in DiffBIR's diffbir/pipeline.py.
    """
    check_batch("image", image, 3)
    plain = getattr(cleaner, "_orig_mod", cleaner)  # `torch.compile` wraps modules
    rule = RULES.get(type(plain), ANY_CLEANER)
    scale = int(getattr(cleaner, "scale", 1))
    size = output_size or (image.shape[2] * scale, image.shape[3] * scale)
    if scale == 1 and size != tuple(image.shape[2:]):
        image = resize_8bit(image, size) if official else resize(image, size).clamp(0, 1)
    if rule.enlarge_first and not (official and tiles):
        image = enlarge_short_side(image, rule.short_side)
    # by itself a cleaner repeats the border
    black_multiple = rule.black_multiple if official and tiles is None else 0
    if tiles is not None and not official:
        tiles = functools.partial(tiles, multiple=getattr(cleaner, "multiple", 1))
    cleaned = _run(cleaner, image, scale, tiles, black_multiple)
    if min(size) >= rule.short_side and scale != 1:
        cleaned = resize(cleaned, size)
    elif scale != 1:
        cleaned = resize(cleaned, short_side_size(cleaned, rule.short_side))
    cleaned = enlarge_short_side(cleaned, rule.short_side)
    return cleaned if official else cleaned.clamp(0, 1)


def _run(
    cleaner: nn.Module, image: Tensor, scale: int, tiles: Callable[..., Tensor] | None, black_multiple: int
) -> Tensor:
    """Return the cleaner's result without padding, (B, 3, scale * H, scale * W) float32."""
    height, width = image.shape[2:]
    parameter = next(cleaner.parameters(), image)
    padded = image.to(device=_device(image, parameter), dtype=parameter.dtype)
    if black_multiple:
        padded = pad_black(padded, black_multiple)
    cleaned = cleaner(padded) if tiles is None else tiles(cleaner, padded, scale=scale)
    expected = (padded.shape[2] * scale, padded.shape[3] * scale)
    if tuple(cleaned.shape[2:]) != expected:
        raise ValueError(
            f"Expected {expected} pixels from a cleaner of scale {scale} for {tuple(padded.shape[2:])}, got "
            f"{tuple(cleaned.shape[2:])}. Give the cleaner a `scale`, such as `cleaner.scale = 4`."
        )
    return cleaned[..., : scale * height, : scale * width].float()


def _device(image: Tensor, parameter: Tensor) -> torch.device:
    """Where to clean: an offloaded cleaner waits on the CPU and follows its input."""
    return parameter.device if image.device.type == "cpu" else image.device


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize (B, 3, H, W) to `size`, height and width: bicubic, antialiased where it shrinks; may leave [0, 1]."""
    if tuple(image.shape[2:]) == tuple(size):
        return image
    return F.interpolate(image, size=size, mode="bicubic", antialias=True, align_corners=False)


def resize_8bit(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize (B, 3, H, W), in [0, 1], in 8 bit by Pillow's bicubic filter, as the official command line does."""
    pixels = image.detach().float().mul(255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    pictures = [PIL.Image.fromarray(each).resize((size[1], size[0]), PIL.Image.Resampling.BICUBIC) for each in pixels]
    resized = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2)
    return resized.to(device=image.device, dtype=image.dtype) / 255


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


def pad_black(image: Tensor, multiple: int) -> Tensor:
    """Pad (B, 3, H, W) with zeros at the bottom and right to multiples, as the official code does."""
    height, width = image.shape[2:]
    return F.pad(image, (0, -width % multiple, 0, -height % multiple))
