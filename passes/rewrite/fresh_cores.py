"""Cores for a model that is to be trained from scratch, in place of its fresh dense weights.

**Scale.** The entries of W = Σ Π cores over the R values of the summed indices have the variance
R Π σ_k², for independent cores of standard deviations σ_k. With R Π σ_k² = s², s that of the fresh
dense weight, outputs and the gradients of inputs have the variance that they have in the dense
model. How s is split among the cores is free (see ``training.parameter_groups`` for the learning
rates that make it so): every core gets the same norm. With a non-linearity between two
factors the first gives it inputs of unit variance for inputs of unit variance, and the second
makes up for what it leaves of that.

**Without an identity**, W = U' [I | V'] has the entries of U' in the columns that are kept, and
sums of R products in the others: with σ of U' = s and σ of V' = 1/√R both have the variance s²,
and there is no other split. In trains and blocks the first core is U', all others are as V', each
of its own R. Which columns are kept is drawn at random: none is preferred.

**Spectral**: the best approximation of the fresh dense weight, scaled to its norm (Khodak et al.
2021).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorize.formats.registry import format_of
from tensorize.ir.plan import RankPlan
from tensorize.ir.sites import Site
from tensorize.ir.spec import Index, Spec, TTSpec
from tensorize.passes.curves.curve import as_matrix
from tensorize.passes.rewrite.factorize import keep_empty_rows
from tensorize.passes.rewrite.fresh_dense import Initializer, is_on_meta, made_fresh
from tensorize.passes.stages import Planned, Rewritten
from tensorize.weight.install import blank, followed, install, owner_of, takes_nonlinearity
from tensorize.weight.whole_model import settle

SCALED, SPECTRAL = "scaled", "spectral"
METHODS = (SCALED, SPECTRAL)
_PART = 1 << 22


@dataclass(frozen=True)
class InitializeCores:
    """Gives ``model`` (changed in place) values, with cores where the plan says so.

    ``device``: where values are made that are on meta, or meta itself: then there are none yet.
    ``initializer`` makes them where given. ``whole``: weights that store no identity by the plan
    store both factors. ``final`` is told the dense names of parameters whose values, or whose
    cores', stay as they are from then on.
    """

    model: nn.Module
    method: str = SCALED
    nonlinearity: str | None = None
    initializer: Initializer | None = None
    device: str = "cpu"
    whole: bool = False
    final: Callable[[set[str]], None] | None = None
    name: str = "initialize"

    def run(self, planned: Planned) -> Rewritten:
        model = self.model
        sites = {site.name: site for site in planned.sites}
        chosen = {choice.name: choice for choice in planned.plan.sites if choice.spec is not None}
        missing = {name: set(sites[name].names) for name in chosen}
        bent = 0
        with torch.random.fork_rng(), followed(model):
            torch.manual_seed(planned.seed)
            for final in self._final_values(model):
                done = final - {name for names in missing.values() for name in names}
                for name in list(missing):
                    missing[name] -= final
                    if not missing[name]:
                        del missing[name]
                        done |= set(sites[name].names)
                        bent += self._replace(model, sites[name], chosen[name])
                        planned.progress("initialize", len(chosen) - len(missing), len(chosen))
                if self.final is not None:
                    self.final(done)
        settle(model)
        summary = f"{len(chosen)} weights have {self.method} cores"
        done = planned.to(Rewritten, model=model, errors={}, summary=summary)
        if self.nonlinearity is None:
            return done
        return done.noted(
            f"{self.nonlinearity} between the factors of {bent} of {len(chosen)} weights"
        )

    def _final_values(self, model: nn.Module) -> Iterable[set[str]]:
        if is_on_meta(model) and self.device != "meta":
            return made_fresh(model, torch.device(self.device), self.initializer)
        return [{name for name, _ in model.named_parameters(remove_duplicate=False)}]

    def _replace(self, model: nn.Module, site: Site, choice: RankPlan) -> bool:
        """Swap one fresh weight for cores; whether there is a non-linearity between them."""
        assert choice.spec is not None
        owner, leaf = owner_of(model, site.name)
        dense = owner._parameters[leaf]
        assert dense is not None
        weight = as_matrix(site, dense.detach())
        bent = None
        if self.nonlinearity and takes_nonlinearity(model, site.names, choice.spec):
            bent = self.nonlinearity
        spec = choice.spec
        cores = self._cores(site, spec, weight, getattr(owner, "padding_idx", None), bent)
        if self.whole and spec.pivoted:
            cores, spec = list(format_of(spec).computed(spec, cores)), spec.plain
        count = len(spec.core_shapes)
        held = [nn.Parameter(core, requires_grad=dense.requires_grad) for core in cores[:count]]
        install(model, site.names, spec, [*held, *cores[count:]], bent)
        return bent is not None

    def _cores(
        self, site: Site, spec: Spec, weight: Tensor, padding: int | None, bent: str | None
    ) -> list[Tensor]:
        """Cores in place of a fresh weight, and indices after them."""
        if weight.is_meta:
            return blank(spec, weight.device, weight.dtype)
        size = root_mean_square(weight)
        if self.method == SPECTRAL and size > 0:
            cores = spectral_cores(spec, weight)
        else:  # a weight that begins as zero has no directions
            cores = scaled_cores(spec, size, weight, bent)  # type: ignore[arg-type]
        if padding is not None:  # the dense table's row is zero
            empty = torch.zeros(len(weight), dtype=torch.bool)
            empty[padding] = True
            keep_empty_rows(site, spec, cores, empty)
        return cores


def root_mean_square(weight: Tensor) -> float:
    """Of the entries; part by part, so that no copy in float32 is as large as the weight."""
    parts = weight.reshape(-1).split(_PART)
    squares = sum(float(part.float().square().sum(dtype=torch.float64)) for part in parts)
    return math.sqrt(squares / max(weight.numel(), 1))


def summed_sizes(spec: TTSpec) -> int:
    """R: the number of terms in every entry of the weight."""
    outer = {*spec.rows, *spec.columns, *spec.batch}
    return math.prod(size for name, size in spec.size.items() if name not in outer)


def core_scales(spec: TTSpec, scale: float) -> list[float]:
    """The σ_k of cores of one norm whose weight has entries of root mean square ``scale``.

    With N_k entries, σ_k² = t / N_k and R Π σ_k² = s²: t^d = s² Π N_k / R. Where an identity is not
    stored, there is one split only.
    """
    if spec.pivoted:
        return [scale, *(1 / math.sqrt(rank) for rank in spec.ranks)]
    sizes = [math.prod(shape) for shape in spec.single.core_shapes]
    logs = 2 * math.log(scale) + sum(map(math.log, sizes)) - math.log(summed_sizes(spec))
    norm = math.exp(logs / len(sizes))
    return [math.sqrt(norm / size) for size in sizes]


def scaled_cores(
    spec: TTSpec, scale: float, like: Tensor, nonlinearity: str | None = None
) -> list[Tensor]:
    """Random cores, and indices, whose weight has entries of root mean square ``scale``.

    A weight that starts at zero has a first core of zeros, so that the others' gradients are zero
    at the first step only.
    """
    if scale == 0.0:
        scales = core_scales(spec, 1 / math.sqrt(spec.single.shape[-1]))
        scales[0] = 0.0
    elif nonlinearity is not None:
        (rank,), n = spec.ranks, spec.shape[-1]
        left = scale * math.sqrt(n / (rank * _second_moment(getattr(F, nonlinearity))))
        scales = [left, 1 / math.sqrt(n)]
    else:
        scales = core_scales(spec, scale)
    kind = {"dtype": like.dtype, "device": like.device}
    cores = [
        torch.randn(shape, **kind).mul_(sigma)
        for shape, sigma in zip(spec.core_shapes, scales, strict=True)
    ]
    drawn = zip(spec.indices, spec.ranks, spec.widths, strict=True) if spec.pivoted else ()
    return [*cores, *(_drawn(*each, like.device) for each in drawn)]


def _drawn(index: Index, rank: int, width: int, device: torch.device) -> Tensor:
    """So many columns at random, and then the others, where they are wanted; both ascend."""
    drawn = torch.rand((*index.shape[:-1], width), device=device).argsort(-1)
    parts = drawn[..., :rank].sort(-1).values, drawn[..., rank:].sort(-1).values
    return torch.cat(parts, -1)[..., : index.shape[-1]].to(torch.int32)


def _second_moment(function: Callable[[Tensor], Tensor]) -> float:
    """E[f(z)²] for z of the standard normal distribution, by its quantiles."""
    places = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    return float(function(torch.special.ndtri(places)).square().mean())


def spectral_cores(spec: Spec, weight: Tensor) -> list[Tensor]:
    """The best cores of a fresh weight, scaled so that theirs has its norm; indices after them."""
    form = format_of(spec)
    cores = form.nearest(spec.plain, weight)
    kept = _kept(cores) if spec.batch else root_mean_square(form.reconstruct(spec.plain, cores))
    grown = (root_mean_square(weight) / max(kept, 1e-30)) ** (1 / len(cores))
    made = form.stored(spec, [core * grown for core in cores], weight.dtype)
    return [core.contiguous() for core in made]


def _kept(cores: list[Tensor]) -> float:
    """Root mean square of a stack of low-rank weights, by the Gram matrices of their factors."""
    left, right = cores
    squares = ((left.mT @ left) * (right @ right.mT)).sum()
    entries = left.shape[0] * left.shape[1] * right.shape[2]
    return math.sqrt(max(float(squares), 0.0) / entries)
