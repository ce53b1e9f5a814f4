"""Checks of shapes, dtypes, ranges and values that several modules share, with their messages."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

# root mean square of scaled latents, which is near 1 by definition; that of unscaled ones is 5 to 8 (SD 1.x to SDXL)
LATENT_RANGE = (0.05, 3.0)
OVERSHOOT = 0.1  # by which decoders and filters leave [0, 1] where nothing clips
SHOWN = 200  # characters of a value from a file or of another library's error that a message repeats


def shortened(value: object) -> str:
    """Return the text of a value for a message: in one line, of at most `SHOWN` characters."""
    text = " ".join(str(value).split())
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in set(choices):
        raise ValueError(f"Expected `{name}` to be one of {sorted(choices)}, got {value!r}.")


def check_range(name: str, value: float, low: float, high: float, way_out: str = "") -> None:
    """Raise ValueError unless `low <= value <= high`, which NaN is not."""
    if not low <= value <= high:
        raise ValueError(f"Expected `{name}` in [{low:g}, {high:g}], got {value}. {way_out}".rstrip())


def check_file(path: Path, what: str, way_out: str = "") -> None:
    """Raise FileNotFoundError unless `path` is a file; the message calls it `what`."""
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"Expected {what}, got {path}, which {found}. {way_out}".rstrip())


def check_apart(output: Path, *inputs: Path) -> None:
    """Raise ValueError if the file `output` is one of `inputs`, whatever the paths: it would be overwritten."""
    for path in inputs:
        if output.exists() and path.exists() and output.samefile(path):
            raise ValueError(f"Expected another file for the result than the input {path}, which would be overwritten.")


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
    """Raise TypeError or ValueError unless `ref`, (B or 1, C, H, W), and `dist`, (B, C, H, W), can be compared.

    Their C must be `channels`, and H and W at least `smallest`; dtype and device must be the same.
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


def check_model_input(name: str, tensor: Tensor, parameter: Tensor, *, model: str) -> None:
    """Raise ValueError or TypeError unless `tensor` has the device and, without autocast, the dtype of `parameter`."""
    if tensor.device != parameter.device:
        raise ValueError(
            f"Expected `{name}` on the {model}'s device {parameter.device}, got {tensor.device}. Move one with `.to`."
        )
    if tensor.dtype != parameter.dtype and not autocast_is_on(tensor):
        raise TypeError(
            f"Expected `{name}` in the {model}'s dtype {parameter.dtype}, got {tensor.dtype}. Convert one with `.to`."
        )


def autocast_is_on(tensor: Tensor) -> bool:
    """Return whether autocast chooses dtypes on the device of `tensor`; devices such as meta have no autocast."""
    kind = tensor.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise ValueError if `tensor` holds NaN or infinity; it reads values, so it belongs where data enters."""
    if not torch.isfinite(tensor).all():
        bad = int((~torch.isfinite(tensor)).sum())
        raise ValueError(f"Expected `{name}` to be finite, got {bad} NaN or infinite values of {tensor.numel()}.")


def check_region(region: Tensor) -> None:
    """Raise ValueError unless `region` is (B, 1, h, w), finite and nowhere negative."""
    check_batch("region", region, 1)
    check_finite("region", region)
    if (region < 0).any():
        raise ValueError(f"Expected `region` >= 0, got {region.min().item():g}. 0 leaves a pixel out.")


def stacklevel_of_caller() -> int:
    """Return the `stacklevel` of a warning that is to name the line outside this package and torch, if there is one."""
    level, frame, inside = 1, sys._getframe(1), ("milo_latent", "torch", "weakref")
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in inside:
        level, frame = level + 1, frame.f_back
    return level


class ValueWatch:
    """Warns, once, of finite values that are unlikely to be meant: images outside [0, 1], latents of another scale.

    It reads values, for which an accelerator waits, so it belongs where data enters and not into a loop.
    """

    def __init__(self) -> None:
        self.warned = False

    def glance(self, name: str, tensor: Tensor, *, latents: bool) -> None:
        """Look at what is on the CPU, where reading values makes nothing wait; images may overshoot a little."""
        if torch.compiler.is_compiling() or self.warned or tensor.device.type != "cpu" or tensor.numel() == 0:
            return
        if latents or not -OVERSHOOT <= tensor.amin() <= tensor.amax() <= 1 + OVERSHOOT:
            self.look(name, tensor, latents=latents)

    def look(self, name: str, tensor: Tensor, *, latents: bool) -> None:
        """Warn of images or scaled latents, (B, C, H, W), called `name`, unless it has warned before."""
        message = None if self.warned else (_odd_latents if latents else _odd_image)(name, tensor)
        if message is not None:
            self.warned = True
            warnings.warn(message, UserWarning, stacklevel=stacklevel_of_caller())


def _odd_image(name: str, image: Tensor) -> str | None:
    low, high = (value.item() for value in image.aminmax())
    if low >= 0 and high <= 1:
        return None
    return (
        f"Expected image values in [0, 1], got [{low:.4g}, {high:.4g}] in {name}; errors of such values mean little. "
        "Divide 8-bit values by 255, map [-1, 1] by x / 2 + 0.5."
    )


def _odd_latents(name: str, latents: Tensor) -> str | None:
    size = latents.float().square().mean().sqrt().item()
    low, high = LATENT_RANGE
    if low <= size <= high:
        return None
    lowest, highest = (value.item() for value in latents.aminmax())
    return (
        f"Expected scaled latents, root mean square in [{low:g}, {high:g}], got {size:.4g} "
        f"(values in [{lowest:.4g}, {highest:.4g}]) in {name}; errors of such values mean little. "
        "Are they unscaled? Subtract the VAE's shift_factor and multiply by its scaling_factor."
    )
