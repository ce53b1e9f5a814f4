"""What a pipeline folder may name: no code, and only classes that the pipeline takes, of modules imported already."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Mapping
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Any

from diffusers import SchedulerMixin

from milo_latent.checks import shortened
from milo_latent.structure import read_json

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
                f"Expected a model without code, got {path}. Nothing of it was run. Remove it if the model needs none."
            )
    index = read_json(folder / "model_index.json")
    pipeline_name = index.get("_class_name")
    if pipeline_name not in [each.__name__ for each in pipeline.__mro__]:
        raise ValueError(f"Expected the pipeline {pipeline.__name__} in {folder}, got {shortened(pipeline_name)}.")
    for name, value in index.items():
        named = isinstance(value, list | dict) and value != [None, None]
        if named and not _is_allowed(value, components.get(name, ())):
            raise ValueError(
                f"Expected the {shortened(name)} in {folder} to be of a class that {pipeline.__name__} takes and "
                f"that is imported already, got {shortened(value)}. Nothing of it was run."
            )
    for path in folder.glob("*/*config.json"):
        found = CODE_SETTINGS & _names(path)
        if found:
            raise ValueError(f"Expected a model without code, got the settings {sorted(found)} in {path}. Remove them.")


def _names(path: Path) -> set[str]:
    """Return the names in the object in a JSON file, at any depth."""
    read_json(path)  # refuses anything but an object
    names: set[str] = set()
    text = path.read_text(encoding="utf-8")
    json.loads(text, object_pairs_hook=lambda pairs: names.update(name for name, _ in pairs))
    return names


def _is_allowed(value: Any, classes: tuple[type, ...]) -> bool:
    """Return whether the value of a component is [module, class], of an imported module and one of `classes`."""
    if not isinstance(value, list) or len(value) != 2 or not all(isinstance(each, str) for each in value):
        return False
    found = None
    with suppress(Exception):  # of lazy modules, for classes whose own requirements are not installed
        found = getattr(sys.modules.get(value[0]), value[1], None)
    bases = tuple(SchedulerMixin if issubclass(each, Enum) else each for each in classes if each is not type(None))
    return inspect.isclass(found) and issubclass(found, bases)
