"""Libraries that only some features need, imported when they are used."""

from __future__ import annotations

import importlib
from typing import Any


def import_extra(module: str, extra: str | None, purpose: str) -> Any:
    """Import a module of an optional dependency.

    Args:
        module: such as "scipy.stats".
        extra: of this package, which installs it; None if none does.
        purpose: what needs it, as the subject of the error's sentence.

    Raises:
        ImportError: if it is not installed, with the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        library = module.partition(".")[0]
        package = library if extra is None else f'"milo_latent[{extra}]"'
        raise ImportError(f"{purpose} needs {library} ({error}): pip install {package}.") from error
