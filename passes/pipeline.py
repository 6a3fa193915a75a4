"""Passes, and the one observer around them.

A pass is a frozen dataclass with a ``name``, typed options and ``run(stage) -> next stage``. It
takes a valid stage and gives a valid one; it never prints. ``run_passes`` verifies, times and logs
each, and keeps the history on the stage.

======================  ======================================================================
``TENSORIZE_DEBUG=1``   a line a pass: its time and what it did
``TENSORIZE_DEBUG=2``   also every site's decision
``TENSORIZE_DEBUG=3``   also the graphs before and after, when they are asked for
======================  ======================================================================
"""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn, Protocol, TypeVar

from tensorize.base.errors import AnalysisError
from tensorize.base.old_names import hand_on
from tensorize.passes.stages import Planned, Record, WithSites
from tensorize.reports.data import Stage

Before = TypeVar("Before", bound=Record, contravariant=True)
After = TypeVar("After", bound=Record, covariant=True)
Last = TypeVar("Last", bound=Record)

__getattr__ = hand_on(__name__)
log = logging.getLogger("tensorize")


class Pass(Protocol[Before, After]):
    """One step of the pipeline: from which stage to which."""

    @property
    def name(self) -> str: ...

    def run(self, before: Before, /) -> After: ...


def debug_level() -> int:
    """The value of ``TENSORIZE_DEBUG``: 0 (silent) to 3."""
    text = os.environ.get("TENSORIZE_DEBUG", "0") or "0"
    return int(text) if text.isdigit() else 0


def run_passes(stage: Record, passes: Sequence[Pass[Any, Any]], last: type[Last]) -> Last:
    """Run ``passes`` in order, up to the stage ``last``; verify, time and log every one.

    Raises:
        AnalysisError: a pass left an invalid stage (a defect of the pass, not of the model).
    """
    for step in passes:
        start = time.perf_counter()
        stage = step.run(stage)
        seconds = time.perf_counter() - start
        verify(stage, step.name)
        stage = replace(stage, history=(*stage.history, Stage(step.name, seconds, stage.summary)))
        log.info("%s: %.2f s: %s", step.name, seconds, stage.summary)
        if debug_level() >= 1:
            print(f"tensorize: {step.name:<12} {seconds:8.2f} s  {stage.summary}", file=sys.stderr)
    if debug_level() >= 2 and isinstance(stage, Planned):
        for site in stage.plan.sites:
            shape = "x".join(map(str, site.shape))
            print(
                f"tensorize:   {site.name} {shape} -> {site.format} {site.ranks} "
                f"error {site.predicted_error:.4f}: {site.reason}",
                file=sys.stderr,
            )
    if not isinstance(stage, last):
        _fail(passes[-1].name, f"it is {type(stage).__name__}, not {last.__name__}")
    return stage


def _fail(step: str, cause: str, site: str | None = None) -> NoReturn:
    raise AnalysisError(
        f"the pass {step!r} left an invalid stage: {cause}",
        site=site,
        way_out="this is a defect in tensorize: please report it with this message",
    )


def verify(stage: Record, step: str) -> None:
    """Check what must hold between any two passes.

    Raises:
        AnalysisError: naming the pass and the site that broke it.
    """
    fail = partial(_fail, step)
    if not isinstance(stage, WithSites):
        return
    sites = {site.name: site for site in stage.sites}
    if len(sites) != len(stage.sites):
        fail("two sites have the same name")
    for label in ("statistics", "spectra"):
        for name in getattr(stage, label, {}):
            if name not in sites:
                fail(f"{label} of something that is no site", name)
    if not isinstance(stage, Planned):
        return
    for choice in stage.plan.sites:
        site = sites.get(choice.name)
        if site is None:
            fail("the plan names something that is no site", choice.name)
        if choice.spec is not None and math.prod(choice.spec.shape) != math.prod(choice.shape):
            fail(f"the cores stand for {choice.spec.shape}, not {choice.shape}", choice.name)
        if site.shape != choice.shape:
            fail(f"the plan's shape {choice.shape} is not {site.shape}", choice.name)
        if site.blocked and choice.spec is not None:
            fail(f"factorized although {site.blocked}", choice.name)
    for name, error in getattr(stage, "errors", {}).items():
        if not error >= 0:
            fail(f"its measured error is {error}", name)
