"""The stages of a compile: records of what is known between passes, each with what it holds.

given → found → observed → learned → analysed → planned → opened → rewritten. A pass takes one of
them and gives one: ``run``'s annotation says which. A field is there because the stage has it;
nothing is None until a later pass fills it in.

===============  ==================================================================================
``Given``        a model, what it runs on, and the metric that is asked for
``Found``        its weights that are used by matmuls, and the sizes of all parameters
``Observed``     the second moments of these weights' inputs and gradients
``Learned``      what every rank of every weight loses
``Analysed``     how the loss follows from that: all that plans need, and neither model nor data
``Planned``      the choice of formats and ranks
``Opened``       the model that is to be rewritten, and factors that were made for it
``Rewritten``    the model that holds the factors, and what each weight lost
===============  ==================================================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Self, TypeVar

from torch import Tensor, nn

from tensorize.base.progress import Progress, no_progress
from tensorize.ir.machine import GENERIC, Machine
from tensorize.ir.plan import Plan
from tensorize.ir.sites import Batch, Site
from tensorize.reports.data import Stage

if TYPE_CHECKING:  # what passes make, whose files need this one
    from tensorize.passes.curves.curve import Spectrum
    from tensorize.passes.observe.counted import Counted
    from tensorize.passes.observe.moments import Moments
    from tensorize.passes.predict.predictor import Predictor


@dataclass(frozen=True, kw_only=True)
class Record:
    """What every stage has: the last pass's line about itself, notes for the report, the steps
    so far, and whom to tell how far a pass is."""

    summary: str = ""
    notes: tuple[str, ...] = ()
    history: tuple[Stage, ...] = ()
    progress: Progress = no_progress

    def to(self, kind: type[S], **known: Any) -> S:
        """The stage ``kind``, of what this one holds of it and what is ``known`` now."""
        held = {each.name: getattr(self, each.name) for each in fields(self)}
        wanted = {each.name for each in fields(kind)}
        return kind(**{name: value for name, value in held.items() if name in wanted} | known)

    def noted(self, *notes: str) -> Self:
        """The same with more notes."""
        return replace(self, notes=(*self.notes, *notes))


S = TypeVar("S", bound=Record)


@dataclass(frozen=True, kw_only=True)
class _Asked(Record):
    """``machine`` is the one that times are predicted for."""

    metric: str = "frobenius"
    seed: int = 0
    machine: Machine = GENERIC


@dataclass(frozen=True, kw_only=True)
class WithSites(_Asked):
    """``sizes`` holds (elements, bytes) of every parameter of the dense model, once. ``counted``:
    which rows count, of those batches where not all do; None: nobody looked yet. ``few``: the rows
    that a weight met in the data, and its columns, of weights that met fewer. ``unforeseen``: of
    tables, the share of lookups to come that are of rows that were not met."""

    sites: tuple[Site, ...]
    sizes: Mapping[str, tuple[int, int]]
    counted: Mapping[Batch, Counted] | None = None
    few: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    unforeseen: Mapping[str, float] = field(default_factory=dict)

    @property
    def free(self) -> tuple[Site, ...]:
        """The weights that may be factorized."""
        return tuple(site for site in self.sites if site.blocked is None)


@dataclass(frozen=True, kw_only=True)
class Given(_Asked):
    """A model and what is asked of it. ``inputs``: what it is run on, where that is known."""

    model: nn.Module
    inputs: Batch | None = None
    calibration: tuple[Batch, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Found(WithSites, Given):
    """``sites``: one a parameter of at least two dimensions, those included that stay dense."""


@dataclass(frozen=True, kw_only=True)
class Observed(Found):
    """``statistics``: moments by site name; each is given up as its curve is made."""

    statistics: Mapping[str, Moments]


@dataclass(frozen=True, kw_only=True)
class Learned(Found):
    """``spectra``: the curve of every free site, by its name."""

    spectra: Mapping[str, Spectrum]


@dataclass(frozen=True, kw_only=True)
class Analysed(WithSites):
    """``predictor`` is None where there is no loss to predict."""

    spectra: Mapping[str, Spectrum]
    predictor: Predictor | None


@dataclass(frozen=True, kw_only=True)
class Planned(Analysed):
    """What is to be done to a model with these weights."""

    plan: Plan


@dataclass(frozen=True, kw_only=True)
class Opened(Planned):
    """``model`` is about to be rewritten. ``cores``: by name, the factors that are used instead of
    a curve's; each is given up as it is put in."""

    model: nn.Module
    cores: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)


Dense = Learned | Opened
"""The stages at which there are dense weights and their curves."""


@dataclass(frozen=True, kw_only=True)
class Rewritten(Planned):
    """``errors``: the measured relative error of every rewritten weight, in its metric."""

    model: nn.Module
    errors: Mapping[str, float]
