"""Small models whose weights are integers of a few bits, in every form that there is."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import tensorize
from tensorize.algebra.metric import Metric
from tensorize.api.analysis import AnalysedPlan, Analysis
from tensorize.ir.coded import DenseSpec, QuantizedSpec
from tensorize.ir.plan import RankPlan
from tensorize.ir.spec import Spec, TTSpec
from tensorize.passes.rewrite.factorize import quantized
from tensorize.weight.install import install
from tensorize.weight.whole_model import settle

Form = tuple[str, int, bool]
"""A precision, a rank (0: the matrix itself), and whether an identity is not stored."""

FORMS: list[Form] = [(name, 0, False) for name in ("int8", "int4", "int3", "int2")]
FORMS += [(name, 7, pivoted) for name in ("int8", "int4") for pivoted in (False, True)]
FORMS += [("int8", 1, False)]  # of one column, which torch multiplies wrongly
NAMES = [f"{name}{f' of rank {rank}' * bool(rank)}{', pivoted' * p}" for name, rank, p in FORMS]


class Net(nn.Module):
    """A tied table with a padding row, a norm and two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 24, padding_idx=0)
        self.up, self.norm, self.down = nn.Linear(24, 40), nn.LayerNorm(40), nn.Linear(40, 24)
        self.head = nn.Linear(24, 50, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        return self.head(x + self.down(torch.relu(self.norm(self.up(x)))))


IDS = torch.arange(15).reshape(3, 5)
WEIGHTS = {"table.weight": ["table.weight", "head.weight"], "up.weight": [], "down.weight": []}


def net(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    return Net().eval().to(dtype)


def spec_of(shape: tuple[int, ...], form: Form) -> Spec:
    precision, rank, pivoted = form
    *experts, m, n = shape
    inner: Spec = DenseSpec(shape)
    if rank:
        inner = TTSpec.low_rank(m, n, rank, experts=sum(experts), pivoted=pivoted)
    return QuantizedSpec(inner, precision)


def put(model: nn.Module, name: str, form: Form, aliases: list[str] | None = None) -> None:
    """Codes in place of a parameter, as good as they are without a metric."""
    weight = model.get_parameter(name).detach()
    matrix = weight if weight.dim() < 4 else weight.flatten(1)
    spec = spec_of(tuple(matrix.shape), form)
    cores: tuple[Tensor, ...] = (matrix.float(),)
    if spec.ranks:
        (rank,) = spec.ranks
        u, values, v = torch.linalg.svd(matrix.float(), full_matrices=False)
        cores = u[..., :rank] * values[..., None, :rank], v[..., :rank, :]
    held = quantized(spec, cores, (Metric(1.0, None, None),), weight.dtype)
    count = len(spec.core_shapes)
    cores = *(nn.Parameter(scale) for scale in held[:count]), *held[count:]
    install(model, aliases or [name], spec, cores)


def small_net(form: Form, dtype: torch.dtype = torch.float32) -> Any:
    model = net(dtype)
    for name, aliases in WEIGHTS.items():
        put(model, name, form, aliases)
    settle(model)
    return model


def plan_of(form: Form) -> AnalysedPlan:
    """A plan that gives every weight one form, whatever it loses."""
    analysis, model = _analysed(), net()
    plan = analysis.plan(None, ranks={"up.weight": 1})
    names = {site.name: len(site.names) for site in analysis.program.sites}
    sites: list[RankPlan] = []
    size = numbers = 0
    for site in plan.sites:
        spec = spec_of(site.shape, form)
        sites.append(replace(site, spec=spec, predicted_error=1.0))
        size, numbers = size + spec.bytes(4, names[site.name]), numbers + spec.parameters
    others = sum(p.numel() for name, p in model.named_parameters() if name not in names)
    total = {"parameters": numbers + others, "bytes": size + 4 * others}
    return replace(plan, sites=tuple(sites), predicted=replace(plan.predicted, **total))


@functools.cache
def _analysed() -> Analysis:
    return tensorize.analyze(net(), example_inputs=(IDS,), metric="frobenius", precision="auto")


@functools.cache
def _compressed(form: Form) -> nn.Module:
    return tensorize.apply(net(), plan_of(form))


def compressed(form: Form) -> Any:
    """A model by way of a plan: with a report."""
    return copy.deepcopy(_compressed(form))
