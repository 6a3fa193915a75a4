"""The compressed structure of a plan without data, and dense weights loaded into one."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tensorize
from tests.models import CASES, relative

FORMATS: dict[str, dict[str, Any]] = {
    "low rank": {"formats": "low_rank"},
    "first factors in common": {},
    "trains": {"formats": "tt"},
    "blocks": {"formats": "block"},
    "bits": {"precision": "auto"},
}


def compiled(name: str, **options: Any) -> nn.Module:
    case = CASES[name]
    given = {"budget": 0.4, "example_inputs": case.batch(), **options}
    return tensorize.compile(case.model(), **given)


def shapes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: (tuple(value.shape), value.dtype) for name, value in state.items()}


@pytest.mark.parametrize(
    ("name", "how"), [("mlp", "low rank"), ("gpt2", "bits"), *(("llama", how) for how in FORMATS)]
)
def test_a_state_dict_goes_into_the_structure_of_its_plan(name: str, how: str) -> None:
    case, small = CASES[name], compiled(name, **FORMATS[how])
    plan = tensorize.Plan.from_json(tensorize.report(small).plan.to_json())
    dense = case.model()
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.zero_()  # any values will do
    empty = tensorize.restructure(dense, plan)
    assert shapes(empty.state_dict()) == shapes(small.state_dict())
    assert all(p is not q for p in empty.parameters() for q in dense.parameters())
    empty.load_state_dict(small.state_dict())
    assert torch.equal(case.output(empty), case.output(small))
    assert type(empty) is type(small)
    report = tensorize.report(empty)
    assert report.totals.after.parameters == tensorize.report(small).totals.after.parameters
    assert not any("changed since" in note for note in report.notes)


def test_on_meta_nothing_is_allocated_until_it_is_loaded() -> None:
    case, small = CASES["mlp"], compiled("mlp", inplace=False)
    with torch.device("meta"):
        dense = type(case.model())()
    empty = tensorize.restructure(dense, tensorize.report(small).plan, inplace=True)
    assert empty is dense
    assert all(p.is_meta for p in empty.parameters())
    empty.load_state_dict(small.state_dict(), assign=True)
    assert torch.equal(case.output(empty), case.output(small))


def test_a_module_that_holds_the_model_restores_its_own_checkpoint(tmp_path: Any) -> None:
    """As Lightning does: build in ``__init__``, then ``load_state_dict`` of the whole module."""
    small = compiled("gpt")

    class Task(nn.Module):
        def __init__(self, plan: str) -> None:
            super().__init__()
            self.model = tensorize.restructure(CASES["gpt"].model(), tensorize.Plan.from_json(plan))

    plan = tensorize.report(small).plan.to_json()
    trained = Task(plan)
    trained.model = small
    torch.save({"state_dict": trained.state_dict(), "plan": plan}, tmp_path / "last.ckpt")
    kept = torch.load(tmp_path / "last.ckpt", weights_only=True)
    restored = Task(kept["plan"])
    restored.load_state_dict(kept["state_dict"])
    assert torch.equal(CASES["gpt"].output(restored.model), CASES["gpt"].output(small))


@pytest.mark.parametrize("how", ["first factors in common", "trains", "bits"])
def test_dense_weights_are_factorized_on_the_way(how: str) -> None:
    case = CASES["llama"]
    small = compiled("llama", **FORMATS[how], metric="frobenius")
    wanted = case.output(small)
    empty = tensorize.restructure(case.model(), tensorize.report(small).plan)
    assert tensorize.load_dense(empty, case.model().state_dict()) is empty
    assert relative(case.output(empty), wanted) < 1e-4
    errors = {site.name: site.actual_error for site in tensorize.report(small).sites}
    for site in tensorize.report(empty).sites:
        assert site.actual_error == pytest.approx(errors[site.name], rel=1e-3, abs=1e-6)
    assert tensorize.report(empty).plan.predicted.loss is None


def test_a_plan_of_another_model_is_refused() -> None:
    small = compiled("mlp")
    plan = tensorize.report(small).plan
    before = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(tensorize.AnalysisError, match="no such weight"):
        tensorize.restructure(before, plan)
    model = CASES["mlp"].model()
    model.first = nn.Linear(48, 90)
    kept = copy.deepcopy(model.state_dict())
    with pytest.raises(tensorize.AnalysisError, match=r"shape \(90, 48\)"):
        tensorize.restructure(model, plan)
    assert kept.keys() == model.state_dict().keys()
    with pytest.raises(tensorize.AnalysisError, match="not a Plan"):
        tensorize.restructure(model, 0.5)  # pyright: ignore[reportArgumentType]


def test_what_is_no_dense_state_is_refused() -> None:
    small = compiled("mlp")
    with pytest.raises(tensorize.CheckpointError, match="not the dense model's weights") as caught:
        tensorize.load_dense(small, small.state_dict())
    assert "load_state_dict" in str(caught.value.way_out)


def test_dir_shows_what_is_public() -> None:
    shown = [name for name in dir(tensorize) if not name.startswith("_")]
    assert {"compile", "restructure", "training", "weight", "Budget"} <= set(shown)
    assert not {"annotations", "import_module", "TYPE_CHECKING", "old_names", "Any"} & set(shown)
