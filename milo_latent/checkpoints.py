"""Read official checkpoints. This is the only code that opens `.pth` files, and it never runs what is in them."""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from milo_latent.checks import check_file
from milo_latent.structure import read_safetensors, refusing_damage

CHECKPOINT_SUFFIXES = frozenset({".pth", ".pt", ".ckpt"})
INERT_MODULES = ("pytorch_lightning.", "lightning.", "lightning_fabric.", "omegaconf.", "numpy.")


class _Inert:
    """Takes the place of a training program's object that is stored beside the tensors; holds and does nothing."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __call__(self, *args: Any) -> _Inert:
        return self


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Read a dictionary of tensors, `weights_only` and memory-mapped if the file's format allows it.

    If the file has a `state_dict` entry, that is the dictionary. The prefix `module.` of keys is removed.

    Args:
        path: a file that `torch.save` wrote, or safetensors.

    Returns:
        Tensors by name, on the CPU.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged or incomplete, holds no tensors, or would run code.
    """
    path = Path(path)
    check_file(path, "a checkpoint")
    content = read_safetensors(path) if path.suffix.lower() == ".safetensors" else _read_pickled(path)
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(map(_is_stored, content.values())):
        raise ValueError(f"Expected a dictionary of tensors in {path}, got {type(content).__name__}, or odd tensors.")
    return {str(key).removeprefix("module."): value for key, value in content.items()}


def _is_stored(value: Any) -> bool:
    """Return whether a value is a tensor whose file holds all of its numbers, not a sparse or an expanded one."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.device.type != "cpu":
        return False
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def _read_pickled(path: Path) -> Any:
    with path.open("rb") as file:
        start = file.read(64)
    zipped = check_archive(path)  # checkpoints of the old format are not, and cannot be memory-mapped
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"version https://git-lfs")):
        raise ValueError(f"Expected a checkpoint, got {path}, which is a web page or a pointer. Fetch the file itself.")
    with refusing_damage(f"Expected a checkpoint of tensors in {path}, which cannot be read"):
        try:
            with _nothing_runs(path) if zipped else nullcontext():
                return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        except pickle.UnpicklingError as error:  # torch advises to run the code in the file
            reason = "It is damaged, or holds other objects than tensors. Nothing of it was run."
            raise ValueError(reason) from error


def check_archive(path: Path) -> bool:
    """Return whether a checkpoint is an archive, not of the old format, which has no checksums.

    PyTorch verifies no checksum, and takes the bytes of a compressed entry for values when it maps the file.

    Raises:
        ValueError: unless the entries of an archive are stored as they are and have their checksums.
    """
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return False
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            plain = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
            repacked = not plain or len({entry.filename for entry in entries}) < len(entries)
            damaged = None if repacked else archive.testzip()
    except (zipfile.BadZipFile, RuntimeError, ValueError, EOFError, OSError, struct.error) as error:
        raise ValueError(
            f"Expected a complete checkpoint, got {path}, which is damaged or was downloaded or copied in part "
            f"({error}): {path.stat().st_size} bytes. Fetch it again."
        ) from error
    if repacked:
        raise ValueError(f"Expected a checkpoint as torch.save writes it, got {path}, which was packed anew.")
    if damaged is not None:
        raise ValueError(f"Expected a complete checkpoint, got {path}: the checksum of {damaged[:200]} in it is wrong.")
    return True


def _nothing_runs(path: Path) -> AbstractContextManager:
    """Replace the objects that training programs leave in a checkpoint by `_Inert`; their classes are not imported."""
    named = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    return torch.serialization.safe_globals([(_Inert, name) for name in named if name.startswith(INERT_MODULES)])


def rename_keys(state: dict[str, Tensor], prefixes: dict[str, str]) -> dict[str, Tensor]:
    """Return `state` with the prefixes of its keys replaced; keys without any of them stay."""
    renamed = {}
    for key, value in state.items():
        prefix = next((prefix for prefix in prefixes if key.startswith(prefix)), "")
        renamed[prefixes.get(prefix, "") + key.removeprefix(prefix)] = value
    return renamed
