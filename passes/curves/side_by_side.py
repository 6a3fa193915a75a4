"""Pieces of work side by side: small ones on a thread each, and, where that is asked for, shared
out among processes.

Decompositions of matrices of some hundred rows hardly use a second thread: on two quiet cores the
eigenvectors of a 768 x 768 matrix took 98 ms on one thread, 74 on two, and two matrices at once on
a thread each 48 ms a matrix. On cores that do other work as well two threads wait for each other,
and took up to 25 times as long as one.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ClassVar, TypeVar

import torch
import torch.distributed as dist

from tensorize.base.sharded import of_each_rank
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
    if _Shared.devices:
        yield from _by_ranks(work, list(items), is_small, _Shared.devices[-1])
    else:
        yield from _here(work, items, is_small)


class _Shared:
    """Where results are to lie, of those who ask all processes to share the work."""

    devices: ClassVar[list[torch.device]] = []


@contextlib.contextmanager
def shared_by_ranks(device: torch.device) -> Iterator[None]:
    """In here every process does its share of the pieces, and all have all results.

    All processes have to come here with the same pieces; results of others lie on ``device``.
    """
    _Shared.devices.append(device)
    try:
        yield
    finally:
        _Shared.devices.pop()


def is_shared_by_ranks() -> bool:
    """Whether processes share pieces of work now."""
    return bool(_Shared.devices)


def own_share(items: Sequence[Item]) -> Sequence[Item]:
    """The pieces that this process does: where none are shared, all of them."""
    if not _Shared.devices:
        return items
    # Neighbours stay together: what they have in common is sent once.
    count, this = dist.get_world_size(), dist.get_rank()
    first, end = (k * len(items) // count for k in (this, this + 1))
    return items[first:end]


def notes_of_all(own: Sequence[str]) -> tuple[str, ...]:
    """What is to be said of the shares of all processes, each thing once."""
    if not _Shared.devices:
        return tuple(own)
    everywhere = of_each_rank(list(own), "cpu")
    return tuple(dict.fromkeys(note for notes in everywhere for note in notes))


def _by_ranks(
    work: Callable[[Item], Result],
    items: Sequence[Item],
    is_small: Callable[[Item], bool],
    device: torch.device,
) -> Iterator[Result]:
    own = list(_here(work, own_share(items), is_small))
    for results in of_each_rank(own, device):
        yield from results


def _here(
    work: Callable[[Item], Result], items: Iterable[Item], is_small: Callable[[Item], bool]
) -> Iterator[Result]:
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
