"""Where the shipped weights lie, in a wheel and in a checkout alike."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def _root() -> Path:
    return Path(str(files("milo_latent.weights")))


def available_weights() -> list[str]:
    """Return the names of the shipped sets of weights."""
    return sorted(path.name for path in _root().iterdir() if path.is_dir() and (path / "README.md").is_file())


def weights_dir(name: str) -> Path:
    """Return the folder of a shipped set of weights.

    Args:
        name: such as "nano".

    Raises:
        FileNotFoundError: if there is no such set; the message lists those there are.
    """
    folder = _root() / name
    if name not in available_weights():
        raise FileNotFoundError(f"Expected one of the shipped weights, {', '.join(available_weights())}, got {name!r}.")
    return folder
