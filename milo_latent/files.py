"""Read and write images, latents and text; a file is written completely or not at all."""

from __future__ import annotations

import io
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm.auto import tqdm

from milo_latent.checks import check_file, check_finite
from milo_latent.pictures import from_8bit, picture_to_tensor, to_8bit

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"})
LATENT_SUFFIXES = frozenset({".npy", ".safetensors"})
ALPHA_SUFFIXES = frozenset({".png", ".webp", ".tif", ".tiff"})
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


def read_photo(path: str | Path) -> tuple[Tensor, Tensor | None]:
    """Read an image as `read_image` does, and its transparency; the file is decoded once.

    Returns:
        Image, (1, 3, H, W), and alpha, (1, 1, H, W), both float32, in [0, 1]; alpha is None if the image is opaque.
    """
    picture = _open(path)
    try:
        image = picture_to_tensor(picture)[None]  # (1, 3, H, W)
    except TypeError as error:
        raise ValueError(f"{error} It is {path}.") from error
    alpha = from_8bit(np.asarray(picture.convert("RGBA"))[..., 3:]) if picture.has_transparency_data else None
    return image, None if alpha is None or alpha.min() == 1 else alpha[None]


def _open(path: str | Path) -> Image.Image:
    path = Path(path)
    check_file(path, "an image file")
    try:
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit is ours, below
            if image.width * image.height > MAX_PIXELS:
                size = f"{image.width}x{image.height}"
                raise ValueError(f"Expected at most {MAX_PIXELS} pixels, got {size} in {path}. Crop or shrink it.")
            image.load()
            return ImageOps.exif_transpose(image)
    except UnidentifiedImageError as error:
        raise ValueError(f"Expected an image, got {path}, whose format Pillow does not know.") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"Expected at most {MAX_PIXELS} pixels in {path}: {error}. Crop or shrink it.") from error
    except (OSError, SyntaxError, EOFError) as error:
        raise ValueError(f"Expected a complete image, got {path}, which is damaged: {error}.") from error


def check_output(path: Path, suffixes: frozenset[str] | None = None) -> None:
    """Raise unless a file can be written to `path`; call it before the content is computed.

    Raises:
        FileNotFoundError: if its folder does not exist.
        ValueError: if its suffix is none of `suffixes`; None allows all.
    """
    if suffixes is not None:
        _check_suffix(path, suffixes)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"Expected a folder to write into, got {path.parent}, which does not exist.")


def _check_suffix(path: Path, suffixes: frozenset[str]) -> None:
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"Expected a file name that ends in one of {sorted(suffixes)}, got {path.name!r}.")


def write_image(path: str | Path, image: Tensor, *, alpha: Tensor | None = None) -> None:
    """Write an image, rounded to 8 bit.

    Args:
        path: the file to write; its suffix chooses the format.
        image: (1, 3, H, W) or (3, H, W), in [0, 1]; values outside are clipped.
        alpha: transparency, (1, 1, H, W), in [0, 1]; only PNG, WebP and TIFF can store it.

    Raises:
        ValueError: if the suffix is unknown or cannot store `alpha`, or `image` is not one image of finite values.
        OSError: if the file cannot be written, as `write_atomically`.
    """
    path = Path(path)
    check_output(path, IMAGE_SUFFIXES)
    if alpha is not None and path.suffix.lower() not in ALPHA_SUFFIXES:
        raise ValueError(f"{path.name} cannot hold transparency. Choose one of {sorted(ALPHA_SUFFIXES)}.")
    if image.ndim == 4 and image.shape[0] == 1:
        image = image[0]
    if image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"Expected one image, (3, H, W), got {tuple(image.shape)}.")
    check_finite(f"image for {path}", image)
    if alpha is not None:
        image = torch.cat([image, alpha[0].to(image)])
    picture = Image.fromarray(to_8bit(image))
    file_format = Image.registered_extensions()[path.suffix.lower()]
    options = {"quality": 95, "subsampling": 0} if file_format == "JPEG" else {}
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
    try:
        return torch.from_numpy(np.load(path, allow_pickle=False))
    except (ValueError, EOFError, OSError, TypeError) as error:
        raise ValueError(f"Expected a plain array in {path}: {error}. Pickled objects are never read.") from error


def _read_safetensors(path: Path) -> Tensor:
    with open_safetensors(path) as file:
        if "latents" not in file.keys():  # noqa: SIM118 (safe_open is no mapping)
            raise ValueError(f"Expected an entry `latents` in {path}, got {sorted(file.keys())}.")
        return file.get_tensor("latents")


