"""Ranks that follow a budget while a model trains.

Every so many steps the spectra of all cores are looked at, and the parameters that the schedule
allows are given to the ranks that hold the most: weights whose spectra end early shrink, others
grow. A cut keeps the best approximation of that rank, a grown weight the very same product; what
an optimizer keeps of the gradients goes along (``changes``). The budget falls along a cubic (Zhu &
Gupta 2017), as in AdaLoRA (Zhang et al. 2023). Low rank that stores no identity stays so: its
spectra are those of the plain cores, and its parameters r (m + n - r).
"""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tensorize.algebra.svd import tail_sums
from tensorize.api.outcome import totals_of
from tensorize.base.errors import BudgetError, TensorizeError
from tensorize.base.sharded import by_first_in, mesh_of, of_all_in, resharded, split_as, whole
from tensorize.ir.budget import Budget
from tensorize.ir.sites import Site
from tensorize.ir.spec import TTSpec
from tensorize.passes.allocate.candidates import COSTS, Points, curve_points
from tensorize.passes.allocate.choose import Tiers
from tensorize.passes.curves.curve import Spectrum
from tensorize.passes.curves.prior import ladder
from tensorize.reports.attach import CHANGED, attach, report, samples_of
from tensorize.running.in_use import use_kernels
from tensorize.store.contents import dtype_name, record_of
from tensorize.store.transformers_config import note_factors
from tensorize.training.bonds import Bond, bonds, components, extended
from tensorize.training.changes import change
from tensorize.training.resharding import in_place_of, split_dimensions
from tensorize.weight.install import factored, resize
from tensorize.weight.lazy import FactoredWeight
from tensorize.weight.whole_model import numbers

_GROWTH = 1.25
"""By how much a rank may grow at a time: its spectrum beyond what it has is a guess."""

_TRACE = "ranks followed a budget"

_SQUARES = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "acc_delta")
"""What optimizers call the squares of gradients that they keep."""


@dataclass(frozen=True)
class Adaptation:
    """What one change did: the parameters of all weights before and after, at a step."""

    step: int
    before: int
    after: int
    shrunk: int
    grown: int


