"""Work shared among the processes that `accelerate launch` or torchrun started, by accelerate's `PartialState`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from glob import escape
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
PATIENCE = timedelta(days=7)  # for the slowest process; the launcher ends all of them if one fails


def join_processes(*, cpu: bool = False) -> None:
    """Meet the other processes, and take a GPU of one's own where there are some and not `cpu`."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        import torch
        from accelerate import PartialState

        PartialState(cpu=cpu or not torch.accelerator.is_available(), timeout=PATIENCE)


def _state() -> Any:
    """Return accelerate's state; None in a process that was started alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return None
    from accelerate import PartialState

    return PartialState()


def process_index() -> int:
    """Return the number of this process; that of the main one, which speaks for all, is 0."""
    state = _state()
    return 0 if state is None else state.process_index


@contextmanager
def main_process_first() -> Iterator[None]:
    """Let the main process do something before all others do it."""
    state = _state()
    if state is None:
        yield
        return
    with state.main_process_first():
        yield


def share(items: list[T], size: int = 1) -> tuple[list[T], int]:
    """Return this process's share of the main process's items, and how many these are.

    Args:
        items: those of the main process count, as other hosts may see a folder later.
        size: of the groups that stay together.
    """
    state = _state()
    if state is None:
        return items, len(items)
    from accelerate.utils import broadcast_object_list

    (items,) = broadcast_object_list([items])
    groups = [items[first : first + size] for first in range(0, len(items), size)]
    with state.split_between_processes(groups) as mine:
        return [item for group in mine for item in group], len(items)


def gather(items: list[T]) -> list[T]:
    """Wait for all processes, and return the items of all."""
    if _state() is None:
        return items
    from accelerate.utils import gather_object

    return gather_object(items)


def own_part(path: Path) -> Path:
    """Return the file to which this process appends what belongs into `path`, since no two may append to one."""
    index = process_index()
    return path.with_name(f"{path.name}.part-{index}") if index else path


def take_parts(path: Path) -> None:
    """Append the lines of all other processes to `path`, even of those that were killed."""
    for part in sorted(path.parent.glob(f"{escape(path.name)}.part-*")):
        with path.open("ab") as file:
            file.write(b"\n" + part.read_bytes())  # the line that a killed process left ends here
        part.unlink()
