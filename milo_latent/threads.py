"""Several items at once in the threads of one process: files are read and written while networks compute."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")
MOST = 4  # threads, each of which holds what its item needs
LARGE = 2**18  # pixels; larger images keep all cores busy by themselves
_OWN = threading.local()  # `cores`: on how many the threads of a pool may compute together
_LARGE_ONE = threading.Lock()


def thread_count(device: torch.device) -> int:
    """Return how many items to work on at once: one for each core, or one beside that on an accelerator."""
    return min(torch.get_num_threads(), MOST) if device.type == "cpu" else 2


def in_threads(work: Callable[[T], R], items: Iterable[T], *, threads: int) -> Iterator[tuple[T, Callable[[], R]]]:
    """Call `work(item)` for some items at once, and yield each item, in their order, with its result.

    Each thread computes on one core, so that small inputs keep all cores busy. No more than twice as many results as
    threads wait to be taken.

    Args:
        work: may be called in any thread.
        items: are taken one after another.
        threads: 1 calls `work` in this thread when the result is asked for, which computes on all cores.

    Yields:
        The item, and a function that returns the result, or raises what `work` raised.
    """
    if threads == 1:
        yield from ((item, lambda item=item: work(item)) for item in items)
        return
    cores = torch.get_num_threads()
    waiting: deque[tuple[T, Future[R]]] = deque()
    pool = ThreadPoolExecutor(threads, initializer=_start, initargs=(cores,))
    try:
        for item in items:
            waiting.append((item, pool.submit(work, item)))
            if len(waiting) == 2 * threads:
                first, future = waiting.popleft()
                yield first, future.result
        for item, future in waiting:
            yield item, future.result
    except BaseException:  # GeneratorExit, if the rest is not wanted
        pool.shutdown(cancel_futures=True)
        raise
    finally:
        pool.shutdown()
        torch.set_num_threads(cores)  # those of the pool change what the next thread starts with


def _start(cores: int) -> None:
    _OWN.cores = cores
    torch.set_num_threads(1)


@contextmanager
def alone_if_large(pixels: int) -> Iterator[None]:
    """Let a thread of `in_threads` compute one large image at a time, on all cores, so that memory stays bounded."""
    cores = getattr(_OWN, "cores", None)
    if cores is None or pixels <= LARGE:
        yield
        return
    with _LARGE_ONE:
        torch.set_num_threads(cores)
        try:
            yield
        finally:
            torch.set_num_threads(1)