class RankSchedule:
    """Changes the ranks of a factorized model while it trains; call ``step()`` after the optimizer.

        schedule = RankSchedule(model, optimizer, budget=0.25, start=100, end=900, every=50)
        for batch in batches:
            ...
            optimizer.step()
            schedule.step()

    Cores of other ranks are new parameters; they take the old ones' places in the model and in the
    optimizer's groups, so schedules of learning rates need not know. Wrappers that hold parameters
    themselves (DDP) are to be made anew; what FSDP2 or ``parallelize`` sharded is sharded again as
    it was, and all processes have to call ``step``. Weights that share a factor with others keep
    their ranks, and so do those whose entries are integers of a few bits.
    A run that stops is resumed by ``load_state_dict`` of the schedule first (it gives the cores
    their shapes), then of the model and the optimizer.

    Args:
        model: from ``initialize``, ``compile`` or ``load``.
        optimizer: whose states go along: those of the shapes of the parameters, as Adam's and
            momentum; others are dropped and begin anew. Momenta change as gradients do; squares
            of gradients as if entries were independent, and what is not stored of them
            (``weight.pivoted``) is guessed from its neighbours (``training/changes.py``).
        budget: the share of the dense model's parameters to reach, or a ``Budget`` of params.
        start, end: the steps between which the budget falls (or rises) from what the model has now.
        every: steps between two changes; after ``end`` ranks move at a constant budget.
        until: the last step at which ranks move; None: ``end``.
        rank_multiple: ranks above it are its multiples.
        seed: of the directions, or the columns, that weights grow by.

    Raises:
        BudgetError: the budget is malformed, or smaller than what the model has at rank one.
        TensorizeError: the model has no factorized weights, steps are out of order, the model is a
            stage of a pipeline, or ranks themselves are split over processes.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        budget: float | Budget,
        *,
        start: int,
        end: int,
        every: int = 100,
        until: int | None = None,
        rank_multiple: int = 8,
        seed: int = 0,
    ) -> None:
        if not 0 <= start <= end or every < 1 or rank_multiple < 1:
            raise TensorizeError(
                f"0 <= start <= end and every, rank_multiple >= 1, got start={start}, end={end}, "
                f"every={every}, rank_multiple={rank_multiple}",
                way_out="start=100, end=900",
            )
        if hasattr(model, "way_to_save"):
            raise TensorizeError(
                f"{type(model).__name__} is a part of a model, and the budget is for all of it",
                way_out="a mesh of dp and tp, without pp",
            )
        resharded(model)
        self.model, self.optimizer = model, optimizer
        self.start, self.end, self.every = start, end, every
        self.until = end if until is None else until
        self.rank_multiple, self.seed = rank_multiple, seed
        self.steps = 0
        self.trace: list[Adaptation] = []
        limits = Budget.of(budget).limits(report(model).plan.dense)
        if set(limits) != {"params"}:
            raise BudgetError(
                f"ranks follow a budget of parameters, and {budget} limits others",
                way_out="budget=0.25, or tensorize.Budget(params=...)",
            )
        self.target = int(limits["params"])
        self.first = numbers(model)
        if not (found := self._weights()):
            if any(weight.spec.precision is not None for _, weight in factored(model)):
                raise TensorizeError(
                    "entries of its weights are integers of a few bits, whose ranks stay",
                    way_out="change ranks first, and then compile with precision=",
                )
            raise TensorizeError(
                "the model has no factorized weight of its own",
                way_out="model = tensorize.initialize(model, 0.25) first",
            )
        for name, weight in found:
            _check_split(model, name, weight)
        least = self.first - sum(w.spec.parameters - _smallest(w.spec) for _, w in found)
        if self.target < least:
            raise BudgetError(
                f"{self.target:,} parameters are fewer than at rank one: {least:,}",
                way_out=f"budget=tensorize.Budget(params={least}) or more",
            )

    def allowed(self, step: int) -> int:
        """Parameters of the whole model that the schedule allows at a step."""
        if step >= self.end:
            return self.target
        share = max(0, step - self.start) / max(1, self.end - self.start)
        return round(self.target + (self.first - self.target) * (1 - share) ** 3)

    @torch.no_grad()
    def step(self) -> Adaptation | None:
        """Count one step of the optimizer; change ranks where it is time. Returns what changed."""
        self.steps += 1
        due = self.start <= self.steps <= self.until and (self.steps - self.start) % self.every == 0
        if not due and self.steps != self.end:
            return None
        resharded(self.model)
        change = self._adapt(self.allowed(self.steps))
        self.trace.append(change)
        _note(self.model, self.trace)
        return change

    def state_dict(self) -> dict[str, Any]:
        """Steps, ranks and trace, as JSON knows them."""
        return {
            "steps": self.steps,
            "first": self.first,
            "ranks": {name: list(w.spec.ranks) for name, w in self._weights()},
            "neighbours": {name: w.spec.pivoted for name, w in self._weights() if w.spec.pivoted},
            "trace": [list(vars(change).values()) for change in self.trace],
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a ``state_dict``: cores take the ranks of then, and their values are not set.

        Raises:
            TensorizeError: it is of a model with other weights.
        """
        resharded(self.model)
        known = dict(self._weights())
        if known.keys() != state["ranks"].keys():
            odd = min(known.keys() ^ state["ranks"].keys())
            raise TensorizeError(
                "the state is of a model with other weights",
                site=odd,
                way_out="load it into a schedule of a model made as that one was",
            )
        for name, ranks in state["ranks"].items():
            spec = known[name].spec.with_ranks(ranks)
            if together := state.get("neighbours", {}).get(name):
                spec = spec.in_order_of(together)
            if spec != known[name].spec:
                like = {"dtype": known[name].dtype, "device": known[name].device}
                cores = [torch.zeros(shape, **like) for shape in spec.core_shapes]
                orders = [
                    old.new_zeros(index.shape)
                    for old, index in zip(known[name].indices, spec.indices, strict=True)
                ]
                self._put(name, known[name].cores, spec, [*cores, *orders])
        self.steps, self.first = state["steps"], state["first"]
        self.trace = [Adaptation(*values) for values in state["trace"]]
        _note(self.model, self.trace)

    # ---------------------------------------------------------------------------- one change

    def _weights(self) -> list[tuple[str, FactoredWeight]]:
        """Every weight whose cores are its own alone, under its first name."""
        found: dict[tuple[int, ...], tuple[str, FactoredWeight]] = {}
        for name, factors in factored(self.model):
            if not factors.format.indexed:
                continue
            found.setdefault(tuple(id(core) for core in factors.cores), (name, factors))
        uses = Counter(core for cores in found for core in cores)
        return [pair for cores, pair in found.items() if all(uses[core] == 1 for core in cores)]

    def _adapt(self, allowed: int) -> Adaptation:
        before = numbers(self.model)
        weights = self._weights()
        spectra = {
            name: (bonds if factors.nonlinearity is None else components)(
                factors.spec.plain, _whole(factors).plain_cores
            )
            for name, factors in weights
        }
        points = [self._points(name, factors, spectra[name]) for name, factors in weights]
        others = before - sum(factors.spec.parameters for _, factors in weights)
        caps = np.full(len(COSTS), np.inf)
        caps[0] = allowed - others
        found = Tiers.of([points], [0]).least_lost(caps)
        # Between two changes the least there is may be above the cubic.
        smallest = [int(np.argmin(p.costs[:, 0])) for p in points]
        choice = smallest if found is None else found.choice
        choice = of_all_in(mesh_of(self.model.parameters()), list(choice))[0]
        shrunk = grown = 0
        for (name, factors), p, k in zip(weights, points, choice, strict=True):
            spec = p.spec(k)
            assert isinstance(spec, TTSpec)
            if spec.ranks != factors.spec.ranks:
                self._resize(name, factors, spectra[name], spec)
                less = spec.parameters < factors.spec.parameters
                shrunk, grown = shrunk + less, grown + (not less)
        return Adaptation(self.steps, before, numbers(self.model), shrunk, grown)

    def _points(self, name: str, factors: FactoredWeight, found: Sequence[Bond]) -> Points:
        """What the weight loses at each rank that it may have, by its own spectrum."""
        spec = factors.spec
        m, n = spec.single.shape
        site = Site(name, spec.shape, dtype_name(factors.dtype), uses=())
        if factors.format.spectral:
            most = min(m, n, max(spec.ranks[0] + self.rank_multiple, int(_GROWTH * spec.ranks[0])))
            lost = tail_sums(extended(found[0].squares, most)).cpu()
            if spec.pivoted:
                every = self._every_rank(spec, lost)
                how = {"train_points": every, "in_nats": False}
                curve = Spectrum(site, (spec.format,), (), lost[:1], **how)
            else:
                curve = Spectrum(site, (spec.format,), (), lost, in_nats=False)
        else:
            lost = [
                tail_sums(extended(b.squares, int(_GROWTH * len(b.squares)) + 1)) for b in found
            ]
            whole = torch.stack([t[0] for t in lost]).max()
            points = []
            for other in ladder(spec):
                fits = all(r < len(t) for r, t in zip(other.ranks, lost, strict=True))
                if fits:
                    cut = sum(float(t[r]) for r, t in zip(other.ranks, lost, strict=True))
                    points.append((other, cut))
            curve = Spectrum(
                site, (spec.format,), (), whole.reshape(1).cpu(),
                train_points=tuple(points), in_nats=False,
            )  # fmt: skip
        return curve_points(curve, (spec.format,), factors.dtype.itemsize, (), self.rank_multiple)

    def _every_rank(self, spec: TTSpec, lost: Tensor) -> tuple[tuple[TTSpec, float], ...]:
        """Low rank that stores no identity at each of the ranks that save parameters."""
        multiple = self.rank_multiple
        ranks = (r for r in range(1, len(lost)) if r % multiple == 0 or r < multiple)
        every = ((spec.with_ranks((r,)), float(lost[r])) for r in ranks)
        return tuple(p for p in every if p[0].parameters < math.prod(spec.shape))

    def _resize(
        self, name: str, factors: FactoredWeight, found: Sequence[Bond], spec: TTSpec
    ) -> None:
        parameters, mesh = factors.cores, mesh_of(factors.cores)
        text = f"{self.seed} {self.steps} {name}"
        generator = torch.Generator().manual_seed(zlib.crc32(text.encode()))
        how = change(_whole(factors), found, spec, generator)
        cores = [by_first_in(mesh, core) for core in how.cores]
        fresh = self._put(name, parameters, spec, cores)
        states = [self.optimizer.state.get(core, {}) for core in fresh]
        for key in sorted({key for state in states for key in state}):
            kept = [state.get(key) for state in states]
            alike = all(
                isinstance(v, Tensor) and v.shape == core.shape
                for v, core in zip(kept, parameters, strict=True)
            )
            if alike:
                moved = how.states([whole(v) for v in kept], squared=key in _SQUARES)  # type: ignore[arg-type]
                for state, value, core in zip(states, moved, fresh, strict=True):
                    state[key] = split_as(by_first_in(mesh, value), core)
            elif any(isinstance(v, Tensor) and v.dim() > 0 for v in kept):
                for state in states:
                    state.clear()  # it is of another shape: the optimizer begins anew
                break

    def _put(
        self, name: str, before: Sequence[Tensor], spec: TTSpec, cores: Sequence[Tensor]
    ) -> list[nn.Parameter]:
        """Put new cores in the places of old ones, in the model and in the optimizer."""
        old = [core for core in before if isinstance(core, nn.Parameter)]
        indices = cores[len(old) :]
        fresh = [in_place_of(self.model, p, c) for c, p in zip(cores, old, strict=False)]
        place = {id(p): new for p, new in zip(old, fresh, strict=True)}
        for group in self.optimizer.param_groups:
            group["params"] = [place.get(id(p), p) for p in group["params"]]
        for parameter, new in zip(old, fresh, strict=True):
            if parameter in self.optimizer.state:
                self.optimizer.state[new] = self.optimizer.state.pop(parameter)
        resize(self.model, name, spec, [*fresh, *indices])
        return fresh