@contextmanager
def open_safetensors(path: str | Path) -> Iterator[Any]:
    """Open a safetensors file as `safe_open` does; a damaged one raises ValueError."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"Expected a complete safetensors file, got {path}: {error}.") from error


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
        write_bytes(path, save({"latents": array}, metadata=metadata))
    else:
        buffer = io.BytesIO()
        np.save(buffer, (array[0] if array.ndim == 4 and array.shape[0] == 1 else array).numpy(), allow_pickle=False)
        write_bytes(path, buffer.getvalue())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file of these bytes."""
    write_atomically(path, lambda partial: partial.write_bytes(content))


def write_text(path: str | Path, text: str) -> None:
    """Write a text file in UTF-8; file names in it that are not valid UTF-8 keep their bytes."""
    write_atomically(
        Path(path), lambda partial: partial.write_text(text, encoding="utf-8", errors="surrogateescape", newline="")
    )


def make_readable(*folders: str | Path) -> None:
    """Give the weights in these folders the permissions of other new files; safetensors saves them as private ones."""
    for folder in folders:
        for path in Path(folder).glob("*.safetensors"):
            path.chmod(0o666 & ~_umask())


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file completely or not at all: `write` fills a temporary file beside `path`, which then replaces it.

    Raises:
        OSError: if writing fails, such as on a full disk; an older file at `path` is untouched then.
    """
    check_output(path)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    partial = Path(name)
    try:
        write(partial)
        partial.chmod(0o666 & ~_umask())  # mkstemp makes files private
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def list_files(folder: Path, suffixes: frozenset[str]) -> list[Path]:
    """Return the files of a folder with one of `suffixes`, by name, but hidden ones such as macOS's `._photo.jpg`.

    Raises:
        FileNotFoundError: if `folder` is none, or holds no such file.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"Expected a folder, got {folder}, which is not a folder.")
    paths = [path for path in folder.iterdir() if path.suffix.lower() in suffixes and not path.name.startswith(".")]
    if not paths:
        raise FileNotFoundError(f"Expected files of {sorted(suffixes)} in {folder}, found none.")
    return sorted(paths)


def list_unique_files(folder: Path, suffixes: frozenset[str]) -> list[Path]:
    """Return the files of `list_files`, or raise ValueError if two have one name but for the suffix."""
    paths = list_files(folder, suffixes)
    counts = Counter(path.stem for path in paths)
    twice = [path.name for path in paths if counts[path.stem] > 1]
    if twice:
        names = ", ".join(twice[:4]) + (", ..." if len(twice) > 4 else "")
        raise ValueError(
            f"Expected each name once in {folder}, whatever its suffix, since results are named so: {names}."
        )
    return paths


def process_folder(
    folder: Path, output: Path, work: Callable[[Path, Path], object], *, inputs: frozenset[str], suffix: str, unit: str
) -> tuple[int, int]:
    """Call `work(path, result)` for every file of a folder whose result is not there yet.

    Args:
        folder: the folder of the files.
        output: the folder of the results, made if it is missing; a result has the name of its file, with `suffix`.
        work: may raise ValueError, FileNotFoundError or MemoryError; the other files are processed all the same.
        inputs: the suffixes of the files.
        suffix: the suffix of the results, such as "png".
        unit: what messages call the files, in the plural.

    Returns:
        How many files were processed, and how many had a result already.

    Raises:
        FileNotFoundError: if the folder holds no such file.
        ValueError: at the start, if two files would have one result; at the end, with the reason for each failure.
    """
    paths = list_unique_files(folder, inputs)
    output.mkdir(parents=True, exist_ok=True)
    results = {path: output / f"{path.stem}.{suffix}" for path in paths}
    left = [path for path in paths if not results[path].exists()]
    failed = []
    for path in tqdm(left, unit="file", disable=len(left) < 2):
        try:
            work(path, results[path])
        except (ValueError, FileNotFoundError, MemoryError) as error:  # a full disk stops the run
            failed.append(f"{path.name}: {' '.join(str(error).split())}")
    skipped = len(paths) - len(left)
    if failed:
        raise ValueError(
            f"{len(left) - len(failed)} {unit} of {folder} -> {output} ({skipped} were there already); "
            f"{len(failed)} failed: {'; '.join(failed)}"
        )
    return len(left), skipped
