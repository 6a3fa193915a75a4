"""How long work shows itself: a bar on a terminal, nothing elsewhere, or the caller's function."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator

Progress = Callable[[str, int, int], None]
"""Called as progress(stage, done, total)."""

log = logging.getLogger("tensorize")


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
    wanted = sys.stderr.isatty() if progress is None else progress
    if not wanted:
        yield no_progress
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn())
    with Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, int] = {}

        def update(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done, total=total)  # type: ignore[arg-type]

        yield update


def announce(line: str) -> None:
    """One line before long work: on a terminal to see it, in the log everywhere."""
    log.info(line)
    if sys.stderr.isatty():
        print(f"tensorize: {line}", file=sys.stderr)
