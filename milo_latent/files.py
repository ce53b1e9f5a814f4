"""Read and write images, latents and text; a file is written completely or not at all."""

from __future__ import annotations

import io
import json
import math
import re
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from milo_latent.atomic import check_output_folder, write_atomically, write_bytes
from milo_latent.checks import check_file, check_finite, shortened
from milo_latent.photo_formats import (
    other_byte_order,
    picture_dpi,
    picture_exif,
    png_of_16bit,
    saving_options,
    tiff_of_16bit,
    without_libtiff_messages,
)
from milo_latent.pictures import from_8bit, picture_to_tensor, to_8bit
from milo_latent.structure import DTYPES, open_safetensors, refusing_damage

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"})
LATENT_SUFFIXES = frozenset({".npy", ".safetensors"})
ALPHA_SUFFIXES = frozenset({".png", ".webp", ".tif", ".tiff"})
EXIF_SUFFIXES = IMAGE_SUFFIXES - {".bmp"}
WRITERS_OF_16BIT = {".png": png_of_16bit, ".tif": tiff_of_16bit, ".tiff": tiff_of_16bit}
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")  # the decoders that a file may choose, those of `IMAGE_SUFFIXES`
NPY_HEADER = re.compile(  # of a plain array of floating point, as numpy writes it
    rb"\x93NUMPY[\1-\3]\0(?P<length>..|....)(?P<header>\{'descr': '(?P<kind>[<>]f[248])', "
    rb"'fortran_order': (?P<fortran>True|False), 'shape': \((?P<shape>(?:\d{1,9},? ?)*)\), \} *\n)",
    re.DOTALL,
)
_READING = threading.Lock()  # around what changes which warnings the whole process shows
MAX_PIXELS = 128 * 1024 * 1024  # admits photos of 100 megapixels, refuses decompression bombs


def read_image(path: str | Path) -> Tensor:
    """Read an image as sRGB, with its orientation and color profile applied and without its transparency.

    Args:
        path: an image file.

    Returns:
        Image, (1, 3, H, W) float32, in [0, 1].

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is no image, is truncated, or has more than `MAX_PIXELS`.
    """
    return read_photo(path)[0]


def read_photo(path: str | Path, *, max_pixels: int | None = None) -> tuple[Tensor, Tensor | None]:
    """Read an image as `read_image` does, and its transparency; the file is decoded once.

    Larger images than `max_pixels`, `MAX_PIXELS` for None, are refused before they are decoded.

    Returns:
        Image, (1, 3, H, W), and alpha, (1, 1, H, W), both float32, in [0, 1]; alpha is None if the image is opaque.
    """
    photo = open_photo(path, max_pixels=max_pixels)
    return photo.image, photo.alpha


@dataclass(frozen=True)
class Photo:
    """An image file as it was read, with what a file made of it keeps.

    Args:
        image: sRGB, (1, 3, H, W) float32, in [0, 1].
        alpha: transparency, (1, 1, H, W) float32, in [0, 1]; None if the image is opaque.
        depth: 8 or 16, the bits of a value.
        profiled: whether the file named the profile of its colors, which were converted to sRGB.
        dpi: horizontal and vertical pixels per inch; None if the file names none.
        exif: what `picture_exif` kept of its EXIF; None if there is none.
        lost: what of the file was not read.
    """

    image: Tensor
    alpha: Tensor | None
    depth: int
    profiled: bool
    dpi: tuple[float, float] | None
    exif: Image.Exif | None
    lost: tuple[str, ...]

    def lost_in(self, path: Path) -> list[str]:
        """Return what of the photo is missing in a file at `path`, as words."""
        suffix = path.suffix.lower()
        lost = {
            f"transparency, which {suffix} cannot hold": self.alpha is not None and suffix not in ALPHA_SUFFIXES,
            f"16 bit, which {suffix} cannot hold": self.depth == 16 and suffix not in WRITERS_OF_16BIT,
            f"EXIF, which {suffix} cannot hold": self.exif is not None and suffix not in EXIF_SUFFIXES,
        }
        return [*self.lost, *(what for what, is_lost in lost.items() if is_lost)]


