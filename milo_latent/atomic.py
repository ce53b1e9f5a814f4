"""Files and folders that appear complete or not at all; what killed processes left of them is removed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

try:
    import fcntl
except ImportError:  # Windows, where leftovers stay
    fcntl = None  # type: ignore[assignment]

PREFIX = ".milo_latent-"  # of temporary files and folders


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file completely or not at all: `write` fills a temporary file beside `path`, which then replaces it.

    What earlier processes that were killed left in the same folder is removed first.

    Raises:
        FileNotFoundError: if the folder of `path` does not exist.
        OSError: if writing fails, such as on a full disk; an older file at `path` is untouched then.
    """
    check_output_folder(path)
    if path.parent.absolute() not in _rid:  # listing a large folder for each of its files takes long
        remove_leftovers(path.parent)
    handle, name = tempfile.mkstemp(prefix=PREFIX, suffix=path.suffix, dir=path.parent)
    partial = Path(name)
    os.close(handle)
    try:
        with _held(partial):
            write(partial)
            partial.chmod(0o666 & ~_umask())  # mkstemp makes files private
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def folder_at_once(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `folder` that takes its place at the end, or vanishes if anything fails.

    Raises:
        FileExistsError: if there is something in `folder`.
        OSError: if writing fails.
    """
    check_new_folder(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(folder.parent) as partial:
        yield partial
        partial.chmod(0o777 & ~_umask())  # mkdtemp makes folders private
        partial.replace(folder)


@contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """Yield a folder in `parent` that is removed at the end, or by the next process if this one is killed."""
    remove_leftovers(parent)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    try:
        with _held(folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _held(path: Path) -> Iterator[None]:
    """Lock a temporary file or folder, which tells other processes that it is no leftover."""
    if fcntl is None:
        yield
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems have no locks
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files and folders of processes that were killed; those of running processes are locked.

    Processes that share a folder do so before any of them writes, since a file is locked only after it was made.
    """
    _rid.add(folder.absolute())
    for path in [] if fcntl is None else folder.glob(f"{PREFIX}*"):
        with suppress(OSError):
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            finally:
                os.close(handle)


_rid: set[Path] = set()  # folders in which this process has looked for leftovers


def check_output_folder(path: Path) -> None:
    """Raise FileNotFoundError unless the folder that the file `path` is to be written into exists."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"Expected a folder to write into, got {path.parent}, which does not exist.")


def check_new_folder(folder: Path) -> None:
    """Raise FileExistsError unless `folder` is new or empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(
            f"Expected a new or an empty folder, got {folder}, which holds something. Choose another."
        )


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file of these bytes."""
    write_atomically(path, lambda partial: partial.write_bytes(content))


def write_text(path: str | Path, text: str) -> None:
    """Write a text file in UTF-8; file names in it that are not valid UTF-8 keep their bytes."""
    write_atomically(
        Path(path), lambda partial: partial.write_text(text, encoding="utf-8", errors="surrogateescape", newline="")
    )


@contextmanager
def saving_weights(folder: str | Path) -> Iterator[None]:
    """Name the folder in errors such as of a full disk, and make an OSError of those that safetensors raises."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError) as error:
        raise OSError(f"Could not write the weights in {folder}: {error}") from error


def make_readable(*folders: str | Path) -> None:
    """Give the weights in these folders the permissions of other new files; safetensors saves them as private ones."""
    for folder in folders:
        for path in Path(folder).glob("*.safetensors"):
            path.chmod(0o666 & ~_umask())


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask
