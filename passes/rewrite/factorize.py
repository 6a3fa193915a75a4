"""Put the planned factors in place of the dense weights: in the model, in a copy, in a file."""

from __future__ import annotations

import contextlib
import itertools
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import FrameType

import torch
from torch import Tensor, nn

from tensorize.algebra.metric import Metric
from tensorize.base.errors import AnalysisError
from tensorize.base.tensors import is_index, parameter_of
from tensorize.capture.matmul import Frame
from tensorize.formats.registry import format_of
from tensorize.ir.coded import QuantizedSpec
from tensorize.ir.plan import Plan, RankPlan
from tensorize.ir.sites import Site
from tensorize.ir.spec import Spec
from tensorize.passes.curves.curve import Spectrum, as_matrix
from tensorize.passes.curves.side_by_side import is_shared_by_ranks, is_small, side_by_side
from tensorize.passes.rewrite.copies import copy_sharing
from tensorize.passes.stages import Dense, Opened, Planned, Rewritten
from tensorize.weight.contractions import contractions
from tensorize.weight.install import first_factor, followed, install, owner_of, with_own_order
from tensorize.weight.lazy import FactoredWeight
from tensorize.weight.whole_model import settle

_SMALL = 4_000_000
_EXACT = 1e-3
"""An error below this is measured in float64, of a weight of no more entries than ``_SMALL``."""

Cores = tuple[Tensor, ...]
Components = Mapping[tuple[str, bool], Cores]
"""Factors that others of smaller ranks are cut from: of a weight, with its own first one or one
that it shares."""


@dataclass(frozen=True)
class Place:
    """Where the factors of a plan go: ``model`` has them in the end.

    ``put`` gives the weights of one of the ``units`` their factors, and says the errors that they
    really have; those of what is there already are in ``errors``.
    """

    model: nn.Module
    units: Sequence[Sequence[RankPlan]]
    put: Callable[[Sequence[RankPlan]], Mapping[str, float]]
    errors: Mapping[str, float] = field(default_factory=dict)


Sink = Callable[[Opened], contextlib.AbstractContextManager[Place]]
"""Opens the place where the factors of a plan go, and completes it."""


@contextlib.contextmanager
def in_model(opened: Opened) -> Iterator[Place]:
    """The model itself. Each dense weight is released as soon as its factors exist."""
    with followed(opened.model):
        yield _of(opened, opened.model)
    settle(opened.model)


@contextlib.contextmanager
def in_copy(opened: Opened) -> Iterator[Place]:
    """A copy to try a plan with: it is not settled, and the model stays as it is."""
    copied = copy_sharing(opened.model, {c.name for c in factorized(opened)})
    with followed(copied):
        yield _of(opened, copied)


def _of(opened: Opened, model: nn.Module) -> Place:
    sites = {site.name: site for site in opened.sites}

    def put(unit: Sequence[RankPlan]) -> dict[str, float]:
        (choice,) = unit
        # Refined factors are released as soon as the model has its copy.
        curve, cores = opened.spectra[choice.name], opened.cores.pop(choice.name, None)
        return {choice.name: replace_weight(model, sites[choice.name], choice, curve, cores)}

    return Place(model, [(choice,) for choice in factorized(opened)], put)


def factorized(planned: Planned) -> list[RankPlan]:
    """What the plan does with the weights that do not stay dense."""
    return [choice for choice in planned.plan.sites if choice.spec is not None]


@dataclass(frozen=True)
class Factorize:
    """Puts the factors in their place, and measures the errors.

    An interrupt takes effect between two weights, so the model can always run.
    """

    sink: Sink = in_model
    name: str = "factorize"

    def run(self, opened: Opened) -> Rewritten:
        with self.sink(opened) as place:
            errors, count = dict(place.errors), len(place.units)
            if is_shared_by_ranks():
                missing = [c for c in factorized(opened) if c.name not in opened.cores]
                opened.cores.update(planned_cores(opened, missing))
            for done, unit in enumerate(place.units):
                opened.progress("factorize", done, count)
                if unit[0].name not in errors:
                    errors |= place.put(unit)
        opened.progress("factorize", count, count)
        worst = max(errors.values(), default=0.0)
        summary = f"{len(errors)} weights replaced, largest measured error {worst:.4f}"
        plan = _as_installed(opened.plan, place.model)
        return opened.to(Rewritten, model=place.model, plan=plan, errors=errors, summary=summary)