def open_photo(path: str | Path, *, max_pixels: int | None = None) -> Photo:
    """Read an image as `read_photo` does, in its depth, with what a file made of it keeps.

    Of 16-bit RGB, Pillow decodes one of the two bytes of a value; the other is decoded by the unpacker of the other
    byte order. The profile of a 16-bit picture is applied in 8 bit, which is told, unless it is that of sRGB.
    """
    path = Path(path)
    opened = _open(path, MAX_PIXELS if max_pixels is None else max_pixels)
    picture, low = opened.picture, opened.low
    try:
        image = picture_to_tensor(picture)  # (3, H, W)
    except TypeError as error:
        raise ValueError(f"{error} It is {path}.") from error
    lost = [f"{opened.frames - 1} further pages or frames"] if opened.frames > 1 else []
    alpha = from_8bit(np.asarray(picture.convert("RGBA"))[..., 3:]) if picture.has_transparency_data else None
    deep = picture.mode.startswith("I")
    if low is not None:
        high = np.asarray(picture)
        deep = np.array_equal(high[..., :3], to_8bit(image))  # no profile has changed it
        if deep:
            values = torch.from_numpy(high * np.float32(256) + low).movedim(-1, 0) / 65535  # (3 or 4, H, W)
            image, alpha = values[:3].contiguous(), None if len(values) == 3 else values[3:].contiguous()
        else:
            lost.append("16 bit, since its color profile is applied in 8 bit")
    return Photo(
        image[None],
        None if alpha is None or alpha.min() == 1 else alpha[None],
        depth=16 if deep else 8,
        profiled=bool(picture.info.get("icc_profile")),
        dpi=picture_dpi(picture),
        exif=opened.exif,
        lost=tuple(lost),
    )


@dataclass(frozen=True)
class _Opened:
    """A picture, turned upright, and what its file says besides."""

    picture: Image.Image
    frames: int
    exif: Image.Exif | None
    low: np.ndarray | None  # the low bytes of 16-bit RGB or RGBA


def _open(path: Path, max_pixels: int) -> _Opened:
    check_file(path, "an image file")
    expected = f"Expected a complete image ({', '.join(FORMATS)}), got {path}, which is damaged or another file"
    with _READING, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow's limit of pixels, since ours is below, and of damaged metadata
        with refusing_damage(expected):
            image = Image.open(path, formats=FORMATS)
        with image:
            if image.width * image.height > max_pixels:
                size = f"{image.width}x{image.height}"
                raise ValueError(f"Expected at most {max_pixels} pixels, got {size} in {path}. Crop or shrink it.")
            with refusing_damage(expected), without_libtiff_messages(image):
                frames, other = getattr(image, "n_frames", 1), other_byte_order(image.tile)
                image.load()
                upright = ImageOps.exif_transpose(image)
                low = None if other is None else _decode(path, other)
                return _Opened(upright, frames, picture_exif(image), low)


def _decode(path: Path, tiles: list[Any]) -> np.ndarray:
    """Return the pixels of an image, turned upright, that these tiles decode."""
    with Image.open(path, formats=FORMATS) as image:
        image.tile = tiles
        image.load()
        return np.asarray(ImageOps.exif_transpose(image))


def check_output(path: Path, suffixes: frozenset[str]) -> None:
    """Raise unless a file can be written to `path`; call it before the content is computed.

    Raises:
        FileNotFoundError: if its folder does not exist.
        ValueError: if its suffix is none of `suffixes`.
    """
    _check_suffix(path, suffixes)
    check_output_folder(path)


def _check_suffix(path: Path, suffixes: frozenset[str]) -> None:
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"Expected a file name that ends in one of {sorted(suffixes)}, got {path.name!r}.")


