"""What several commands share."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

TASKS = ["sr", "denoise", "face", "unaligned_face"]
DTYPES = ["float32", "float16", "bfloat16"]


def to_dtype(name: str | None) -> torch.dtype | None:
    """Return the dtype of a name in `DTYPES`; None for None."""
    import torch

    return None if name is None else getattr(torch, name)


def add_vae_options(command: argparse.ArgumentParser) -> None:
    """Add the options of commands that encode or decode."""
    command.add_argument("--model", default="nano", help="shipped weights, or a folder with a VAE (default: nano)")
    command.add_argument("--tile", type=int, metavar="PIXELS", help="work in tiles of this side, for large images")


def hide_loading_bar() -> None:
    """Leave the bar of the denoising steps as the only one."""
    from diffusers.utils import logging

    logging.disable_progress_bar()
