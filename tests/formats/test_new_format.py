"""A format is one file and one line: one that the product does not know does all that others do."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tensorize
from tensorize.formats import registry
from tensorize.ir.plan import Plan
from tensorize.ir.spec import Spec
from tests.formats.diagonal import DiagonalLowRank, DiagonalSpec

NAME = DiagonalLowRank.name
SIDE, RANK = 32, 4
OF_ONE = SIDE + 2 * SIDE * RANK
KEPT = (3 * OF_ONE + SIDE) / (3 * SIDE**2 + SIDE) + 1e-3


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    registry.register(DiagonalLowRank())
    yield
    registry.withdraw(NAME)


class Net(nn.Module):
    """A table, a layer and a matmul whose weights are a diagonal plus low rank, up to noise."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(SIDE, SIDE)
        self.layer = nn.Linear(SIDE, SIDE)
        self.turn = nn.Parameter(torch.empty(SIDE, SIDE))
        draw = torch.Generator().manual_seed(0)
        for weight in (self.table.weight, self.layer.weight, self.turn):
            u, v, noise = (torch.randn(size, generator=draw) for size in SIZES)
            weight.data = torch.diag(1 + torch.rand(SIDE, generator=draw)) + u @ v + 1e-4 * noise
        self.eval()

    def forward(self, ids: Tensor) -> Tensor:
        return torch.tanh(self.layer(self.table(ids))) @ self.turn


SIZES = ((SIDE, RANK), (RANK, SIDE), (SIDE, SIDE))
IDS = torch.arange(2 * SIDE).reshape(4, -1) % SIDE
WEIGHTS = ("layer.weight", "table.weight", "turn")


def small(**options: object) -> nn.Module:
    return tensorize.compile(
        Net(), KEPT, formats=NAME, example_inputs=(IDS,), cache_dir=None, **options
    )


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def near(one: Tensor, other: Tensor) -> None:
    assert (one - other).norm() < 0.05 * other.norm()


def test_it_compiles_and_the_report_names_it() -> None:
    report = tensorize.report(small())
    assert sorted(site.name for site in report.sites) == list(WEIGHTS)
    for site in report.sites:
        assert (site.format, site.ranks) == (NAME, (RANK,))
        assert site.parameters_after == OF_ONE
        assert site.actual_error < 1e-3
    assert "diagonal low rank 4" in str(report)
    assert "diagonal low rank 4" in str(report.plan)


def test_low_rank_of_as_many_parameters_loses_more() -> None:
    low_rank = tensorize.compile(Net(), KEPT, formats="low_rank", example_inputs=(IDS,))
    worst = max(site.actual_error for site in tensorize.report(small()).sites)
    assert min(site.actual_error for site in tensorize.report(low_rank).sites) > 10 * worst


def test_outputs_are_those_of_the_dense_weights_that_it_stands_for() -> None:
    model = small()
    dense = tensorize.densify(model)
    close(model(IDS), dense(IDS))
    near(model(IDS), Net()(IDS))
    assert {type(p) for p in dense.parameters()} == {nn.Parameter}
    assert {name for name, p in dense.named_parameters() if p.dim() == 2} == set(WEIGHTS)


def test_saved_and_loaded_it_gives_the_same_outputs(tmp_path: Path) -> None:
    model = small()
    tensorize.save(model, tmp_path)
    again = tensorize.load(tmp_path, Net())
    assert torch.equal(again(IDS), model(IDS))
    assert tensorize.report(again).sites == tensorize.report(model).sites


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_give_the_same_outputs(copied: object) -> None:
    model = small()
    assert torch.equal(copied(model)(IDS), model(IDS))  # type: ignore[operator]


def test_gradients_reach_every_core() -> None:
    model = small()
    model(IDS).square().sum().backward()
    cores = [p for name, p in model.named_parameters() if "core" in name]
    assert len(cores) == 3 * len(WEIGHTS)
    assert all(core.grad is not None and core.grad.abs().sum() > 0 for core in cores)


def test_a_graph_is_compiled_of_it() -> None:
    model = small()
    close(torch.compile(model, backend="eager", fullgraph=True)(IDS), model(IDS))


def test_it_is_chosen_by_what_data_say_too() -> None:
    model = small(calibration=[(IDS,)], refine=None)
    assert {site.format for site in tensorize.report(model).sites} == {NAME}
    near(model(IDS), Net()(IDS))


def test_analyses_and_plans_are_kept(tmp_path: Path) -> None:
    model = Net()
    given = {"formats": NAME, "example_inputs": (IDS,), "cache_dir": tmp_path}
    first = tensorize.analyze(model, **given).plan(KEPT)
    again = tensorize.analyze(model, **given).plan(KEPT)
    assert first == again == Plan.from_json(first.to_json())
    applied = tensorize.apply(model, Plan.from_json(first.to_json()))
    assert torch.equal(applied(IDS), tensorize.apply(model, first)(IDS))


def test_ranks_may_be_asked_for() -> None:
    asked = tensorize.compile(
        Net(), None, formats=NAME, ranks={"layer.weight": 5}, example_inputs=(IDS,)
    )
    assert {s.name: s.ranks for s in tensorize.report(asked).sites}["layer.weight"] == (5,)


def test_kernels_do_not_cover_it_and_say_so() -> None:
    model = small(backend="triton")
    near(model(IDS), Net()(IDS))
    assert tensorize.kernels(model) == {}
    runs = [run for site in tensorize.report(model).sites for run in site.runs_by]
    assert {run.winner for run in runs} == {"library"}
    assert {run.why for run in runs} == {f"kernels know no {DiagonalLowRank.title}"}


def test_a_weight_that_it_does_not_fit_stays_dense() -> None:
    wide = nn.Sequential(nn.Linear(SIDE, 2 * SIDE))
    (site,) = tensorize.report(tensorize.compile(wide, 1.0, formats=NAME)).sites
    assert (site.format, site.reason) == ("dense", f"no rank of {NAME} saves parameters")


def test_withdrawn_it_is_no_format() -> None:
    registry.withdraw(NAME)
    with pytest.raises(tensorize.AnalysisError, match=f"formats='{NAME}' is no format"):
        small()
    registry.register(DiagonalLowRank())


def test_a_name_is_taken_once() -> None:
    with pytest.raises(ValueError, match="there is a format"):
        registry.register(DiagonalLowRank())


def test_a_spec_is_read_by_its_format() -> None:
    assert Spec.from_dict(DiagonalSpec(5, 2).to_dict()) == DiagonalSpec(5, 2)
