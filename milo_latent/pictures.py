"""What every other module does to pixels: 8 bit and back, cropping, blurring, codecs, sRGB from any picture."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageChops, ImageCms
from torch import Tensor
from torch.nn import functional as F

LUMA = (0.299, 0.587, 0.114)  # of R, G and B in the luma of ITU-R BT.601, as Pillow converts to gray
GRAY_MODES = ("1", "L", "LA")


def to_8bit(image: Tensor) -> np.ndarray:
    """Round images, (C, H, W) or (B, C, H, W), clipped to [0, 1], to 8 bit: (H, W, C) or (B, H, W, C) uint8."""
    pixels = image.detach().float().clamp(0, 1).mul(255).round().to(torch.uint8)
    return np.ascontiguousarray(pixels.movedim(-3, -1).cpu().numpy())


def from_8bit(pixels: np.ndarray) -> Tensor:
    """Return 8-bit pixels, (H, W, C) or (B, H, W, C), as float32 images, (C, H, W) or (B, C, H, W), in [0, 1]."""
    return torch.from_numpy(np.array(pixels)).movedim(-1, -3).float().div(255).contiguous()


def round_to_8bit(image: Tensor) -> Tensor:
    """Clip values to [0, 1] and round them to multiples of 1/255, as writing and reading an 8-bit file does."""
    return image.clamp(0, 1).mul(255).round().div(255)


def center_crop(image: Tensor, side: int | None = None) -> Tensor:
    """Return the middle of an image, (..., H, W), as a view of it.

    `side` is the most that is kept of H and of W; None keeps the largest square.
    """
    side = min(image.shape[-2:]) if side is None else side
    top, left = (max(length - side, 0) // 2 for length in image.shape[-2:])
    return image[..., top : top + side, left : left + side]


def gaussian_blur(image: Tensor, sigma: float | Tensor, *, radius: int | None = None) -> Tensor:
    """Blur every channel by a Gaussian; the border is repeated.

    Args:
        image: (C, H, W) or (B, C, H, W).
        sigma: standard deviation in pixels, one for all images or (B,).
        radius: pixels at which the kernel is cut; None cuts it at three standard deviations, which needs one `sigma`.

    Returns:
        Blurred images, of the shape of `image`.
    """
    radius = max(1, int(3 * float(sigma) + 0.5)) if radius is None else radius
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float32, device=image.device)
    spread = torch.as_tensor(sigma, dtype=torch.float32, device=image.device).reshape(-1, 1)
    kernel = torch.exp(-0.5 * (offsets / spread) ** 2)
    kernel = (kernel / kernel.sum(dim=1, keepdim=True)).to(image.dtype)
    flat = image.reshape(1, -1, *image.shape[-2:])  # (1, B * C, H, W)
    kernel = kernel.repeat_interleave(flat.shape[1] // len(kernel), dim=0)  # (B * C, 2 * radius + 1)
    padded = F.pad(flat, (radius,) * 4, mode="replicate")
    rows = F.conv2d(padded, kernel[:, None, None, :], groups=len(kernel))
    return F.conv2d(rows, kernel[:, None, :, None], groups=len(kernel)).view(image.shape)


def codec_round_trip(image: Tensor, **options: Any) -> Tensor:
    """Write images, (3, H, W) or (B, 3, H, W), in [0, 1], to memory and read them back, float32 of the same shape.

    They are rounded to 8 bit first; `options` are those of Pillow's `Image.save`, such as `format`.
    """
    if image.ndim == 4:
        return torch.stack([codec_round_trip(each, **options) for each in image])
    buffer = io.BytesIO()
    Image.fromarray(to_8bit(image)).save(buffer, **options)
    with Image.open(buffer) as picture:
        return from_8bit(np.asarray(picture.convert("RGB")))


def jpeg_round_trip(image: Tensor, quality: int) -> Tensor:
    """Write and read images, (3, H, W) or (B, 3, H, W), in [0, 1], as JPEG of Pillow's `quality`, 1 to 95."""
    return codec_round_trip(image, format="JPEG", quality=quality)


def picture_to_tensor(picture: Image.Image) -> Tensor:
    """Convert a picture of any mode to sRGB, (3, H, W) float32, in [0, 1]; 16-bit gray keeps its precision.

    An embedded color profile is applied, as viewers do, since written files hold none. The profile of a 16-bit picture
    is ignored with a warning.

    Raises:
        TypeError: if the picture is in floating point, whose range is unknown.
    """
    if picture.mode.startswith("I;16") or picture.mode == "I":
        if picture.info.get("icc_profile"):
            warnings.warn("The color profile of this 16-bit picture is ignored.", stacklevel=2)
        gray = torch.from_numpy(np.asarray(picture).astype(np.float32) / 65535.0)
        return gray.clamp(0, 1).repeat(3, 1, 1)
    if picture.mode == "F":
        raise TypeError("Expected a picture of 8 or 16 bit, got 32-bit floating point. Save it as 16-bit PNG.")
    return from_8bit(np.asarray(_in_srgb(picture).convert("RGB")))


def _in_srgb(picture: Image.Image) -> Image.Image:
    """Convert the colors of a picture from its profile to sRGB; a picture without profile is returned as it is."""
    profile = picture.info.get("icc_profile")
    if not profile:
        return picture
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        gray = picture.mode in GRAY_MODES
        if picture.mode != "CMYK":
            picture = picture.convert("L" if gray and source.profile.xcolor_space.strip() == "GRAY" else "RGB")
        converted = ImageCms.profileToProfile(picture, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, ImportError, OSError, ValueError) as error:
        warnings.warn(f"This picture's color profile is ignored, since it cannot be applied: {error}", stacklevel=2)
        return picture
    assert converted is not None  # not in place
    if gray:
        return converted.convert("L")  # the three channels may differ by a rounding
    if picture.mode == "RGB" and np.max(ImageChops.difference(picture, converted).getextrema()) <= 1:
        return picture  # the profile is that of sRGB, whatever its name; this avoids rounding twice
    return converted