def _whole(factors: FactoredWeight) -> FactoredWeight:
    """A weight with all of its cores in every process."""
    return factors.with_cores(tuple(whole(core) for core in factors.cores))


def _check_split(model: nn.Module, name: str, weight: FactoredWeight) -> None:
    """Raises TensorizeError where processes compute with a part of what changes with ranks."""
    spec = weight.spec
    both = (spec.with_ranks((rank,) * len(spec.ranks)).core_shapes for rank in (1, 2))
    for core, *shapes in zip(weight.cores, *both, strict=True):
        changes = {k for k, (one, two) in enumerate(zip(*shapes, strict=True)) if one != two}
        if not changes & split_dimensions(model, core):
            continue
        if spec.pivoted:
            raise TensorizeError(
                "over tp every process has as many columns of its identity, at this rank",
                site=name,
                way_out="tensorize.weight.plain(model) before parallelize, or a mesh of dp alone",
            )
        raise TensorizeError(
            "its rank is split over processes",
            site=name,
            way_out='parallelize(model, mesh, style="btp")',
        )


def _smallest(spec: TTSpec) -> int:
    return spec.with_ranks((1,) * len(spec.ranks)).parameters


def _note(model: nn.Module, trace: Sequence[Adaptation]) -> None:
    """What the ranks are now, in the model's report, and how they came about."""
    known = report(model)
    specs = {name: record_of(name, factors).spec for name, factors in factored(model)}
    planned = tuple(
        replace(choice, spec=specs.get(choice.name, choice.spec)) for choice in known.plan.sites
    )
    after = {choice.name: choice for choice in planned}
    sites = tuple(
        replace(
            site,
            ranks=after[site.name].ranks,
            parameters_after=after[site.name].parameters_after,
        )
        for site in known.sites
    )
    notes = [n for n in known.notes if not n.startswith(_TRACE) and n != CHANGED]
    if trace:
        steps = ", ".join(f"{c.step}: {c.after:,}" for c in trace)
        notes.append(
            f"{_TRACE} from {trace[0].before:,} parameters: after step {steps}; FLOPs, times and "
            "predictions are of the ranks before"
        )
    now = replace(
        known,
        plan=replace(known.plan, sites=planned),
        sites=sites,
        totals=replace(known.totals, after=totals_of(model, known.plan.predicted)),
        notes=tuple(notes),
        weights=samples_of(model),
    )
    attach(model, now)
    note_factors(model)
    use_kernels(model, now.backend)
