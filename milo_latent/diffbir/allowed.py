"""What a pipeline folder may name: no code, and only classes that the pipeline takes, of modules imported already."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from diffusers import SchedulerMixin

# settings by which diffusers or transformers fetch code, or choose classes of other libraries to unpack weights
CODE_SETTINGS = frozenset({"auto_map", "attn_implementation", "_attn_implementation", "quantization_config"})


def check_allowed(folder: Path, pipeline: type, components: Mapping[str, tuple[type, ...]]) -> None:
    """Check a pipeline folder before anything in it is loaded. Nothing is imported.

    Args:
        folder: with `model_index.json`.
        pipeline: the class that opens the folder.
        components: the classes that each component may have. An enumeration stands for any scheduler.

    Raises:
        ValueError: if the folder holds Python files, names another class, or has a setting that would run code.
    """
    for path in (*folder.glob("*"), *folder.glob("*/*")):
        if path.suffix.lower() == ".py":
            raise ValueError(
                f"Expected a model without code, got {path}. Nothing of it was run. If the "
                "model needs no code of its own, remove that file."
            )
    index, _ = _read(folder / "model_index.json")
    named = index.get("_class_name")
    if named not in [each.__name__ for each in pipeline.__mro__]:
        raise ValueError(f"Expected the pipeline {pipeline.__name__} in {folder}, got {str(named)[:200]}.")
    for name, value in index.items():
        if (
            isinstance(value, list | dict)
            and value != [None, None]
            and not _is_allowed(value, components.get(name, ()))
        ):
            raise ValueError(
                f"Expected the {str(name)[:200]} in {folder} to be of a class that {pipeline.__name__} takes and "
                f"that is imported already, got {str(value)[:200]}. Nothing of it was run."
            )
    for path in folder.glob("*/*config.json"):
        found = CODE_SETTINGS & _read(path)[1]
        if found:
            raise ValueError(f"Expected a model without code, got the settings {sorted(found)} in {path}. Remove them.")


def _read(path: Path) -> tuple[dict[str, Any], set[str]]:
    """Return the object in a JSON file, and the names in it at any depth."""
    names: set[str] = set()

    def keep(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names.update(name for name, _ in pairs)
        return dict(pairs)

    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=keep)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"Expected JSON in {path}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"Expected a JSON object in {path}, got {type(content).__name__}.")
    return content, names


def _is_allowed(value: Any, classes: tuple[type, ...]) -> bool:
    """Return whether the value of a component is [module, class], of an imported module and one of `classes`."""
    if not isinstance(value, list) or len(value) != 2 or not all(isinstance(each, str) for each in value):
        return False
    found = getattr(sys.modules.get(value[0]), value[1], None)
    bases = tuple(SchedulerMixin if issubclass(each, Enum) else each for each in classes if each is not type(None))
    return inspect.isclass(found) and issubclass(found, bases)
