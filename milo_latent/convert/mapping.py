"""From the tensors of an official network to those of ours: a table of names, applied strictly, without copies."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

SHOWN = 4  # keys of each kind that an error names; the others are counted


@dataclass(frozen=True)
class Layout:
    """Which official tensor is which of ours.

    Args:
        names: official path of a module, or key of a tensor, to ours; the longest that fits is taken.
        splits: official key to the keys of ours that it is cut into, in order, and the axis it is cut along.
        flattened: official keys of 1x1 convolutions that are linear layers with us.
        ignorable: patterns of official keys that nothing of ours needs.
    """

    names: Mapping[str, str]
    splits: Mapping[str, tuple[tuple[str, ...], int]] = field(default_factory=dict)
    flattened: frozenset[str] = frozenset()
    ignorable: tuple[str, ...] = ()

    def official_key(self, key: str) -> str:
        """Return what the official network calls a tensor of ours."""
        for official, (targets, _) in self.splits.items():
            if key in targets:
                return official
        return rename(key, {target: official for official, target in self.names.items()}) or key

    def convert(self, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """Rename, cut and flatten.

        Args:
            state: official tensors.

        Returns:
            Our names to tensors, all views; and the official keys that have no place.
        """
        converted: dict[str, Tensor] = {}
        unknown = []
        for official, tensor in state.items():
            if official in self.splits:
                targets, axis = self.splits[official]
                parts = tensor.chunk(len(targets), dim=axis)
                converted.update(zip(targets, parts, strict=False))  # too few parts are reported as missing
            elif (name := rename(official, self.names)) is not None and name not in converted:
                flat = official in self.flattened and tensor.ndim == 4 and tensor.shape[2:] == (1, 1)
                converted[name] = tensor[:, :, 0, 0] if flat else tensor
            elif not any(re.fullmatch(pattern, official) for pattern in self.ignorable):
                unknown.append(official)
        return converted, unknown


def rename(key: str, names: Mapping[str, str]) -> str | None:
    """Return `key` with the longest of its leading paths that is in `names` replaced; None if none is."""
    parts = key.split(".")
    for count in range(len(parts), 0, -1):
        target = names.get(".".join(parts[:count]))
        if target is not None:
            return ".".join([target, *parts[count:]])
    return None


def map_strictly(model: nn.Module, state: Mapping[str, Tensor], layout: Layout, *, what: str) -> dict[str, Tensor]:
    """Return the tensors of `model`, each from the official one that it is.

    Args:
        model: ours; only names and shapes are read, so its parameters may be on the meta device.
        state: official tensors.
        layout: which is which.
        what: name of the network and its file, for the error.

    Returns:
        A tensor for each entry of the model's state dict, views of the official ones.

    Raises:
        ValueError: with all differences, if a key has no place, a tensor of ours has no key, or a shape differs.
    """
    expected = model.state_dict()
    converted, unknown = layout.convert(state)
    unknown += [layout.official_key(key) for key in converted if key not in expected]
    shapes = [
        f"{layout.official_key(key)}: {tuple(expected[key].shape)} expected, {tuple(tensor.shape)} came"
        for key, tensor in converted.items()
        if key in expected and tensor.shape != expected[key].shape
    ]
    differences = {
        "missing": [layout.official_key(key) for key in expected if key not in converted],
        "unknown": unknown,
        "of another shape": shapes,
    }
    if any(differences.values()):
        raise ValueError(f"Expected {what}, got one whose keys differ: {_report(differences)}. Is it the right file?")
    return {key: converted[key] for key in expected}


def _report(differences: Mapping[str, list[str]]) -> str:
    parts = []
    for kind, keys in differences.items():
        distinct = sorted(set(keys))
        if distinct:
            more = f", and {len(distinct) - SHOWN} more" if len(distinct) > SHOWN else ""
            parts.append(f"{len(distinct)} {kind} ({'; '.join(distinct[:SHOWN])}{more})")
    return ", ".join(parts)


def select(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the entries below `prefix`, without it."""
    return {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}


def numbered(keys: Iterable[str], pattern: str) -> Iterator[int]:
    """Yield, in order and once each, the numbers that the group of `pattern` finds at the start of `keys`."""
    found = {int(match.group(1)) for key in keys if (match := re.match(pattern, key))}
    yield from sorted(found)


def convert_dtype(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return a floating-point tensor in `dtype`, others as they are."""
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def check_rest(state: Mapping[str, Tensor], prefixes: tuple[str, ...], ignorable: Iterable[str], *, what: str) -> None:
    """Raise ValueError if a key lies below none of `prefixes` and no pattern of `ignorable` matches it."""
    try:
        patterns = [re.compile(pattern) for pattern in ignorable]
    except re.error as error:
        raise ValueError(f"Expected regular expressions to ignore, got {error.pattern!r}: {error}.") from error
    rest = [key for key in state if not key.startswith(prefixes)]
    unknown = [key for key in rest if not any(pattern.fullmatch(key) for pattern in patterns)]
    if unknown:
        raise ValueError(
            f"Expected {what}, got one with keys beside those of its networks: {_report({'unknown': unknown})}. "
            "If nothing needs them, name them by a regular expression: `ignore`, or --ignore."
        )
