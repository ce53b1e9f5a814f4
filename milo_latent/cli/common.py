"""What several commands share."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from milo_latent.pipelines.diffbir import DiffBIRPipeline

TASKS = ["sr", "denoise", "face", "unaligned_face"]
DTYPES = ["float32", "float16", "bfloat16"]


def to_dtype(name: str | None) -> torch.dtype | None:
    """Return the dtype of a name in `DTYPES`; None for None."""
    import torch

    return None if name is None else getattr(torch, name)


def add_restorer_options(command: argparse.ArgumentParser) -> None:
    """Add the options of `load_restorer`."""
    command.add_argument("--model", default="nano", help="shipped weights, a folder, or a hub id (default: nano)")
    command.add_argument("--metric", help="MILO_L instead of the model's own: a name, a folder, or an official .pth")
    command.add_argument("--device", help="cpu, cuda or mps (default: the best there is)")
    command.add_argument("--dtype", choices=DTYPES, help="of the networks (default: float32)")


def open_restorer(options: argparse.Namespace) -> DiffBIRPipeline:
    """Open the pipeline of the options that `add_restorer_options` adds."""
    from milo_latent.restoration.restorer import load_restorer

    hide_loading_bar()
    return load_restorer(options.model, device=options.device, dtype=to_dtype(options.dtype), metric=options.metric)


def add_vae_options(command: argparse.ArgumentParser) -> None:
    """Add the options of commands that encode or decode."""
    command.add_argument("--model", default="nano", help="shipped weights, or a folder with a VAE (default: nano)")
    command.add_argument("--tile", type=int, metavar="PIXELS", help="work in tiles of this side, for large images")


def hide_loading_bar() -> None:
    """Leave the bar of the denoising steps as the only one."""
    from diffusers.utils import logging

    logging.disable_progress_bar()
