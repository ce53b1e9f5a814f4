"""What the cleaners (DiffBIR's stage 1) have in common: sizes, and the strict reading of official weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from diffusers import ConfigMixin, ModelMixin
from torch import Tensor

__all__ = ["Cleaner", "ModelMixin", "channels_last"]
NAMES_SHOWN = 8


class Cleaner(ModelMixin, ConfigMixin):
    """A network from images to images whose parameters are named as in the official files.

    The class attributes say how the official pipeline treats images around a cleaner; `clean_image` reads them.
    """

    computed: ClassVar[tuple[str, ...]] = ()  # buffers of official files that are computed here, and so not stored
    short_side: ClassVar[int] = 512  # of its results at least: stage 2 was trained there, and does poorly on less
    enlarge_first: ClassVar[bool] = False  # whether smaller images are enlarged to it before they are cleaned
    outer_multiple: ClassVar[int] = 1  # to which the pipeline pads images, other than the cleaner itself

    @property
    def scale(self) -> int:
        """How many times larger the result is than the image."""
        return 1

    @property
    def multiple(self) -> int:
        """Pixels to whose multiples images are padded inside; tiles that start at multiples see the same windows."""
        return 1

    @classmethod
    def official_state(cls, state: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
        """Turn an official state dict into that of this class, strictly.

        Args:
            state: official weights, without prefix.
            config: arguments of this class; None means the official full-size network.

        Returns:
            The same tensors, without buffers that are computed, for `load_state_dict(strict=True)`.

        Raises:
            ValueError: if keys are missing or left over, or shapes differ; the message lists them.
        """
        with torch.device("meta"):
            own = cls(**(config or {}))
        modules = dict(own.named_modules())
        expected = own.state_dict()
        kept = {key: value for key, value in state.items() if key in expected or not cls._is_computed(key, modules)}
        missing, unexpected = expected.keys() - kept.keys(), kept.keys() - expected.keys()
        shapes = [
            f"{key}: expected {tuple(expected[key].shape)}, got {tuple(kept[key].shape)}"
            for key in sorted(expected.keys() & kept.keys())
            if kept[key].shape != expected[key].shape
        ]
        if missing or unexpected or shapes:
            raise ValueError(
                f"Expected the weights of {cls.__name__}, got others. Missing: {_listed(missing)}. "
                f"Unexpected: {_listed(unexpected)}. Other shapes: {_listed(shapes)}. Is it another cleaner's file?"
            )
        return kept

    @classmethod
    def _is_computed(cls, key: str, modules: Mapping[str, Any]) -> bool:
        """Return whether `key` is a computed buffer of a module that this network has."""
        parent, _, name = key.rpartition(".")
        return name in cls.computed and parent in modules


def channels_last(image: Tensor) -> Tensor:
    """Lay (B, C, H, W) out with channels last, as convolutions then keep it, which makes them 4 to 10 % faster."""
    return image.contiguous(memory_format=torch.channels_last)


def _listed(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return (", ".join(names[:NAMES_SHOWN]) or "none") + more
