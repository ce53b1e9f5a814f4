"""Programs report an error as one line on standard error and a non-zero exit code."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable

# errors that users can mend; all others are bugs of this package and keep their tracebacks
EXPECTED_ERRORS = (ValueError, TypeError, OSError, MemoryError, ImportError, FloatingPointError)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """Print a warning as one line on standard error, without its place in the code."""
    print(f"milo-latent: warning: {' '.join(str(message).split())}", file=sys.stderr)


def run_program(program: Callable[[], object], *, interrupted: str = "run the same command again") -> int:
    """Run a program, and return its exit code.

    The code is 0, 1 after one line on standard error that says what was wrong, or 130 after an interruption, when
    `interrupted` is printed.
    """
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            program()
    except EXPECTED_ERRORS as error:
        print(f"milo-latent: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"milo-latent: interrupted; {interrupted}", file=sys.stderr)
        return 130
    return 0
