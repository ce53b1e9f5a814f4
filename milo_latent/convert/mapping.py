"""From the tensors of an official network to those of ours: a table of names, applied strictly and without copies."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

SHOWN = 4  # keys of each kind that an error names; the others are counted


@dataclass(frozen=True)
class Layout:
    """Which official tensor is which of ours.

    Args:
        names: official path of a module, or key of a tensor, to ours; the longest that matches is taken.
        splits: official key to the keys of ours that it is cut into, in order, and the axis that it is cut along.
        flattened: official keys of 1x1 convolutions that are linear layers in our network.
        ignorable: patterns of official keys that our network does not need.
    """

    names: Mapping[str, str]
    splits: Mapping[str, tuple[tuple[str, ...], int]] = field(default_factory=dict)
    flattened: frozenset[str] = frozenset()
    ignorable: tuple[str, ...] = ()

    def official_key(self, key: str) -> str:
        """Return the official key of a tensor of ours."""
        for official, (targets, _) in self.splits.items():
            if key in targets:
                return official
        return rename(key, {target: official for official, target in self.names.items()}) or key

    def convert(self, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """Return tensors of ours by name, all of them views of the official ones, and the official keys left over."""
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
    """Return a tensor for each entry of the model's state dict, views of the official ones.

    Args:
        model: our network; only names and shapes are read, so its parameters may be on the meta device.
        state: official tensors.
        layout: how official tensors correspond to ours.
        what: name of the network and its file, for the error.

    Raises:
        ValueError: if keys are missing or left over, or a shape differs; the message names all of them.
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


def numbered(keys: Iterable[str], pattern: str) -> list[int]:
    """Return, in order and once each, the numbers that the group of `pattern` finds at the start of `keys`."""
    return sorted({int(match.group(1)) for key in keys if (match := re.match(pattern, key))})


def check_rest(state: Mapping[str, Tensor], prefixes: tuple[str, ...], ignorable: Iterable[str], *, what: str) -> None:
    """Raise ValueError if a key starts with none of `prefixes` and matches no pattern of `ignorable`."""
    try:
        patterns = [re.compile(pattern) for pattern in ignorable]
    except re.error as error:
        raise ValueError(f"Expected regular expressions to ignore, got {error.pattern!r}: {error}.") from error
    unknown = [
        key for key in state if not key.startswith(prefixes) and not any(each.fullmatch(key) for each in patterns)
    ]
    if unknown:
        raise ValueError(
            f"Expected {what}, got one with keys beside those of its networks: {_report({'unknown': unknown})}. "
            "If they are not needed, name them by a regular expression: `ignore`, or --ignore."
        )
