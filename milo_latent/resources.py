"""Where weights lie: the shipped ones, in a wheel and in a checkout alike, and those pulled before."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path


def cache_dir() -> Path:
    """Return the folder of weights that were pulled: `$MILO_LATENT_CACHE`, or `milo_latent` in the user's cache."""
    chosen = os.environ.get("MILO_LATENT_CACHE")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "milo_latent"


def _sets() -> dict[str, Path]:
    roots = [root for root in (cache_dir(), Path(str(files("milo_latent.weights")))) if root.is_dir()]
    return {path.name: path for root in roots for path in sorted(root.iterdir()) if (path / "README.md").is_file()}


def available_weights() -> list[str]:
    """Return the names of the sets of weights at hand: shipped, or pulled before."""
    return sorted(_sets())


def default_image_metric() -> str:
    """Return the name of the MILO_I to score images with: the official one where it was pulled, else our own."""
    return "official-image" if "official-image" in _sets() else "milo-image"


def weights_dir(name: str) -> Path:
    """Return the folder of a set of weights at hand.

    Args:
        name: such as "nano".

    Raises:
        FileNotFoundError: if there is no such set; the message lists those there are.
    """
    if name not in _sets():
        raise FileNotFoundError(f"Expected one of the weights at hand, {', '.join(_sets())}, got {name!r}.")
    return _sets()[name]
