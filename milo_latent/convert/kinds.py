"""What an official checkpoint holds, told by its keys and its name; and the refusal of those that do not fit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from milo_latent.checkpoints import read_checkpoint
from milo_latent.diffbir.versions import FILES, Version

SIGNS = {  # a key that only this kind has
    "Stable Diffusion": "model.diffusion_model.input_blocks.0.0.weight",
    "IRControlNet": "zero_convs.0.0.weight",
    "SwinIR": "layers.0.residual_group.blocks.0.attn.relative_position_bias_table",
    "SCUNet": "m_head.0.weight",
    "BSRNet": "RRDB_trunk.0.RDB1.conv1.weight",
}


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
    if SIGNS[kind] in state:
        return state
    some = ", ".join(sorted(state)[:3]) or "no tensors"
    found = next((f"a checkpoint of {other}" for other, key in SIGNS.items() if key in state), f"other keys ({some})")
    raise ValueError(f"Expected an official {kind} checkpoint as `{option}`, got {found} in {path}.")


def check_name(path: Path, expected: str, option: str, version: Version) -> None:
    """Raise ValueError if the file has the name of another official file than `expected`, one of `FILES`.

    Keys cannot tell whether weights predict noise or v, or which release they are of; an official name can. A name
    that is not official says nothing.
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
