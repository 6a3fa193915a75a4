"""Sequential refit: every weight's factors solved again on the inputs that it will really see.

The one-shot factors are best for the dense model's inputs. In the compressed model a weight sees
inputs x̃ that the weights before it have changed, while its outputs should still be those of the
dense model, W x. So weights are taken in the order of their use: with C̃ = E[x̃ x̃ᵀ] and
K = E[x x̃ᵀ], both from calibration data, the map that is best on x̃ is T = W K C̃⁻¹, and its best
rank-r factors in the metric (G of the gradients, C̃ of the inputs) follow from one whitened SVD, as
for the dense weight. No gradients are needed.

All of it is one pass: every calibration batch runs through the dense and through the compressed
model at once, and waits at each weight until that weight is solved.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from tensorize import ops
from tensorize.forward import untouched
from tensorize.ir import LOW_RANK, Batch, RankPlan, Site, TTSpec
from tensorize.lazy import FactoredWeight
from tensorize.observer import Observer
from tensorize.passes.curves import Spectrum, as_matrix
from tensorize.passes.decompositions import best_factors
from tensorize.passes.factorize import Cores, planned_cores
from tensorize.passes.joint import joint_factors
from tensorize.passes.metric import Metric, shrink, shrinkage
from tensorize.passes.moments import plus, products
from tensorize.passes.pipeline import Program
from tensorize.passes.preserved import call, row_mask
from tensorize.passes.rows import input_rows
from tensorize.uses import Frame, Matmul


@dataclass(frozen=True)
class Refit:
    """Program with ``cores``: the planned factors, solved again on ``batches``."""

    batches: tuple[Batch, ...]
    name: str = "refit"

    def run(self, program: Program) -> Program:
        assert program.plan is not None
        cores = refit(program, program.plan.sites, self.batches)
        summary = f"{len(cores)} weights in sequence, on {len(self.batches)} batches"
        return replace(program, cores=cores, summary=summary)


@torch.no_grad()
def refit(
    program: Program, sites: Sequence[RankPlan], batches: Sequence[Batch]
) -> dict[str, Cores]:
    """The cores of a plan, those of plain low-rank weights solved again."""
    specs = {choice.name: choice.spec for choice in sites if choice.spec is not None}
    parameters = {n: p for n, p in program.model.named_parameters() if n in specs}
    contractions = {name: ops.contractions(spec) for name, spec in specs.items()}
    by_name = {site.name: site for site in program.sites}
    order = [
        n
        for n in _order(program.model, batches[0], parameters)
        if _solvable(by_name[n], specs[n], program.spectra[n])
    ]
    together = _together(sites, order)
    order = [name for name in order if name in together]
    cores: dict[str, Cores] = {}

    def use_planned(*names: str) -> None:
        if wanted := [c for c in sites if c.name in names and c.name not in cores]:
            cores.update(planned_cores(program, wanted))

    def compressed(name: str, frame: Frame, matmul: Matmul) -> Tensor:
        if name not in cores:  # it is solved after this batch came by it, or never
            use_planned(name)
        shape = tuple(parameters[name].shape)
        whole = frame if shape == specs[name].shape else replace(frame, shape=shape)
        held = tuple(core.to(parameters[name].dtype) for core in cores[name])
        return FactoredWeight(specs[name], held, whole, contractions[name]).run(matmul)

    runs: list[tuple[_Run, _Run]] = []
    try:
        with untouched(program.model):
            for batch in batches:
                given = program.model, batch, parameters, order
                runs.append((_Run(*given, None), _Run(*given, compressed)))
            moments: _Moments | None = None
            for done, name in enumerate(order):
                program.progress("refit", done, len(order))
                there = [pair for pair in runs if all(one.reach(done) for one in pair)]
                if moments is None or not moments.are_of(there):
                    moments = _Moments(by_name[name], there)
                if moments.seen:
                    group = {n: program.spectra[n] for n in together[name]}
                    weights = [as_matrix(c.site, parameters[n].detach()) for n, c in group.items()]
                    solved = moments.solve(weights, list(group.values()), specs[name].ranks[0])
                    cores.update(zip(group, solved, strict=True))
    finally:
        for pair in runs:
            for one in pair:
                one.stop()
    use_planned(*specs)
    program.progress("refit", len(order), len(order))
    return cores


def _order(model: nn.Module, batch: Batch, parameters: Mapping[str, nn.Parameter]) -> list[str]:
    """Weights that one forward pass uses exactly once, as a plain matrix, in the order of use."""
    uses: dict[str, int] = {}

    def on_matmul(name: str, frame: Frame, matmul: Matmul, output: Tensor) -> Tensor:
        plain = frame.rows is None and frame.expert is None and not matmul.stacked
        plain = plain and matmul.contract != "lookup" and matmul.offsets is None
        uses[name] = uses.get(name, 0) + (1 if plain else 2)
        return output

    with untouched(model), Observer(parameters.items(), on_matmul):
        call(model, batch)
    return [name for name, count in uses.items() if count == 1]


def _together(sites: Sequence[RankPlan], order: Sequence[str]) -> dict[str, list[str]]:
    """The first used of weights with a common first factor → all of them; one alone: itself.

    Where one of them cannot be solved, none of its group is.
    """
    groups: dict[str, list[str]] = {}
    for choice in sites:
        if choice.spec is not None:
            groups.setdefault(choice.shared or choice.name, []).append(choice.name)
    used = {name: place for place, name in enumerate(order)}
    solvable = [names for names in groups.values() if all(name in used for name in names)]
    return {min(names, key=used.__getitem__): names for names in solvable}


def _solvable(site: Site, spec: TTSpec, curve: Spectrum) -> bool:
    """Whether it is a plain low-rank weight that is not exact already.

    One that some of the data use in another way has several metrics, and no single best map.
    """
    plain = spec.format == LOW_RANK and not site.experts and not site.last_resort
    return plain and spec.ranks[0] < min(site.matrix) and len(curve.metrics) == 1


class _Stop(BaseException):
    """Ends a run that is not needed any more; nothing in a model catches it."""


class _Run:
    """One batch going through the model in a thread of its own, waiting at every weight in turn.

    ``compressed`` computes what a factorized weight gives; None: the dense model runs.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Batch,
        parameters: Mapping[str, nn.Parameter],
        order: Sequence[str],
        compressed: Callable[[str, Frame, Matmul], Tensor] | None,
    ) -> None:
        self.batch, self.matmul = batch, None
        self._place = {name: k for k, name in enumerate(order)}
        self._compressed = compressed
        self._at = -1  # the weight that it waits at; len(order): it is done
        self._error: BaseException | None = None
        self._stopped = False
        self._go, self._waits = threading.Semaphore(0), threading.Semaphore(0)

        def run() -> None:
            self._go.acquire()
            try:
                if not self._stopped:
                    with torch.no_grad(), Observer(parameters.items(), self._on_matmul):
                        call(model, batch)
            except _Stop:
                pass
            except BaseException as error:
                self._error = error
            self.matmul, self._at = None, len(order)
            self._waits.release()

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def _on_matmul(self, name: str, frame: Frame, matmul: Matmul, output: Tensor) -> Tensor:
        place = self._place.get(name, -1)
        if place > self._at:
            self.matmul, self._at = matmul, place
            self._waits.release()
            self._go.acquire()
            self.matmul = None
            if self._stopped:
                raise _Stop
        return output if self._compressed is None else self._compressed(name, frame, matmul)

    def reach(self, place: int) -> bool:
        """Go on up to the weight at ``place``; False where the run does not come by it."""
        while self._at < place:
            self._go.release()
            self._waits.acquire()
            if self._error is not None:
                raise self._error
        return self._at == place

    def stop(self) -> None:
        self._stopped = True
        self._go.release()
        self._thread.join()


