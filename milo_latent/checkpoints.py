"""Official checkpoints; the only code that opens `.pth` files, and never runs what is in them."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch import Tensor

CHECKPOINT_SUFFIXES = frozenset({".pth", ".pt", ".ckpt"})


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Read a dictionary of tensors, `weights_only`.

    Args:
        path: a file that `torch.save` wrote.

    Returns:
        Name to tensor, on the CPU.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, holds anything but tensors, or would run code.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"Expected a checkpoint, got {path}, which does not exist.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"Expected a checkpoint of tensors in {path}, which cannot be read: {first_line}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"Expected a dictionary of tensors in {path}, got {type(state).__name__}.")
    return state


def rename_keys(state: dict[str, Tensor], prefixes: dict[str, str]) -> dict[str, Tensor]:
    """Return `state` with the prefixes of its keys replaced; keys without one of them stay."""
    renamed = {}
    for key, value in state.items():
        prefix = next((prefix for prefix in prefixes if key.startswith(prefix)), "")
        renamed[prefixes.get(prefix, "") + key.removeprefix(prefix)] = value
    return renamed
