"""The compile pipeline: what passes share, and the one observer around them.

A pass is a frozen dataclass with a ``name``, typed options and ``run(program) -> program``. It
takes a valid program and gives a valid one; it never prints. ``run_passes`` verifies, times and
logs each step, and keeps the history on the program.

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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

from torch import Tensor, nn

from tensorize.base.errors import AnalysisError
from tensorize.base.progress import Progress, no_progress
from tensorize.ir.machine import GENERIC, Machine
from tensorize.ir.plan import Plan
from tensorize.ir.sites import Batch, Site
from tensorize.reports.data import Stage

if TYPE_CHECKING:
    from tensorize.passes.curves.curve import Spectrum
    from tensorize.passes.observe.moments import Moments
    from tensorize.passes.predict.predictor import Predictor


log = logging.getLogger("tensorize")


@dataclass(frozen=True)
class Program:
    """The model being compiled and all that is known of it so far.

    ``statistics`` and ``spectra`` are keyed by site name; ``sizes`` holds (elements, bytes) of
    every parameter of the dense model, once; ``errors`` the measured relative error of every
    rewritten site; ``cores`` the factors that are used instead of a curve's. Times are predicted
    for ``machine``. ``summary`` is the last pass's line about itself.
    """

    model: nn.Module
    inputs: Batch | None = None
    calibration: tuple[Batch, ...] = ()
    metric: str = "frobenius"
    seed: int = 0
    machine: Machine = GENERIC
    sites: tuple[Site, ...] = ()
    sizes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    statistics: Mapping[str, Moments] = field(default_factory=dict)
    spectra: Mapping[str, Spectrum] = field(default_factory=dict)
    predictor: Predictor | None = None
    plan: Plan | None = None
    cores: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)
    summary: str = ""
    notes: tuple[str, ...] = ()
    history: tuple[Stage, ...] = ()
    progress: Progress = no_progress

    def without_model(self) -> Program:
        """What was learned, without the model and the data: an analysis keeps neither alive."""
        return replace(self, model=nn.Module(), inputs=None, calibration=(), progress=no_progress)


class Pass(Protocol):
    """One step of the pipeline."""

    @property
    def name(self) -> str: ...

    def run(self, program: Program) -> Program: ...


def debug_level() -> int:
    """The value of ``TENSORIZE_DEBUG``: 0 (silent) to 3."""
    text = os.environ.get("TENSORIZE_DEBUG", "0") or "0"
    return int(text) if text.isdigit() else 0


def run_passes(program: Program, passes: Sequence[Pass]) -> Program:
    """Run ``passes`` in order; verify, time and log every one.

    Raises:
        AnalysisError: a pass left an invalid program (a defect of the pass, not of the model).
    """
    for step in passes:
        start = time.perf_counter()
        program = step.run(program)
        seconds = time.perf_counter() - start
        verify(program, step.name)
        program = replace(
            program, history=(*program.history, Stage(step.name, seconds, program.summary))
        )
        log.info("%s: %.2f s: %s", step.name, seconds, program.summary)
        if debug_level() >= 1:
            print(
                f"tensorize: {step.name:<12} {seconds:8.2f} s  {program.summary}", file=sys.stderr
            )
    if debug_level() >= 2 and program.plan is not None:
        for site in program.plan.sites:
            shape = "x".join(map(str, site.shape))
            print(
                f"tensorize:   {site.name} {shape} -> {site.format} {site.ranks} "
                f"error {site.predicted_error:.4f}: {site.reason}",
                file=sys.stderr,
            )
    return program


def verify(program: Program, step: str) -> None:
    """Check what must hold between any two passes.

    Raises:
        AnalysisError: naming the pass and the site that broke it.
    """

    def fail(cause: str, site: str | None = None) -> None:
        raise AnalysisError(
            f"the pass {step!r} left an invalid program: {cause}",
            site=site,
            way_out="this is a defect in tensorize: please report it with this message",
        )

    names = [site.name for site in program.sites]
    if len(set(names)) != len(names):
        fail("two sites have the same name")
    known = set(names)
    for label, table in (("statistics", program.statistics), ("spectra", program.spectra)):
        for name in table:
            if name not in known:
                fail(f"{label} of something that is no site", name)
    if program.plan is None:
        return
    sites = {site.name: site for site in program.sites}
    for choice in program.plan.sites:
        site = sites.get(choice.name)
        if sites and site is None:
            fail("the plan names something that is no site", choice.name)
        if choice.spec is not None and math.prod(choice.spec.shape) != math.prod(choice.shape):
            fail(f"the cores stand for {choice.spec.shape}, not {choice.shape}", choice.name)
        if site is not None and site.shape != choice.shape:
            fail(f"the plan's shape {choice.shape} is not {site.shape}", choice.name)
        if site is not None and site.blocked and choice.spec is not None:
            fail(f"factorized although {site.blocked}", choice.name)
    for name, error in program.errors.items():
        if not error >= 0:
            fail(f"its measured error is {error}", name)
