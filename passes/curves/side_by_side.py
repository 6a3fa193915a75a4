"""Small pieces of work side by side, each on one thread.

Decompositions of matrices of some hundred rows hardly use a second thread: on two quiet cores the
eigenvectors of a 768 x 768 matrix took 98 ms on one thread, 74 on two, and two matrices at once on
a thread each 48 ms a matrix. On cores that do other work as well two threads wait for each other,
and took up to 25 times as long as one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from tensorize.ir.sites import Site

Item = TypeVar("Item")
Result = TypeVar("Result")

_MOST = 8
"""Pieces at once: each holds copies of its weight in float64."""

_SMALL_SIDE, _SMALL = 1024, 4_000_000
"""Weights up to this size are analysed side by side, each on one thread."""


def is_small(site: Site) -> bool:
    """Whether a weight's decompositions leave a second thread idle."""
    return min(site.matrix) <= _SMALL_SIDE and site.parameters <= _SMALL


def side_by_side(
    work: Callable[[Item], Result], items: Iterable[Item], is_small: Callable[[Item], bool]
) -> Iterator[Result]:
    """The results of ``work``, in the order of ``items``; few of them are taken ahead.

    Items that are not small come one by one, on all threads. How an item is computed hangs on
    nothing but itself, so that its result is the same bits whatever the others are.
    """
    threads = torch.get_num_threads()
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(min(threads, _MOST), initializer=_one_thread) as pool:
        try:
            for item in items:
                if not is_small(item):
                    yield from _all(waiting)
                    torch.set_num_threads(threads)
                    yield work(item)
                    continue
                waiting.append(pool.submit(work, item))
                if len(waiting) > min(threads, _MOST):
                    yield waiting.popleft().result()
            yield from _all(waiting)
        finally:
            for future in waiting:
                future.cancel()
            pool.shutdown()
            torch.set_num_threads(threads)  # a thread's number is the process's, too


def _one_thread() -> None:
    # At its first question a thread takes the process's number, which may be another's by then.
    torch.get_num_threads()
    torch.set_num_threads(1)


def _all(waiting: deque[Future[Result]]) -> Iterator[Result]:
    while waiting:
        yield waiting.popleft().result()
