"""Pictures of any mode and colour profile as sRGB."""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageChops, ImageCms

GREY_MODES = ("1", "L", "LA")


def picture_to_array(picture: Image.Image) -> np.ndarray:
    """Turn a picture of any mode into sRGB, (H, W, 3) float32, in [0, 1]; 16-bit greys keep their precision.

    An embedded colour profile is applied, as viewers do, since what is written holds none; that of 16 bit is left out,
    with a warning.

    Raises:
        TypeError: for floating point, whose range is unknown.
    """
    if picture.mode.startswith("I;16") or picture.mode == "I":
        if picture.info.get("icc_profile"):
            warnings.warn("The picture's colour profile was left out, since it has 16 bit.", stacklevel=2)
        grey = np.asarray(picture).astype(np.float32) / 65535.0
        return np.repeat(grey[..., None], 3, axis=2).clip(0.0, 1.0)
    if picture.mode == "F":
        raise TypeError("Expected a picture of 8 or 16 bit, got 32-bit floating point. Save it as 16-bit PNG.")
    return np.asarray(_in_srgb(picture).convert("RGB")).astype(np.float32) / 255.0


def _in_srgb(picture: Image.Image) -> Image.Image:
    """Return a picture whose colours are sRGB's, by its colour profile; as it is where it has none."""
    profile = picture.info.get("icc_profile")
    if not profile:
        return picture
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        grey = picture.mode in GREY_MODES
        if picture.mode != "CMYK":
            picture = picture.convert("L" if grey and source.profile.xcolor_space.strip() == "GRAY" else "RGB")
        converted = ImageCms.profileToProfile(picture, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, ImportError, OSError, ValueError) as error:
        warnings.warn(f"The picture's colour profile was left out, since it cannot be applied: {error}", stacklevel=2)
        return picture
    assert converted is not None  # not in place
    if grey:
        return converted.convert("L")  # exactly
    if picture.mode == "RGB" and np.max(ImageChops.difference(picture, converted).getextrema()) <= 1:
        return picture  # a profile of sRGB, of whatever name: spares the rounding
    return converted