class _Moments:
    """K = Σ x x̃ᵀ and C̃ = Σ x̃ x̃ᵀ of one weight, in float64, and of others of the same input."""

    def __init__(self, site: Site, runs: Sequence[tuple[_Run, _Run]]) -> None:
        self.site, self.count = site, 0
        self._cross: Tensor | None = None
        self._own: Tensor | None = None
        self._contract = "columns"
        self._inputs = _inputs(runs)
        for pair in runs:
            self._add(*pair)

    def are_of(self, runs: Sequence[tuple[_Run, _Run]]) -> bool:
        """Whether what the runs wait with are products of the very same inputs."""
        return _inputs(runs)[1] == self._inputs[1]

    def _add(self, dense: _Run, small: _Run) -> None:
        assert dense.matmul is not None
        assert small.matmul is not None
        if self.count == 0:
            self._contract = dense.matmul.contract
        if {dense.matmul.contract, small.matmul.contract} != {self._contract}:
            return  # a batch that uses it in another way than those before
        x, seen = input_rows(self.site, dense.matmul), input_rows(self.site, small.matmul)
        if x is None or seen is None or x.shape != seen.shape:
            return  # rows of a convolution in three dimensions; a model that takes another way
        mask = row_mask(dense.matmul.x, dense.batch, dense.matmul.contract)
        if mask is not None and mask.numel() == len(x):
            x, seen = x[mask], seen[mask]
        self._cross = plus(self._cross, products(x, seen))
        self._own = plus(self._own, products(seen))
        self.count += len(x)

    @property
    def seen(self) -> bool:
        """Whether anything but zeros arrived in the compressed model, and nothing infinite."""
        return self._own is not None and 0 < float(self._own.diagonal().sum()) < math.inf

    def solve(
        self, weights: Sequence[Tensor], curves: Sequence[Spectrum], rank: int
    ) -> list[Cores]:
        """The best factors of the maps that take x̃ to W x; several have one first factor."""
        rows = self._contract == "rows"
        factor, cross = self._damped
        matrices = [(weight.t() if rows else weight).double() for weight in weights]
        # K C̃⁻¹ is one for all weights of an input; for few rows W K C̃⁻¹ from the left is less work.
        if sum(map(len, matrices)) >= len(factor):
            maps = [matrix @ self._transfer for matrix in matrices]
        else:
            maps = [torch.cholesky_solve((m @ cross).t(), factor).t() for m in matrices]
        targets = [m.to(w.dtype) for m, w in zip(maps, weights, strict=True)]
        metrics = []
        for curve in curves:
            (metric,) = curve.metrics
            outputs = metric.right if rows else metric.left
            metrics.append(Metric(metric.scale, outputs, factor.float()))
        if len(targets) > 1:
            shared, reader = joint_factors(targets, metrics, rank)
            shared = shared.to(targets[0].dtype)
            return [((t.double() @ reader).to(t.dtype), shared) for t in targets]
        left, right = best_factors(targets[0], metrics[0], rank)
        return [(right.t(), left.t()) if rows else (left, right)]

    @cached_property
    def _damped(self) -> tuple[Tensor, Tensor]:
        """The Cholesky factor of C̃, and K; what is added to both is noise that both models see."""
        assert self._cross is not None
        assert self._own is not None
        mean = float(self._own.diagonal().mean())
        share = shrinkage(self._own, self.count)
        cross, own = (shrink(moment, share, mean) for moment in (self._cross, self._own))
        return torch.linalg.cholesky(own), cross

    @cached_property
    def _transfer(self) -> Tensor:
        """K C̃⁻¹."""
        factor, cross = self._damped
        return torch.cholesky_solve(cross.t(), factor).t()


def _inputs(runs: Sequence[tuple[_Run, _Run]]) -> tuple[list[Tensor], list[object]]:
    """What a weight is multiplied with in every run, and what tells whether another's is the same.

    While the first are held, none of their numbers is given to another tensor.
    """
    matmuls = [one.matmul for pair in runs for one in pair if one.matmul is not None]
    same: list[object] = []
    for matmul in matmuls:
        if matmul.convolution is not None or matmul.x.is_inference():
            # Patches depend on the weight's shape; writes in place are not always counted.
            same.append(object())
        else:
            same.append((id(matmul.x), matmul.x._version, matmul.contract))
    return [matmul.x for matmul in matmuls], same
