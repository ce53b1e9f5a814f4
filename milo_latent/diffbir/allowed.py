"""What a pipeline folder may name: only classes that the pipeline takes, of modules imported already."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Any

from diffusers import SchedulerMixin

from milo_latent.checks import shortened
from milo_latent.structure import read_json


def check_allowed(folder: Path, pipeline: type, components: Mapping[str, tuple[type, ...]]) -> None:
    """Check what a pipeline folder names before anything in it is loaded. Nothing is imported.

    Args:
        folder: with `model_index.json`.
        pipeline: the class that opens the folder.
        components: the classes that each component may have. An enumeration stands for any scheduler.

    Raises:
        ValueError: if it names another class.
    """
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


def _is_allowed(value: Any, classes: tuple[type, ...]) -> bool:
    """Return whether the value of a component is [module, class], of an imported module and one of `classes`."""
    if not isinstance(value, list) or len(value) != 2 or not all(isinstance(each, str) for each in value):
        return False
    found = None
    with suppress(Exception):  # of lazy modules, for classes whose own requirements are not installed
        found = getattr(sys.modules.get(value[0]), value[1], None)
    bases = tuple(SchedulerMixin if issubclass(each, Enum) else each for each in classes if each is not type(None))
    return inspect.isclass(found) and issubclass(found, bases)