def _as_installed(plan: Plan, model: nn.Module) -> Plan:
    """A plan with the orders of columns that the weights of its model really have."""
    sites = [
        choice
        if choice.spec is None or choice.spec.pivoted <= 1
        else replace(choice, spec=with_own_order(model, choice.name, choice.spec))
        for choice in plan.sites
    ]
    return replace(plan, sites=tuple(sites))


def planned_cores(
    dense: Dense, sites: Sequence[RankPlan], known: Components | None = None
) -> dict[str, Cores]:
    """The factors of every weight that a plan factorizes, as its curve gives them.

    ``known``: what ``best_components`` found for this plan among others.
    """
    parameters = dict(dense.model.named_parameters())
    found: dict[str, Cores] = {}
    todo: list[RankPlan] = []
    for choice in sites:
        if choice.spec is None:
            continue
        if known is not None and _kind(choice) in known and _is_cut(dense, choice):
            left, right = known[_kind(choice)]
            (rank,) = choice.spec.ranks
            found[choice.name] = left[..., :rank], right[..., :rank, :]
        else:
            todo.append(choice)

    def factors(choice: RankPlan) -> Cores:
        assert choice.spec is not None
        curve = dense.spectra[choice.name]
        return _cores(curve, choice, as_matrix(curve.site, parameters[choice.name].detach()))

    made = side_by_side(factors, todo, lambda choice: is_small(dense.spectra[choice.name].site))
    return found | {choice.name: cores for choice, cores in zip(todo, made, strict=True)}


def _cores(curve: Spectrum, choice: RankPlan, weight: Tensor) -> Cores:
    """The factors of a weight; of one whose entries are codes, what is held of them."""
    assert choice.spec is not None
    cores = curve.factors(choice.spec, weight, shared=choice.shared is not None)
    if choice.spec.precision is None:
        return cores
    return quantized(choice.spec, cores, curve.metrics, weight.dtype)


def quantized(spec: Spec, cores: Cores, metrics: Sequence[Metric], dtype: torch.dtype) -> Cores:
    """What is held of computed cores as codes that lose little in the metrics of their weight."""
    assert isinstance(spec, QuantizedSpec)
    inside = format_of(spec.inner).stored(spec.inner, cores, cores[0].dtype)
    return format_of(spec).rounded(spec, inside, metrics, dtype)


def stand_in(
    spec: Spec, cores: Sequence[Tensor], dense: Tensor, frame: Frame | None = None
) -> FactoredWeight:
    """What stands for a dense weight, looked at in a way, once it is compressed."""
    shape, count, frame = tuple(dense.shape), len(spec.core_shapes), frame or Frame()
    own = Frame.of(shape, spec.shape)
    whole = frame if own == Frame() else replace(frame, shape=own.shape, modes=own.modes)
    held = tuple(_cast(core, dense.dtype) for core in cores)
    return FactoredWeight(spec, held[:count], whole, contractions(spec), indices=held[count:])


def best_components(dense: Dense, plans: Iterable[Sequence[RankPlan]]) -> Components:
    """The factors at the largest rank that a weight has in any of several plans.

    Where those of smaller ranks are cut from them: one decomposition then serves all of the plans.
    """
    largest: dict[tuple[str, bool], RankPlan] = {}
    for choice in itertools.chain.from_iterable(plans):
        if choice.spec is not None and _is_cut(dense, choice):
            known = largest.get(_kind(choice))
            if known is None or known.ranks < choice.ranks:
                largest[_kind(choice)] = choice
    found: dict[tuple[str, bool], Cores] = {}
    for shared in (False, True):
        made = planned_cores(dense, [c for (_, kind), c in largest.items() if kind is shared])
        found |= {(name, shared): cores for name, cores in made.items()}
    return found


def _kind(choice: RankPlan) -> tuple[str, bool]:
    return choice.name, choice.shared is not None


def _is_cut(dense: Dense, choice: RankPlan) -> bool:
    """Whether its factors are the first components of those of larger ranks."""
    assert choice.spec is not None
    if choice.spec.precision is not None:
        return False
    if choice.shared is not None:
        return True
    curve = dense.spectra[choice.name]
    exact = choice.ranks[0] >= len(curve.distortion) - 1
    return not exact and format_of(choice.spec).nested(choice.spec.shape, len(curve.metrics))


