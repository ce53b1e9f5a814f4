"""MILO as a component of diffusers' pipelines, registered once diffusers is imported, which MILO alone never does."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

LISTS = "diffusers.pipelines.pipeline_loading_utils"  # where diffusers lists the classes that pipelines save and load


def register_component(module: str, name: str) -> None:
    """Let diffusers' pipelines save and load a class that is none of diffusers' own models.

    Importing diffusers takes longer than importing torch, so this waits until somebody else does.

    Args:
        module: the full name of the module that holds the class; saved pipelines name it.
        name: of the class, which has the methods `save_pretrained` and `from_pretrained`.
    """
    methods = {name: ["save_pretrained", "from_pretrained"]}

    def register(lists: ModuleType) -> None:
        lists.LOADABLE_CLASSES[module] = methods
        lists.ALL_IMPORTABLE_CLASSES.update(methods)

    if LISTS in sys.modules:
        register(sys.modules[LISTS])
    else:
        sys.meta_path.insert(0, _OnceImported(LISTS, register))


class _OnceImported(MetaPathFinder):
    """Calls a function with a module right after the module is first imported, by whomever."""

    def __init__(self, name: str, call: Callable[[ModuleType], None]) -> None:
        self.name, self.call = name, call

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return None for other modules; for the one waited for, what the other finders say, and the call after it."""
        if fullname != self.name or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_call(module: ModuleType) -> None:
                run(module)
                self.call(module)

            spec.loader.exec_module = run_and_call  # type: ignore[method-assign]
        return spec
