"""What Pillow leaves to its users of image files: 16-bit RGB, and metadata that fit an edited photo."""

from __future__ import annotations

import functools
import io
import os
import struct
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageCms, TiffTags
from PIL.PngImagePlugin import PngInfo, putchunk
from torch import Tensor

# Pillow's unpackers that keep the high bytes of 16-bit values, and those that keep the low ones of the same data
OTHER_BYTES = {f"{mode};16{order}": f"{mode};16{other}" for mode in ("RGB", "RGBA") for order, other in ("BL", "LB")}
OTHER_BYTES |= {f"{mode};16N": f"{mode};16{'B' if sys.byteorder == 'little' else 'L'}" for mode in ("RGB", "RGBA")}

# EXIF that stays true of a photo after it was edited: who took it of what and when, not how the file stores it
KEPT_TAGS = (
    "ImageDescription", "Make", "Model", "DateTime", "Artist", "HostComputer", "Copyright", "XPTitle", "XPComment",
    "XPAuthor", "XPKeywords", "XPSubject",
)  # fmt: skip
EXIF_IFD, GPS_IFD = ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo
FILE_TAGS = ("ExifInteroperabilityOffset", "MakerNote")  # which name places in the file
COMMENT_CODE = b"ASCII\0\0\0"  # begins a user comment
MAX_DPI = 65535  # of JPEG
LARGEST_EXIF = 65000  # bytes that a JPEG holds, with some to spare


def other_byte_order(tiles: Sequence[Any]) -> list[Any] | None:
    """Return Pillow's tiles of a 16-bit RGB or RGBA file such that the low bytes are decoded; None for other files."""
    changed = []
    for codec, extents, offset, arguments in tiles:
        several = not isinstance(arguments, str)
        mode = OTHER_BYTES.get(str(arguments[0] if several else arguments))
        if mode is None:
            return None
        changed.append((codec, extents, offset, (mode, *arguments[1:]) if several else mode))
    made = [type(tile)(*new) if hasattr(tile, "_fields") else new for tile, new in zip(tiles, changed, strict=True)]
    return made or None


@contextmanager
def without_libtiff_messages(picture: Image.Image) -> Iterator[None]:
    """Drop what libtiff says of a damaged TIFF, which it writes to the standard error of the whole process."""
    if picture.format != "TIFF" or sys.__stderr__ is None:  # closed, so that 2 may be any file, such as this one
        yield
        return
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _to_16bit(image: Tensor) -> np.ndarray:
    """Return an image, (C, H, W), in [0, 1], as whole numbers from 0 to 65535, (H, W, C) float32."""
    return image.detach().float().clamp(0, 1).mul(65535).round().movedim(0, -1).cpu().contiguous().numpy()


def tiff_of_16bit(image: Tensor, **options: Any) -> bytes:
    """Return an uncompressed TIFF of an image, (3 or 4, H, W), in [0, 1], in 16 bit.

    Pillow writes the bytes as a picture of 8 bit and twice the width, with `options`, those of its `save`; the width
    and the bits of a sample are then replaced.

    Source: TIFF 6.0, sections 2 (directory) and 8 (ImageWidth and BitsPerSample of baseline files).
    """
    values = _to_16bit(image)
    height, width, channels = values.shape
    halves = values.astype("<u2").view(np.uint8).reshape(height, 2 * width, channels)
    buffer = io.BytesIO()
    Image.fromarray(halves).save(buffer, format="TIFF", **options)  # the order of bytes is "little-endian"
    content = bytearray(buffer.getvalue())
    (directory,) = struct.unpack_from("<I", content, 4)
    (entries,) = struct.unpack_from("<H", content, directory)
    for place in range(directory + 2, directory + 2 + 12 * entries, 12):
        tag, _, _, value = struct.unpack_from("<HHII", content, place)
        if tag == ExifTags.Base.ImageWidth:
            struct.pack_into("<HII", content, place + 2, TiffTags.LONG, 1, width)
        elif tag == ExifTags.Base.BitsPerSample:
            struct.pack_into(f"<{channels}H", content, value, *[16] * channels)
    return bytes(content)