def write_image(
    path: str | Path,
    image: Tensor,
    *,
    alpha: Tensor | None = None,
    text: Mapping[str, str] | None = None,
    like: Photo | None = None,
) -> None:
    """Write an image, rounded to 8 bit, or to 16 where `like` has them and the file is a PNG or a TIFF.

    Args:
        path: the file to write; its suffix chooses the format.
        image: sRGB, (1, 3, H, W) or (3, H, W), in [0, 1]; values outside are clipped.
        alpha: transparency, (1, 1, H, W), in [0, 1]; only PNG, WebP and TIFF can store it.
        text: what the file is to say of itself, by keywords, such as "Software"; PNG stores it as text, JPEG, WebP and
            TIFF store the software as such and all else as EXIF's user comment.
        like: the photo that the image was made of, whose EXIF, resolution and depth it takes, and whose profile is
            replaced by that of sRGB.

    Raises:
        ValueError: if the suffix is unknown or cannot store `alpha` or `text`, or `image` is not one image of finite
            values.
        OSError: if the file cannot be written, as `write_atomically`.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    check_output(path, IMAGE_SUFFIXES)
    if alpha is not None and suffix not in ALPHA_SUFFIXES:
        raise ValueError(f"{path.name} cannot hold transparency. Choose one of {sorted(ALPHA_SUFFIXES)}.")
    if text is not None and suffix not in EXIF_SUFFIXES:
        raise ValueError(f"{path.name} cannot hold text. Choose one of {sorted(EXIF_SUFFIXES)}.")
    if image.ndim == 4 and image.shape[0] == 1:
        image = image[0]
    if image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"Expected one image, (3, H, W), got {tuple(image.shape)}.")
    check_finite(f"image for {path}", image)
    if alpha is not None:
        image = torch.cat([image, alpha[0].to(image)])
    file_format = Image.registered_extensions()[suffix]
    options = saving_options(
        file_format, text=text, exif=like.exif if like else None, dpi=like.dpi if like else None,
        profiled=like is not None and like.profiled, size=(image.shape[2], image.shape[1]),
    )  # fmt: skip
    if like is not None and like.depth == 16 and suffix in WRITERS_OF_16BIT:
        write_bytes(path, WRITERS_OF_16BIT[suffix](image, **options))
        return
    picture = Image.fromarray(to_8bit(image))
    write_atomically(path, lambda partial: picture.save(partial, format=file_format, **options))


def read_latents(path: str | Path) -> Tensor:
    """Read scaled latents from `.npy` or `.safetensors`.

    Args:
        path: `.npy`, or `.safetensors` with an entry `latents`; (C, h, w) or (B, C, h, w).

    Returns:
        Latents, (B, C, h, w) float32.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, holds pickled objects, or holds no latents.
    """
    path = Path(path)
    check_file(path, "a file of latents")
    _check_suffix(path, LATENT_SUFFIXES)
    latents = _read_npy(path) if path.suffix.lower() == ".npy" else _read_safetensors(path)
    if latents.ndim == 3:
        latents = latents[None]
    if latents.ndim != 4 or not latents.is_floating_point() or 0 in latents.shape:
        raise ValueError(
            f"Expected latents (C, h, w) or (B, C, h, w), floating point, in {path}, "
            f"got {tuple(latents.shape)} {latents.dtype}."
        )
    return latents.float()


def _read_npy(path: Path) -> Tensor:
    """Read a plain array. Numpy's own reader evaluates the header, and allocates whatever that asks for."""
    with path.open("rb") as file:
        found = NPY_HEADER.match(file.read(1024))
    if found is None or int.from_bytes(found["length"], "little") != len(found["header"]):
        raise ValueError(f"Expected a plain array of floating point in {path}. Pickled objects are never read.")
    shape, kind = tuple(map(int, re.findall(rb"\d+", found["shape"]))), np.dtype(found["kind"].decode())
    size, expected = path.stat().st_size, found.end() + math.prod(shape) * kind.itemsize
    if size != expected:
        raise ValueError(f"Expected {expected} bytes for a plain array {shape} in {path}, got {size}. Is it whole?")
    array = np.fromfile(path, kind, offset=found.end()).reshape(
        shape, order="F" if found["fortran"] == b"True" else "C"
    )
    return torch.from_numpy(np.ascontiguousarray(array, kind.newbyteorder("=")))


def _read_safetensors(path: Path) -> Tensor:
    with open_safetensors(path) as file:
        if "latents" not in file.keys():  # noqa: SIM118 (safe_open is no mapping)
            raise ValueError(f"Expected an entry `latents` in {path}, got {shortened(sorted(file.keys()))}.")
        return file.get_tensor("latents")


def read_latents_metadata(path: str | Path) -> dict[str, str]:
    """Read the metadata of a file of latents, such as `vae`, `scaling_factor` and `source_size`; `.npy` has none.

    Raises:
        ValueError: if the file is damaged.
    """
    if Path(path).suffix.lower() != ".safetensors":
        return {}
    with open_safetensors(path) as file:
        return dict(file.metadata() or {})


