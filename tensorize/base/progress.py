"""How long work shows itself: a bar on a terminal, nothing elsewhere, or the caller's function."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator

Progress = Callable[[str, int, int], None]
"""Called as progress(stage, done, total)."""

log = logging.getLogger("tensorize")
_VERBOSE = "tensorize's own, of the command line"

_said = {"quiet": False}
"""How much this process says of itself."""

# Seconds over which the speed is taken: a step may take minutes, and a stage hours.
_WHOLE_STAGE = 1e9


def say_much(*, quiet: bool, verbose: bool) -> None:
    """How much is said on the way, of the command line: nothing, or all that is logged as well."""
    _said["quiet"] = quiet
    level = logging.INFO if verbose else logging.NOTSET
    log.setLevel(logging.ERROR if quiet else level)
    for handler in [each for each in log.handlers if each.name == _VERBOSE]:
        log.removeHandler(handler)
    if verbose:
        handler = logging.StreamHandler(sys.stderr)
        handler.name = _VERBOSE
        handler.setFormatter(logging.Formatter("tensorize: %(message)s"))
        log.addHandler(handler)


def is_quiet() -> bool:
    """Whether nothing is said on the way."""
    return _said["quiet"]


def no_progress(stage: str, done: int, total: int) -> None:
    """Tells nobody."""


@contextlib.contextmanager
def shown(progress: Progress | bool | None) -> Iterator[Progress]:
    """A function (stage, done, total) for the time of the block.

    ``None`` is a bar when standard error is a terminal; ``True`` always, ``False`` never; a
    function is called as it is.
    """
    if callable(progress):
        yield progress
        return
    wanted = sys.stderr.isatty() and not is_quiet() if progress is None else progress
    if not wanted:
        yield no_progress
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TaskID,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description:<14}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Bar(
        *columns,
        console=Console(stderr=True),
        transient=True,
        speed_estimate_period=_WHOLE_STAGE,
    ) as bar:
        tasks: dict[str, TaskID] = {}

        def update(stage: str, done: int, total: int) -> None:
            if stage not in tasks:  # what is done already was not done in this time
                tasks[stage] = bar.add_task(stage, total=total, completed=done)
            bar.update(tasks[stage], completed=done, total=total)

        yield update


def announce(line: str) -> None:
    """One line before long work: on a terminal to see it, in the log everywhere."""
    log.info(line)
    if sys.stderr.isatty() and not is_quiet():
        print(f"tensorize: {line}", file=sys.stderr)
