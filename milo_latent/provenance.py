"""What results were made of, recorded beside them, so that changed inputs, weights or settings are noticed later."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from milo_latent.processes import main_process_first, own_part, process_index, take_parts

Entry = dict[str, Any]  # of values that JSON keeps as they are


def file_stamp(path: Path) -> str:
    """Return the name, the size in bytes and the time in nanoseconds of a file, which change when it is written."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return path.name
    return f"{path.name} {status.st_size} {status.st_mtime_ns}"


def weights_digest(parts: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the values and settings of networks, schedulers, tokenizers and tensors, by their names."""
    found = hashlib.sha256()
    for name, part in sorted(parts.items()):
        config = getattr(part, "config", {})
        settings = config if isinstance(config, Mapping) else vars(config)
        public = sorted((key, repr(value)) for key, value in settings.items() if not key.startswith("_"))
        vocabulary = sorted(part.get_vocab().items()) if hasattr(part, "get_vocab") else []
        found.update(repr((name, type(part).__name__, public, vocabulary)).encode("utf-8", "surrogatepass"))
        tensors = part.state_dict() if isinstance(part, nn.Module) else {name: part} if torch.is_tensor(part) else {}
        for key, tensor in tensors.items():
            found.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def read_entries(path: Path) -> tuple[list[Entry], int]:
    """Return the entries of a record, and how many of its lines are damaged; a missing file has none.

    A last line without its end is none, since the process that wrote it was killed.
    """
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    lines = [line for line in lines if line]
    entries = [entry for entry in map(_read_entry, lines) if entry is not None]
    return entries, len(lines) - len(entries)


def _read_entry(line: bytes) -> Entry | None:
    """Return the entry of a line; None if its checksum is another."""
    if line[:9] != b"%08x " % zlib.crc32(line[9:]):
        return None
    try:
        entry = json.loads(line[9:])
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) else None


def format_entry(entry: Entry) -> str:
    """Return the line of an entry: its checksum, and its values in JSON."""
    line = json.dumps(entry, allow_nan=False)
    return f"{zlib.crc32(line.encode()):08x} {line}\n"


class FolderRecord:
    """What each result in a folder was made of: a line for each, in a file beside the folder, `FOLDER.record`.

    Of several processes, each writes a file of its own, which the main one takes into this one.

    Args:
        folder: of the results.
        made: what all results depend on, such as settings and the digest of weights.
        overwrites: whether every result is made anew, even in place of files that the record does not know.
    """

    def __init__(self, folder: Path, made: Entry, *, overwrites: bool = False) -> None:
        self.folder, self.overwrites = folder, overwrites
        folder = folder.resolve()
        place = folder.parent if os.access(folder.parent, os.W_OK) else folder
        self.path, self.made = place / f"{folder.name}.record", made
        with main_process_first():
            self.take_parts()
            self.entries = {str(entry.get("result")): entry for entry in read_entries(self.path)[0]}

    def take_parts(self) -> None:
        """Take what other processes recorded into the one file."""
        if process_index() == 0:
            take_parts(self.path)

    def is_current(self, result: Path, source: Path) -> bool:
        """Return whether a result is there and was made of the file `source` as it is now, and as all others are."""
        entry = self.entries.get(self._name(result))
        return not self.overwrites and result.exists() and entry == self._entry(result, source)

    def tell_of_others(self, results: Iterable[Path]) -> None:
        """Warn of the results among these that are made anew, since they were made of something else."""
        others = [self._name(each) for each in results if each.exists() and self._name(each) in self.entries]
        if others and not self.overwrites:
            changed = {key for name in others for key in self.made if self.entries[name].get(key) != self.made[key]}
            reasons = ", ".join(sorted(changed)) or "the files they were made of"
            names = ", ".join(others[:4]) + (", ..." if len(others) > 4 else "")
            warnings.warn(f"{len(others)} results are made anew, as {reasons} changed: {names}.", stacklevel=3)

    @contextmanager
    def making(self, result: Path, source: Path) -> Iterator[None]:
        """Record what a result is made of; while it is being made, the record says only that something is.

        Raises:
            ValueError: if there is a file of this name that the record does not know; it may be someone's own.
        """
        if not self.overwrites and result.exists() and self._name(result) not in self.entries:
            raise ValueError(
                f"Expected {result} to be a result that {self.path} tells of. --overwrite replaces it, --skip-existing "
                "leaves it as it is."
            )
        entry = self._entry(result, source)
        self._append("\n" + format_entry({"result": self._name(result)}))  # a line that a killed process left ends here
        yield
        self._append(format_entry(entry))

    def _entry(self, result: Path, source: Path) -> Entry:
        return {"result": self._name(result), "input": file_stamp(source), **self.made}

    def _name(self, result: Path) -> str:
        return result.relative_to(self.folder).as_posix()

    def _append(self, text: str) -> None:
        with own_part(self.path).open("a", encoding="utf-8") as file:
            file.write(text)