def png_of_16bit(image: Tensor, **options: Any) -> bytes:
    """Return a PNG of an image, (3 or 4, H, W), in [0, 1], in 16 bit.

    Pillow writes the file of a single pixel with `options`, those of its `save`, whose header and pixels are replaced.

    Source: PNG specification, third edition, sections 9.2 (filter "Up") and 11.2.
    """
    values = _to_16bit(image)
    height, width, channels = values.shape
    rows = values.astype(">u2").view(np.uint8).reshape(height, -1)
    above = np.diff(rows, axis=0, prepend=np.zeros_like(rows[:1]))  # modulo 256
    buffer, result = io.BytesIO(), io.BytesIO()
    Image.new("RGBA" if channels == 4 else "RGB", (1, 1)).save(buffer, format="PNG", **options)
    content = memoryview(buffer.getvalue())
    result.write(content[:8])
    place = 8
    while place < len(content):
        length, kind = struct.unpack_from(">I4s", content, place)
        data = bytes(content[place + 8 : place + 8 + length])
        if kind == b"IHDR":
            data = struct.pack(">IIB", width, height, 16) + data[9:]
        elif kind == b"IDAT":
            data = zlib.compress(np.insert(above, 0, 2, axis=1).tobytes())
        putchunk(result, kind, data)
        place += length + 12
    return result.getvalue()


def picture_dpi(picture: Image.Image) -> tuple[float, float] | None:
    """Return the pixels per inch that a picture's file names, across and down; None for none that make sense."""
    with suppress(TypeError, ValueError, ZeroDivisionError):
        across, down = map(float, picture.info.get("dpi", ()))
        if 1 < across <= MAX_DPI and 1 < down <= MAX_DPI:  # 1 stands for an unknown one
            return across, down
    return None


def picture_exif(picture: Image.Image) -> Image.Exif | None:
    """Return the part of a picture's EXIF that stays true of an edited photo, without its orientation and thumbnail."""
    kept = Image.Exif()
    with suppress(Exception):  # damaged metadata cost themselves alone
        found = picture.getexif()
        kept.update({tag: found[tag] for name in KEPT_TAGS if (tag := getattr(ExifTags.Base, name)) in found})
        left_out = {getattr(ExifTags.Base, name) for name in FILE_TAGS}
        for part in (EXIF_IFD, GPS_IFD):
            values = {tag: value for tag, value in found.get_ifd(part).items() if tag not in left_out}
            if values:
                kept[part] = values
        if kept and len(kept.tobytes()) <= LARGEST_EXIF:
            return kept
    return None


def saving_options(
    file_format: str,
    *,
    text: Mapping[str, str] | None,
    exif: Image.Exif | None,
    dpi: tuple[float, float] | None,
    profiled: bool,
    size: tuple[int, int],
) -> dict[str, Any]:
    """Return options of Pillow's `save` that store metadata, and the quality of JPEG.

    Args:
        file_format: Pillow's name of it.
        text: of the file, by keywords; "Software" among them.
        exif: of `picture_exif`.
        dpi: pixels per inch.
        profiled: whether to store the profile of sRGB.
        size: width and height of the image.
    """
    options: dict[str, Any] = {"quality": 95, "subsampling": 0} if file_format == "JPEG" else {}
    if dpi is not None:
        options["dpi"] = dpi
    if profiled and file_format != "BMP":
        options["icc_profile"] = srgb_profile()
    if text is not None and file_format == "PNG":
        options["pnginfo"] = PngInfo()
        for keyword, value in text.items():
            options["pnginfo"].add_text(keyword, value)
    if file_format != "BMP" and (exif is not None or (text is not None and file_format != "PNG")):
        options["exif"] = _exif_of(exif, None if file_format == "PNG" else text, size).tobytes()
    return options


def _exif_of(exif: Image.Exif | None, text: Mapping[str, str] | None, size: tuple[int, int]) -> Image.Exif:
    made = Image.Exif()
    made.update({} if exif is None else dict(exif))
    details = dict(made.get(EXIF_IFD, {}))
    if details:
        base = ExifTags.Base
        details |= {base.ExifImageWidth: size[0], base.ExifImageHeight: size[1], base.ColorSpace: 1}  # 1 is sRGB
    if text is not None:
        comment = "; ".join(f"{keyword}: {value}" for keyword, value in text.items() if keyword != "Software")
        made[ExifTags.Base.Software] = text.get("Software", "milo_latent")
        details[ExifTags.Base.UserComment] = COMMENT_CODE + comment.encode("ascii", "backslashreplace")
    if details:
        made[EXIF_IFD] = details
    return made


@functools.cache
def srgb_profile() -> bytes:
    """Return the ICC profile of sRGB, the same bytes at every time."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile[24:36] = struct.pack(">6H", 2000, 1, 1, 0, 0, 0)  # its date
    return bytes(profile)