def write_latents(path: str | Path, latents: Tensor, *, metadata: dict[str, str] | None = None) -> None:
    """Write scaled latents in float32.

    Args:
        path: `.npy` or `.safetensors`.
        latents: (B, C, h, w) or (C, h, w); `.npy` stores a batch of one without its batch axis.
        metadata: stored in `.safetensors`; `.npy` cannot store any.

    Raises:
        ValueError: if the suffix is another, or values are not finite.
        OSError: if the file cannot be written, as `write_atomically`.
    """
    path = Path(path)
    check_output(path, LATENT_SUFFIXES)
    check_finite(f"latents for {path}", latents)
    array = latents.detach().float().cpu().contiguous()
    if path.suffix.lower() == ".safetensors":
        write_safetensors(path, {"latents": array}, metadata=metadata)
    else:
        buffer = io.BytesIO()
        np.save(buffer, (array[0] if array.ndim == 4 and array.shape[0] == 1 else array).numpy(), allow_pickle=False)
        write_bytes(path, buffer.getvalue())


def write_safetensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file, completely or not at all; the same content gives the same bytes.

    The library's own `save_file` needs all tensors in memory, in the file's dtype and contiguous; this needs one. It
    also shuffles the metadata.

    Args:
        path: the file.
        tensors: tensors by name.
        dtype: of the floating-point tensors in the file; None keeps theirs.
        metadata: texts by name; None stores only that PyTorch wrote the file.

    Raises:
        OSError: if the disk is full; nothing is left behind.

    Source: the safetensors format: length of the header (8 bytes, little endian), header in JSON, values.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"} if metadata is None else dict(metadata)}
    end = 0
    for name, tensor in tensors.items():
        kind = stored_dtype(tensor, dtype)
        start, end = end, end + tensor.numel() * kind.itemsize
        header[name] = {"dtype": DTYPES[kind], "shape": list(tensor.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # values begin aligned

    def write(partial: Path) -> None:
        with partial.open("wb") as file:
            file.write(len(encoded).to_bytes(8, "little") + encoded)
            for tensor in tensors.values():
                values = tensor.detach().to("cpu", stored_dtype(tensor, dtype)).contiguous()
                file.write(values.reshape(-1).view(torch.uint8).numpy().data)  # `tofile` would not say what failed

    write_atomically(path, write)


def stored_dtype(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """Return the dtype in which a tensor is stored: that of floating-point ones is `dtype`, unless that is None."""
    return dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype


def list_files(folder: Path, suffixes: frozenset[str]) -> list[Path]:
    """Return the files of a folder with one of `suffixes`, by name, but hidden ones such as macOS's `._photo.jpg`.

    Raises:
        FileNotFoundError: if `folder` is none, or holds no such file.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"Expected a folder, got {folder}, which is not a folder.")
    paths = [path for path in folder.iterdir() if path.suffix.lower() in suffixes and not is_hidden(Path(path.name))]
    if not paths:
        raise FileNotFoundError(f"Expected files of {sorted(suffixes)} in {folder}, found none.")
    return sorted(paths)


def is_hidden(path: Path) -> bool:
    """Return whether a file, or one of the folders in its relative path, is hidden, such as macOS's `._photo.jpg`."""
    return any(part.startswith(".") for part in path.parts)


def list_named_files(folder: Path, suffixes: frozenset[str]) -> tuple[dict[str, Path], dict[Path, str]]:
    """Return the files of `list_files` by their names without suffix, by which results are named.

    Files that share a name are left out, since no result could tell which of them it is of; they are the keys of the
    second dictionary, with an error for each.
    """
    sharing: dict[str, list[Path]] = {}
    for path in list_files(folder, suffixes):
        sharing.setdefault(path.stem, []).append(path)
    reason = f"expected each name once in {folder}, whatever its suffix, since results are named so. Rename it."
    refused = {path: f"{path.name}: {reason}" for paths in sharing.values() for path in paths if len(paths) > 1}
    return {name: paths[0] for name, paths in sharing.items() if len(paths) == 1}, refused


def list_unique_files(folder: Path, suffixes: frozenset[str]) -> list[Path]:
    """Return the files of `list_files`, or raise ValueError if two have one name but for the suffix."""
    named, refused = list_named_files(folder, suffixes)
    for reason in refused.values():
        raise ValueError(reason)
    return list(named.values())


def files_failed(summary: str, lines: list[str]) -> ValueError:
    """Return the error of a folder of which some files failed; programs print each of its notes as a line."""
    error = ValueError(f"{summary}; {len(lines)} failed:")
    for line in lines:
        error.add_note(line)
    return error
