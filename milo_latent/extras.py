"""Libraries that only some features need, imported when they are used."""

from __future__ import annotations

import importlib
from typing import Any


def import_extra(module: str, extra: str, purpose: str) -> Any:
    """Import a module of an optional dependency.

    Args:
        module: such as "scipy.stats".
        extra: of this package, which installs it.
        purpose: what needs it, as the subject of the error's sentence.

    Raises:
        ImportError: if it is not installed, with the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        library = module.partition(".")[0]
        raise ImportError(f'{purpose} needs {library} ({error}): pip install "milo_latent[{extra}]".') from error
