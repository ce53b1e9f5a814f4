"""The only place that words shape, dtype and range errors."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in set(choices):
        raise ValueError(f"Expected `{name}` to be one of {sorted(choices)}, got {value!r}.")


def check_range(name: str, value: float, low: float, high: float, way_out: str = "") -> None:
    """Raise ValueError unless `low <= value <= high` (NaN fails)."""
    if not low <= value <= high:
        raise ValueError(f"Expected `{name}` in [{low:g}, {high:g}], got {value}. {way_out}".rstrip())


def check_batch(name: str, tensor: Tensor, channels: int | None = None) -> None:
    """Raise TypeError or ValueError unless `tensor` is floating point, (B, C, H, W), with `channels` channels."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"Expected `{name}` to be a torch.Tensor, got {type(tensor).__name__}.")
    if not tensor.is_floating_point():
        raise TypeError(f"Expected `{name}` to be floating point, got {tensor.dtype}. Convert it, e.g. `.float()`.")
    if tensor.ndim != 4:
        raise ValueError(f"Expected `{name}` of shape (B, C, H, W), got {tuple(tensor.shape)}. Add a batch axis?")
    if channels is not None and tensor.shape[1] != channels:
        raise ValueError(
            f"Expected `{name}` with {channels} channels, got {tensor.shape[1]} in {tuple(tensor.shape)}. "
            "A metric for images has 3, for Stable Diffusion latents 4."
        )


def check_pair(ref: Tensor, dist: Tensor, *, channels: int, smallest: int) -> None:
    """Raise unless `ref` and `dist` are comparable: same shape, dtype and device, large enough.

    Args:
        ref: reference, (B, C, H, W) or (1, C, H, W).
        dist: distorted, (B, C, H, W).
        channels: what C must be.
        smallest: the least H and W.

    Raises:
        TypeError: for integers or mixed dtypes.
        ValueError: for shapes or devices that differ, or sides that are too small.
    """
    check_batch("ref", ref, channels)
    check_batch("dist", dist, channels)
    if ref.shape[1:] != dist.shape[1:] or ref.shape[0] not in (1, dist.shape[0]):
        raise ValueError(f"Expected `ref` and `dist` of one shape, got {tuple(ref.shape)} and {tuple(dist.shape)}.")
    if ref.dtype != dist.dtype:
        raise TypeError(f"Expected `ref` and `dist` of one dtype, got {ref.dtype} and {dist.dtype}. Convert one.")
    if ref.device != dist.device:
        raise ValueError(f"Expected `ref` and `dist` on one device, got {ref.device} and {dist.device}. Move one.")
    if min(ref.shape[2:]) < smallest:
        raise ValueError(
            f"Expected sides of at least {smallest}, got {tuple(ref.shape[2:])}. Pad or enlarge both inputs first."
        )


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise ValueError if `tensor` holds NaN or infinity. Reads values, so only where data enters."""
    if not torch.isfinite(tensor).all():
        bad = int((~torch.isfinite(tensor)).sum())
        raise ValueError(f"Expected `{name}` to be finite, got {bad} NaN or infinite values of {tensor.numel()}.")