def replace_weight(
    model: nn.Module, site: Site, choice: RankPlan, curve: Spectrum, cores: Cores | None = None
) -> float:
    """Swap one dense parameter for its cores; the relative error that they really have."""
    assert choice.spec is not None
    owner, leaf = owner_of(model, site.name)
    dense = owner._parameters.get(leaf)
    if dense is None or tuple(dense.shape) != site.shape:
        raise AnalysisError(
            "the model has no such weight any more",
            site=site.name,
            way_out="apply a plan to the model that it was made for",
        )
    weight = as_matrix(site, dense.detach())
    cores = cores or _cores(curve, choice, weight)
    form = format_of(choice.spec)
    if any(use.contract == "lookup" for use in site.uses):
        empty = (weight == 0).all(1)
        if empty.any():  # the analysis keeps its factors
            cores = tuple(core.clone() for core in cores)
            assert choice.made_as is not None
            keep_empty_rows(site, choice.made_as, cores, empty)
    first = _first_in_common(model, choice)
    made = form.stored(choice.spec, cores, weight.dtype, first)
    choice = replace(choice, spec=form.as_stored(choice.spec, made))
    assert choice.spec is not None
    held = put_cores(model, site, choice, [_own(core, weight) for core in made])
    # At exact ranks the error is below float32's rounding.
    below = choice.predicted_error < _EXACT and weight.numel() <= _SMALL
    exact = torch.float64 if below else torch.float32
    exact = torch.promote_types(exact, weight.dtype) if weight.is_complex() else exact
    rebuilt = form.reconstruct(choice.spec, [_cast(core.detach(), exact) for core in held])
    return curve.measured_error(weight, rebuilt)


def keep_empty_rows(site: Site, spec: Spec, cores: Sequence[Tensor], empty: Tensor) -> None:
    """Let the rows of a table that are zero, as those of padding, be zero in its factors.

    Args:
        empty: a mask over the rows.

    Raises:
        AnalysisError: in this factorization rows share all of their entries.
    """
    rows, form = empty.nonzero()[:, 0], format_of(spec)
    if not len(rows):
        return
    if form.rows_apart(spec) is None:
        raise AnalysisError(
            f"row {int(rows[0])} of the table is zero, as padding is, and would not stay so: in "
            f"{spec} the rows share their entries",
            site=site.name,
            way_out=f'formats={{"{site.name}": "low_rank"}}; or analyse again',
        )
    form.clear_rows(spec, cores, rows)


def put_cores(
    model: nn.Module, site: Site, choice: RankPlan, cores: Sequence[Tensor]
) -> list[Tensor]:
    """Put cores in the place of a dense parameter; a common first factor is the first one's."""
    assert choice.spec is not None
    trained = parameter_of(model, site.name).requires_grad
    held = [core if is_index(core) else nn.Parameter(core, trained) for core in cores]
    held[1:] = _first_in_common(model, choice) or held[1:]
    for core in held:
        if not (core.is_meta or torch.isfinite(core).all()):
            raise AnalysisError(
                f"its cores do not fit into {site.dtype}: they overflow",
                site=site.name,
                way_out="exclude it, or convert the model to bfloat16 or float32 first",
            )
    with _uninterrupted():
        install(model, site.names, choice.spec, held)
    return held


def _first_in_common(model: nn.Module, choice: RankPlan) -> tuple[Tensor, ...]:
    """What the first of weights with one first factor holds of it; nothing for itself."""
    if choice.shared is None or choice.shared == choice.name:
        return ()
    return first_factor(model, choice.shared)


def _own(core: Tensor, weight: Tensor) -> Tensor:
    """A contiguous copy in the weight's place: the analysis keeps its factors."""
    return torch.empty(core.shape, dtype=core.dtype, device=weight.device).copy_(core)


def _cast(core: Tensor, dtype: torch.dtype) -> Tensor:
    return core if is_index(core) else core.to(dtype)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hold back Ctrl-C until the block is done (on the main thread; elsewhere it never arrives)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[tuple[int, FrameType | None]] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: arrived.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if arrived and callable(before):
        before(*arrived[0])
