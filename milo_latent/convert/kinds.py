"""What an official checkpoint is, told by its keys and its name; and the refusal of those that do not fit."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor

from milo_latent.checkpoints import read_checkpoint
from milo_latent.convert.networks import Config, Network, empty
from milo_latent.diffbir.versions import FILES, CleanerKind, Version

SIGNS = {  # a key that only this kind has
    "Stable Diffusion": "model.diffusion_model.input_blocks.0.0.weight",
    "IRControlNet": "zero_convs.0.0.weight",
    "SwinIR": "layers.0.residual_group.blocks.0.attn.relative_position_bias_table",
    "SCUNet": "m_head.0.weight",
    "BSRNet": "RRDB_trunk.0.RDB1.conv1.weight",
}
CLEANERS: Mapping[CleanerKind, str] = {
    "SwinIR": "milo_latent.diffbir.swinir",
    "SCUNet": "milo_latent.diffbir.scunet",
    "BSRNet": "milo_latent.diffbir.bsrnet",
}


def kind_of(state: Mapping[str, Tensor]) -> str | None:
    """Return what official tensors are of, one of `SIGNS`; None if unknown."""
    return next((kind for kind, key in SIGNS.items() if key in state), None)


def read_kind(path: Path, kind: str, option: str) -> dict[str, Tensor]:
    """Read a checkpoint that must be of `kind`.

    Args:
        path: the file.
        kind: one of `SIGNS`.
        option: what the file was given as, for the error.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is of another kind, or damaged.
    """
    state = read_checkpoint(path)
    found = kind_of(state)
    if found == kind:
        return state
    if found is None:
        some = ", ".join(sorted(state)[:3]) or "no tensors"
        raise ValueError(f"Expected an official {kind} checkpoint as `{option}`, got {path} with other keys ({some}).")
    raise ValueError(f"Expected an official {kind} checkpoint as `{option}`, got {path}, which is of {found}.")


def check_name(path: Path, expected: str, option: str, version: Version) -> None:
    """Raise ValueError if the file has the name of another official one than expected; other names say nothing.

    Keys cannot tell whether weights predict noise or v, or which release they are of; an official name can.
    """
    known = {file.file: name for name, file in FILES.items()}
    if known.get(path.name, expected) != expected:
        raise ValueError(
            f"Expected {FILES[expected].file} as `{option}` of DiffBIR {version.name}, got {path}, by its name the "
            f"official file of {known[path.name]}. Pass the right one, or rename it if the name is wrong."
        )


def check_schedule(state: Mapping[str, Tensor], path: Path, version: Version) -> None:
    """Raise ValueError if the checkpoint's own noise schedule ends without signal, and the version's does not."""
    table = state.get("alphas_cumprod")
    if table is not None and not version.zero_snr and float(table[-1]) < 1e-6:
        raise ValueError(
            f"Expected weights for a schedule that keeps some signal as `sd` of DiffBIR {version.name}, got {path}, "
            f"whose schedule ends without any. Pass {FILES[version.sd].file}."
        )


def find_cleaner(
    state: Mapping[str, Tensor], kind: CleanerKind, config: Config | None = None, *, what: str = ""
) -> Network:
    """Find a cleaner in official tensors.

    Args:
        state: official tensors, without prefix.
        kind: its architecture.
        config: arguments of its class; None means the official full-size network.
        what: name and file, for errors.

    Returns:
        The cleaner and its tensors.

    Raises:
        ValueError: if anything is missing, left over, or of another shape.
    """
    cleaner: Any = getattr(import_module(CLEANERS[kind]), kind)
    try:
        tensors = cleaner.official_state(state, config)
    except ValueError as error:
        raise ValueError(f"{what or kind}: {error}") from error
    return Network(empty(cleaner, config or {}), tensors)
