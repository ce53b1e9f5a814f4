"""Where weights lie: the shipped ones, in a wheel and in a checkout alike, and public files in the user's cache."""

from __future__ import annotations

import hashlib
import os
import tempfile
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path


def cache_dir() -> Path:
    """Return the folder of fetched files: `$MILO_LATENT_CACHE`, or `milo_latent` in the user's cache."""
    chosen = os.environ.get("MILO_LATENT_CACHE")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "milo_latent"


def _shipped() -> dict[str, Path]:
    root = Path(str(files("milo_latent.weights")))
    return {path.name: path for path in sorted(root.iterdir()) if (path / "README.md").is_file()}


def available_weights() -> list[str]:
    """Return the names of the shipped sets of weights."""
    return sorted(_shipped())


def weights_dir(name: str) -> Path:
    """Return the folder of a shipped set of weights.

    Args:
        name: such as "nano".

    Raises:
        FileNotFoundError: if there is no such set; the message lists the sets.
    """
    if name not in _shipped():
        raise FileNotFoundError(f"Expected one of the shipped weights, {', '.join(_shipped())}, got {name!r}.")
    return _shipped()[name]


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class PinnedFile:
    """A public file whose content is known.

    Args:
        name: of the file.
        url: its address.
        size: in bytes.
        digest: its SHA-256, in hexadecimal.
    """

    name: str
    url: str
    size: int
    digest: str

    def is_at(self, path: Path) -> bool:
        """Return whether the file at `path` is this one."""
        return path.is_file() and path.stat().st_size == self.size and sha256(path) == self.digest


def fetch(file: PinnedFile, folder: Path) -> Path:
    """Fetch a file into a folder, where it appears once it is complete and checked.

    Args:
        file: what to fetch; an intact copy in `folder` is kept.
        folder: made where it is missing.

    Returns:
        The path of the file.

    Raises:
        OSError: if the network or the disk fails.
        ValueError: if another content comes; it is not kept.
    """
    from torch.hub import download_url_to_file

    path = folder / file.name
    if file.is_at(path):
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=folder) as temporary:
        partial = Path(temporary) / file.name
        try:
            download_url_to_file(file.url, str(partial), hash_prefix=file.digest, progress=False)
        except RuntimeError as error:  # another hash
            raise ValueError(f"Expected SHA-256 {file.digest} of {file.url}: {error}. The file is not kept.") from error
        if partial.stat().st_size != file.size:
            raise ValueError(f"Expected {file.size} bytes of {file.url}, got {partial.stat().st_size}. Not kept.")
        partial.replace(path)
    return path
