"""What is known of faults: where, when, how large, and what was done about each."""

from __future__ import annotations

import datetime
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tensorize.base.errors import FaultError

RECOMPUTE, RAISE = "recompute", "raise"

FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT = "product", "gradient of the input", "gradient"

_MOST_ROWS = 16
"""Rows of a fault that are kept by number."""


@dataclass
class Fault:
    """A product, or a gradient, that was not what its check says.

    ``weight``: its qualified name. ``what``: the product, or which gradient. ``rows``: the first
    of the rows that were wrong, counted over all leading axes. ``off``: how far the worst was off,
    in units of what rounding may do. ``rank``: of the process. ``outcome``: "recomputed", "mended"
    (the weight was), "skipped" (the step of training), "raised", or "open".
    """

    weight: str
    what: str
    rows: tuple[int, ...]
    off: float
    device: str
    rank: int
    time: str
    outcome: str = "open"

    def __str__(self) -> str:
        rows = f", rows {', '.join(map(str, self.rows))}" if self.rows else ""
        where = f"rank {self.rank}, {self.device}"
        return (
            f"{self.time} {self.weight}: {self.what} off by {self.off:.3g} times what rounding "
            f"does{rows} ({where}): {self.outcome}"
        )


@dataclass(frozen=True)
class Mend:
    """A tensor that was not what it was: ``entries`` of it were mended, by its ``sums``, or all of
    it by the ``artefact``'s copy."""

    tensor: str
    entries: int
    by: str

    def __str__(self) -> str:
        many = "entry" if self.entries == 1 else "entries"
        return f"{self.tensor}: {self.entries} {many} mended by {self.by}"


OnFault = str | Callable[[Fault], Any]
"""What is done about a fault: ``"recompute"``, ``"raise"``, or a function that hears of it first;
then it is as with ``"recompute"``."""


@dataclass
class Log:
    """What happened in one guarded model."""

    on_fault: OnFault
    faults: list[Fault] = field(default_factory=list)
    mends: list[Mend] = field(default_factory=list)
    skipped: int = 0
    skip_next: bool = False
    calibrating: bool = False
    _lock: Any = field(default_factory=threading.Lock)

    def __deepcopy__(self, memo: dict) -> Log:
        # A copy of a model has no history.
        copied = memo[id(self)] = Log(self.on_fault)
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.Lock())

    def note(
        self,
        weight: str,
        what: str,
        at: Tensor,
        rows: Tensor | None,
        off: float,
        rank: int | None = None,
    ) -> Fault:
        """Take down a fault, of this process or of another ``rank``; then what the caller asked for
        is done.

        Raises:
            FaultError: ``on_fault`` is ``"raise"``.
        """
        first = () if rows is None else tuple(rows[:_MOST_ROWS].tolist())
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        fault = Fault(
            weight, what, first, off, str(at.device), _rank() if rank is None else rank, now
        )
        with self._lock:
            self.faults.append(fault)
        if self.on_fault == RAISE:
            raise self.refused(fault, "nothing was changed")
        if callable(self.on_fault):
            self.on_fault(fault)
        return fault

    def refused(self, fault: Fault, tried: str) -> FaultError:
        """The error of a fault that stays."""
        fault.outcome = "raised"
        return FaultError(
            f"its {fault.what} is off by {fault.off:.3g} times what rounding does, on rank "
            f"{fault.rank}, {fault.device}: {tried}",
            site=fault.weight,
            way_out="call again: if it was the arithmetic, it may be right; if it stays, "
            "tensorize.scrub(model) looks for a damaged weight, tensorize.load(directory) has the "
            "weights from disk, and a machine that does it often should leave the job",
        )

    def found_by_graph(
        self, weight: str, rows: int, at: Tensor, mend: Callable[[], tuple[list[Mend], list[str]]]
    ) -> FaultError:
        """Take down rows that a compiled graph found wrong; the error that is to be raised.

        Raises:
            FaultError: ``on_fault`` is ``"raise"``.
        """
        fault = self.note(weight, f"product ({rows} rows of a compiled graph)", at, None, 1.0)
        mends, lost = mend()
        state = f"{', '.join(lost)} is damaged" if lost else "its weight is whole now"
        error = self.refused(fault, f"a compiled graph computes nothing again; {state}")

        def came_right() -> None:
            fault.outcome = "mended" if mends else "recomputed"

        error.came_right = None if lost else came_right
        return error

    def skip(self, fault: Fault) -> None:
        """A gradient is wrong and stays so: the step that it was for is not taken."""
        fault.outcome, self.skip_next = "skipped", True

    def counts(self) -> Counter[tuple[str, str, int]]:
        """How many faults each weight has seen, by device and rank."""
        return Counter((f.weight, f.device, f.rank) for f in self.faults)


def _rank() -> int:
    known = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_rank() if known else 0
