"""Programs report an error as one line on standard error and a non-zero exit code."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable

from tqdm.auto import tqdm

# errors that users can mend; all others are bugs of this package and keep their tracebacks
EXPECTED_ERRORS = (ValueError, TypeError, OSError, MemoryError, ImportError, FloatingPointError)

LONGEST_PATH = 500  # characters; what is longer is no name that a file has, and is cut


def _say(text: object) -> None:
    """Print a line on standard error, on a line of its own even where a progress bar is shown."""
    broken = "\n" if any(not bar.disable for bar in getattr(tqdm, "_instances", ())) else ""
    words = (word if len(word) <= LONGEST_PATH else f"{word[:100]}..." for word in str(text).split())
    print(f"{broken}milo-latent: {' '.join(words)}", file=sys.stderr)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """Print a warning as one line, without its place in the code."""
    _say(f"warning: {message}")


def _close_bars() -> None:
    """Close the progress bars that an error left open, which would be drawn once more behind its message."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()


def run_program(program: Callable[[], object], *, interrupted: str = "run the same command again") -> int:
    """Run a program, and return its exit code.

    The code is 0, 1 after a line on standard error that says what was wrong, and one for each note of the error, or 130
    after an interruption, when `interrupted` is printed.
    """
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            program()
    except EXPECTED_ERRORS as error:
        _close_bars()
        for line in (str(error) or type(error).__name__, *getattr(error, "__notes__", ())):
            _say(line)
        return 1
    except KeyboardInterrupt:
        _close_bars()
        _say(f"interrupted; {interrupted}")
        return 130
    return 0
