"""Low-rank weights with and without what a change of basis can remove: the same model."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

import tensorize
from tensorize.weight.install import factored
from tests.models import parameters, relative


class Net(nn.Module):
    """A tied table, linears, and a transposed one in which columns are rows."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.up, self.down = nn.Embedding(50, 24), nn.Linear(24, 40), nn.Linear(40, 24)
        self.head = nn.Linear(24, 50, bias=False)
        self.head.weight = self.table.weight
        self.turned = nn.Parameter(torch.randn(24, 24) / 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        x = x + self.down(torch.relu(self.up(x)))
        return self.head(x @ self.turned)


RANKS = {"table.weight": 9, "up.weight": 12, "down.weight": 14, "turned": 10}
IDS = torch.arange(15).reshape(3, 5)


def dense() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def compressed(**options: object) -> nn.Module:
    small = tensorize.compile(
        dense(), None, ranks=RANKS, metric="frobenius", example_inputs=(IDS,), **options
    )
    return tensorize.weight.pivoted(small)


def specs(model: nn.Module) -> dict[str, object]:
    return {name: weight.spec for name, weight in factored(model)}


def test_no_number_is_stored_that_a_change_of_basis_removes() -> None:
    small = compressed()
    sites = {site.name: site for site in tensorize.report(small).sites}
    for name, rank in RANKS.items():
        (m, n) = sites[name].shape
        assert sites[name].parameters_after == rank * (m + n - rank)
    assert parameters(small) == sum(s.parameters_after for s in sites.values()) + 24 + 40


def test_it_computes_what_its_densified_form_computes() -> None:
    small = compressed()
    with torch.no_grad():
        assert relative(small(IDS), tensorize.densify(small)(IDS)) < 1e-5


def test_the_two_forms_are_images_of_each_other() -> None:
    small = compressed()
    wanted, whole = small(IDS).detach(), parameters(small)
    assert tensorize.weight.plain(small) is small
    assert relative(small(IDS).detach(), wanted) < 1e-5
    sites = tensorize.report(small).sites
    assert [s.parameters_after for s in sites] == [s.ranks[0] * sum(s.shape) for s in sites]
    assert parameters(small) == tensorize.report(small).totals.after.parameters > whole
    tensorize.weight.pivoted(small)
    assert relative(small(IDS).detach(), wanted) < 1e-5
    assert parameters(small) == tensorize.report(small).totals.after.parameters == whole
    assert small.head.first.weight is small.table.weight_cores.core_1  # type: ignore[union-attr]


def test_it_trains() -> None:
    small = compressed()
    small(IDS).square().sum().backward()
    plain = tensorize.weight.plain(copy.deepcopy(small))
    plain(IDS).square().sum().backward()
    for name, weight in factored(small):
        other = dict(factored(plain))[name]
        left, rest = (core.grad for core in weight.cores)
        assert left is not None
        assert rest is not None
        full = other.cores[1].grad
        assert full is not None
        others = full.index_select(1, weight.indices[0])[:, weight.spec.ranks[0] :]
        assert relative(left, other.cores[0].grad) < 1e-4  # type: ignore[arg-type]
        assert relative(rest, others) < 1e-4


def test_hooks_of_the_two_layers_are_called() -> None:
    small = compressed()
    wanted = small(IDS).detach()
    seen: list[tuple[int, ...]] = []
    small.up.first.register_forward_hook(lambda layer, args, y: seen.append(tuple(args[0].shape)))
    assert relative(small(IDS).detach(), wanted) < 1e-6
    assert seen == [(3, 5, 24 - 12)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_saved_loaded_copied_and_pickled(tmp_path: Path, dtype: torch.dtype) -> None:
    model = dense().to(dtype)
    small = tensorize.compile(model, None, ranks=RANKS, metric="frobenius", example_inputs=(IDS,))
    tensorize.weight.pivoted(small)
    tensorize.save(small, tmp_path)
    for again in (
        tensorize.load(tmp_path, model=dense().to(dtype)),
        copy.deepcopy(small),
        pickle.loads(pickle.dumps(small)),
    ):
        assert torch.equal(again(IDS), small(IDS))
        assert specs(again) == specs(small)


def test_graphs_of_it_are_whole() -> None:
    small = compressed()
    wanted = small(IDS).detach()
    assert (
        relative(torch.compile(small, backend="eager", fullgraph=True)(IDS).detach(), wanted) < 1e-6
    )
    exported = torch.export.export(small, (IDS,))
    assert relative(exported.module()(IDS).detach(), wanted) < 1e-6


def test_symbolic_traces_of_its_layers_hold() -> None:
    small, x = compressed(), torch.randn(3, 24)
    layers = nn.Sequential(small.up, nn.ReLU(), small.down)  # type: ignore[arg-type]
    with torch.no_grad():
        assert relative(fx.symbolic_trace(layers)(x), layers(x)) < 1e-5


def test_its_order_counts_in_the_bytes() -> None:
    found = tensorize.report(compressed())
    # int32, of the columns of table and head, which are tied, up, down and turned.
    orders = 4 * (24 + 24 + 24 + 40 + 24)
    assert found.totals.after.bytes == 4 * found.totals.after.parameters + orders
    assert found.plan.predicted.bytes == found.totals.after.bytes


def test_full_rank_is_plain_and_exact() -> None:
    model = dense()
    small = tensorize.compile(model, None, ranks={"up.weight": "full"}, example_inputs=(IDS,))
    ((_, weight),) = factored(small)
    assert not weight.spec.pivoted
    with torch.no_grad():
        assert relative(small(IDS), model(IDS)) < 1e-4


def test_half_precision_keeps_neighbours_together(tmp_path: Path) -> None:
    how = {"metric": "frobenius", "example_inputs": (IDS,)}
    small = tensorize.compile(dense().bfloat16(), None, ranks=RANKS, **how)
    specs = {name: weight.spec for name, weight in factored(small)}
    assert {spec.pivoted for spec in specs.values()} <= {1, 2, 4}
    assert specs["up.weight"].pivoted > 1
    planned = {choice.name: choice.spec for choice in tensorize.report(small).plan.sites}
    assert all(specs[name] == planned[name] for name in RANKS)
    want, eps = small(IDS).float().detach(), torch.finfo(torch.bfloat16).eps
    with torch.no_grad():
        assert relative(tensorize.densify(small)(IDS).float(), want) < 4 * eps
        tensorize.save(small, tmp_path / "small")
        loaded = tensorize.load(tmp_path / "small", dense().bfloat16())
        assert torch.equal(loaded(IDS).float(), want)
        wide = copy.deepcopy(small).float()
        assert relative(wide(IDS), want) < 4 * eps
        assert relative(tensorize.weight.plain(wide)(IDS), want) < 4 * eps
        assert relative(torch.compile(small, backend="aot_eager")(IDS).float(), want) < 4 * eps
