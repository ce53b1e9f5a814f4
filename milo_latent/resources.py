"""Where weights lie: the shipped ones, in a wheel and in a checkout alike, and fetched files in the user's cache."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

HUB_OPTIONS = ("revision", "cache_dir", "token", "local_files_only", "force_download")


def cache_dir() -> Path:
    """Return the folder of fetched files: `$MILO_LATENT_CACHE`, or `milo_latent` in the user's cache."""
    chosen = os.environ.get("MILO_LATENT_CACHE")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "milo_latent"


def _shipped() -> dict[str, Path]:
    root = Path(str(files("milo_latent.weights")))
    return {path.name: path for path in sorted(root.iterdir()) if (path / "README.md").is_file()}


def available_weights() -> list[str]:
    """Return the names of the shipped sets of weights."""
    return list(_shipped())


def weights_dir(name: str) -> Path:
    """Return the folder of a shipped set of weights, such as "nano".

    Raises:
        FileNotFoundError: if there is no such set; the message lists the sets.
    """
    shipped = _shipped()
    if name not in shipped:
        raise FileNotFoundError(f"Expected one of the shipped weights, {', '.join(shipped)}, got {name!r}.")
    return shipped[name]


def find_weights(source: str | Path) -> Path:
    """Return the folder of the shipped set that `source` names; if it names none, `source` itself."""
    return _shipped().get(str(source), Path(source))


def fetch_folder(name: str, options: Mapping[str, Any], files: list[str] | None = None) -> Path:
    """Return the folder of a repository on the hub, fetched if need be.

    Args:
        name: such as "someone/model".
        options: those among `HUB_OPTIONS` choose what is fetched; others are left alone.
        files: patterns of the files to fetch; None fetches all.

    Raises:
        FileNotFoundError: if it cannot be fetched.
    """
    from huggingface_hub import snapshot_download  # its import takes a while
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        chosen = {key: value for key, value in options.items() if key in HUB_OPTIONS}
        return Path(snapshot_download(name, allow_patterns=files, **chosen))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise FileNotFoundError(
            f"Expected a folder or a hub id, got {name!r}, which is no folder here and could not be fetched "
            f"({type(error).__name__}). Pass a folder downloaded by hand."
        ) from error


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
