"""Bad input: a clear error that names the site, the cause and the way out; the model untouched."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tensorize
from tests.models import CASES, MLP


@pytest.mark.parametrize(
    "budget", [0, 0.0, -0.1, float("nan"), float("inf"), 1.5, "0.1", True, 2, [0.1]]
)
def test_a_malformed_budget(budget: Any) -> None:
    with pytest.raises(tensorize.BudgetError):
        tensorize.compile(MLP(), budget=budget)


def test_an_impossible_budget_names_what_is_in_the_way_and_the_smallest_value() -> None:
    with pytest.raises(tensorize.BudgetError, match="smallest feasible value is") as caught:
        tensorize.compile(MLP(), budget=0.01)
    assert "biases" in str(caught.value)
    share = float(str(caught.value.way_out).split("budget=")[1].split(",")[0])
    small = tensorize.compile(MLP(), budget=share)
    assert tensorize.report(small).totals.share.parameters <= share


def test_an_excluded_weight_is_named_when_it_is_in_the_way() -> None:
    with pytest.raises(tensorize.BudgetError, match=r"middle.*excluded by the caller"):
        tensorize.compile(MLP(), budget=0.1, exclude="middle")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value: float) -> None:
    model = MLP()
    with torch.no_grad():
        model.middle[3, 4] = value
    with pytest.raises(tensorize.AnalysisError, match=r"middle.*NaN or infinite"):
        tensorize.compile(model, budget=0.5)


def test_calibration_that_does_not_fit_says_which_batch() -> None:
    good, bad = torch.randn(4, 48), torch.randn(4, 47)
    with pytest.raises(tensorize.CaptureError, match="batch 2 does not fit"):
        tensorize.compile(MLP(), budget=0.5, calibration=[good, good, bad])


def test_example_inputs_that_do_not_fit() -> None:
    with pytest.raises(tensorize.CaptureError, match="example inputs do not fit"):
        tensorize.compile(MLP(), budget=0.5, example_inputs=(torch.randn(2, 3),))


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_shows_near_names(option: str) -> None:
    with pytest.raises(tensorize.AnalysisError, match=r"'midle' matches no weight") as caught:
        tensorize.compile(MLP(), budget=0.5, **{option: "midle"})
    assert "middle" in str(caught.value.way_out)


@pytest.mark.parametrize(
    "use",
    [
        lambda given: tensorize.compile(given, budget=0.5),
        tensorize.analyze,
        lambda given: tensorize.apply(given, tensorize.analyze(MLP()).plan(0.5)),
        lambda given: tensorize.restructure(given, tensorize.analyze(MLP()).plan(0.5)),
        lambda given: tensorize.heal(given, MLP(), [], steps=1),
        tensorize.densify,
    ],
    ids=["compile", "analyze", "apply", "restructure", "heal", "densify"],
)
def test_something_that_is_no_module(use: Callable[[Any], Any]) -> None:
    with pytest.raises(tensorize.CaptureError, match=r"must be a torch\.nn\.Module, got function"):
        use(lambda x: x)


def test_a_module_without_parameters() -> None:
    with pytest.raises(tensorize.CaptureError, match="no parameters"):
        tensorize.compile(nn.ReLU(), budget=0.5)


def test_parameters_on_meta() -> None:
    with pytest.raises(tensorize.CaptureError, match="middle: the parameter is on the meta"):
        tensorize.compile(MLP().to("meta"), budget=0.5)


def test_integer_weights_are_kept_dense_with_the_reason() -> None:
    model = MLP()
    model.table = nn.Parameter(torch.zeros(8, 8, dtype=torch.int32), requires_grad=False)
    small = tensorize.compile(model, budget=0.5)
    reasons = {site.name: site.reason for site in tensorize.report(small).sites}
    assert "int32" in reasons["table"]


def test_metrics_and_losses_that_lack_their_data() -> None:
    with pytest.raises(tensorize.AnalysisError, match="needs calibration"):
        tensorize.compile(MLP(), budget=0.5, metric="input")
    with pytest.raises(tensorize.AnalysisError, match="is not one of"):
        tensorize.compile(MLP(), budget=0.5, metric="entropy")
    with pytest.raises(tensorize.BudgetError, match="loss"):
        tensorize.compile(MLP(), budget=tensorize.Budget(loss=0.1))


def test_strings_without_a_tokenizer() -> None:
    with pytest.raises(tensorize.CaptureError, match="tokenizer"):
        tensorize.compile(CASES["bert"].model(), budget=0.5, calibration=["some text"])


def test_one_batch_instead_of_an_iterable_of_batches() -> None:
    with pytest.raises(tensorize.CaptureError, match="wrap it in a list"):
        tensorize.compile(MLP(), budget=0.5, calibration=torch.randn(4, 48))


def test_empty_calibration() -> None:
    with pytest.raises(tensorize.CaptureError, match="empty"):
        tensorize.compile(MLP(), budget=0.5, calibration=[])


def test_unknown_formats_ranks_and_backends() -> None:
    with pytest.raises(tensorize.AnalysisError, match="no format"):
        tensorize.compile(MLP(), budget=0.5, formats="cp")
    with pytest.raises(tensorize.AnalysisError, match="positive integer or 'full'"):
        tensorize.compile(MLP(), budget=None, ranks={"*": 0})
    with pytest.raises(tensorize.AnalysisError, match="matches no weight"):
        tensorize.compile(MLP(), budget=None, ranks={"nothing": 3})
    with pytest.raises(tensorize.TensorizeError, match="backend"):
        tensorize.compile(MLP(), budget=0.5, backend="tpu")
    with pytest.raises(tensorize.BudgetError, match="needs ranks"):
        tensorize.compile(MLP(), budget=None)


def test_a_plan_for_other_weights() -> None:
    torch.manual_seed(0)
    plan = tensorize.analyze(MLP()).plan(0.5)
    with pytest.raises(tensorize.AnalysisError, match="other weights"):
        tensorize.apply(MLP(), plan)


def test_looking_at_a_model_that_is_not_ours() -> None:
    for look in (tensorize.report, tensorize.graphs):
        with pytest.raises(tensorize.TensorizeError, match="not made by tensorize"):
            look(MLP())


def test_cores_that_overflow_their_dtype() -> None:
    model = nn.Sequential(nn.Linear(64, 64, bias=False)).half()
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(64, 64) * 1e4)
    with pytest.raises(tensorize.TensorizeError) as caught:
        tensorize.compile(model, budget=None, ranks={"*": "full"})
    assert "0.weight" in str(caught.value)


# --------------------------------------------------------- found before the expensive stage


def refused_early(error: type[Exception], match: str, **options: Any) -> None:
    """A compile with calibration data that is refused before any statistics are taken."""
    stages: list[str] = []
    options = {"budget": 0.5, "calibration": [torch.randn(8, 48) for _ in range(4)], **options}
    with pytest.raises(error, match=match) as caught:
        tensorize.compile(MLP(), progress=lambda stage, *_: stages.append(stage), **options)
    assert "way out" in str(caught.value)
    assert "statistics" not in stages


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"formats": "lowrank"}, "formats='lowrank' is no format"),
        ({"formats": 5}, "formats=5 is no format"),
        ({"ranks": {"midle": 3}}, "'midle' matches no weight"),
        ({"ranks": {"middle": 0}}, "must be a positive integer"),
        ({"ranks": 8}, "maps patterns to ranks"),
    ],
)
def test_options_that_name_nothing(options: dict[str, Any], match: str) -> None:
    refused_early(tensorize.AnalysisError, match, **options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"budget": None}, "needs ranks="),
        ({"budget": tensorize.Budget(error=0.5), "refine": "polish"}, "the budget limits each"),
        ({"max_memory": "much"}, "is no size"),
    ],
)
def test_budgets_that_cannot_be_met_whatever_is_learnt(options: dict[str, Any], match: str) -> None:
    refused_early(tensorize.BudgetError, match, **options)


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused_early(tensorize.CheckpointError, "cache directory", cache_dir=tmp_path / "file")


@pytest.mark.parametrize(
    "options", [{"batch_sizes": 16}, {"batch_sizes": ()}, {"rank_multiple": "8"}]
)
def test_options_of_plans(options: dict[str, Any]) -> None:
    analysis = tensorize.analyze(MLP(), example_inputs=(torch.randn(2, 48),))
    with pytest.raises(tensorize.BudgetError, match="must be") as caught:
        analysis.plan(0.5, **options)
    assert "way out" in str(caught.value)


@pytest.mark.parametrize("option", ["include", "exclude"])
@pytest.mark.parametrize("value", [5, re.compile("middle"), [3]])
def test_what_chooses_no_weight(option: str, value: Any) -> None:
    with pytest.raises(tensorize.AnalysisError, match="shell patterns or by a predicate") as caught:
        tensorize.compile(MLP(), 0.5, **{option: value})
    assert "way out" in str(caught.value)


def test_what_is_no_data_no_plan_no_teacher_and_no_model() -> None:
    model, analysis = MLP(), tensorize.analyze(MLP(), metric="frobenius")
    small = tensorize.compile(model, 0.5, metric="frobenius")
    data: Any = 5
    for error, match, call in (
        (tensorize.CaptureError, "iterable of batches", lambda: analyze(calibration=data)),
        (tensorize.AnalysisError, "not a Plan", lambda: tensorize.apply(model, data)),
        (tensorize.AnalysisError, "is no plan", lambda: tensorize.Plan.from_json("{}")),
        (tensorize.BudgetError, "shares of the parameters", lambda: analysis.curve(data)),
        (
            tensorize.CaptureError,
            "torch.nn.Module",
            lambda: tensorize.heal(small, data, [], steps=1),
        ),
        (tensorize.TensorizeError, "has no report", lambda: tensorize.report(data)),
        (
            tensorize.BudgetError,
            "batch_sizes",
            lambda: tensorize.initialize(model, batch_sizes=data),
        ),
    ):
        with pytest.raises(error, match=match) as caught:
            call()
        assert "way out" in str(caught.value)


def analyze(**options: Any) -> tensorize.Analysis:
    return tensorize.analyze(MLP(), **options)


def test_a_dtype_that_is_none(tmp_path: Path) -> None:
    tensorize.save(tensorize.compile(MLP(), 0.5, metric="frobenius"), tmp_path)
    wrong: Any = "bfloat16"
    with pytest.raises(tensorize.CheckpointError, match="is no floating-point dtype"):
        tensorize.load(tmp_path, MLP(), dtype=wrong)


def test_a_refinement_of_a_plan_that_limits_errors() -> None:
    model, data = MLP(), [torch.randn(32, 48) for _ in range(4)]
    plan = tensorize.analyze(model, calibration=data).plan(tensorize.Budget(error=0.5))
    assert tensorize.Plan.from_json(plan.to_json()).limits_errors
    with pytest.raises(tensorize.BudgetError, match="the budget limits each"):
        tensorize.apply(model, plan, refine="refit")


def test_graphs_of_inputs_that_do_not_fit() -> None:
    small = tensorize.compile(MLP(), 0.5, metric="frobenius")
    with pytest.raises(tensorize.CaptureError, match="example inputs do not fit"):
        tensorize.graphs(small, (torch.randn(2, 3),))


def test_ranks_for_weights_that_stay_dense_only() -> None:
    with pytest.raises(tensorize.AnalysisError, match="only weights that stay dense: excluded"):
        tensorize.compile(MLP(), None, ranks={"midd*": 2}, exclude="middle")


def test_a_limit_that_a_dense_model_does_not_use_at_all() -> None:
    """A table is looked up without a FLOP: no share of the dense model's can be named."""
    with pytest.raises(tensorize.BudgetError, match="dense it costs none"):
        tensorize.compile(
            nn.Embedding(100, 32), tensorize.Budget(flops=1.0), formats="low_rank",
            metric="frobenius",
        )  # fmt: skip


def test_a_parameter_of_integers_beside_a_limit_on_the_error() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model.register_parameter(
        "packed", nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    )
    small = tensorize.compile(model, tensorize.Budget(error=0.9), metric="frobenius")
    assert tensorize.report(small).totals.share.parameters < 1


# ------------------------------------------------------------------------------------- modes


def test_under_autocast_it_is_refused() -> None:
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(tensorize.AnalysisError, match=r"under torch\.autocast"),
    ):
        tensorize.compile(MLP(), 0.5, metric="frobenius")


def test_inference_mode_changes_nothing() -> None:
    data = [torch.randn(8, 48) for _ in range(4)]
    model = MLP()
    usual = tensorize.compile(model, 0.5, calibration=data)
    with torch.inference_mode():
        small = tensorize.compile(model, 0.5, calibration=data)
    for one, other in zip(usual.parameters(), small.parameters(), strict=True):
        assert torch.equal(one, other)
        assert not other.is_inference()
    small(data[0]).sum().backward()


def test_parameters_made_in_inference_mode_are_refused() -> None:
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(48, 48))
    with pytest.raises(tensorize.CaptureError, match=r"0\.weight: .*torch\.inference_mode"):
        tensorize.compile(model, 0.5)


# ---------------------------------------------------------------------- a loss of the caller's


def test_a_plan_for_a_loss_of_the_caller_asks_for_it_again() -> None:
    def loss_fn(outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        return (outputs[:, 0] - 1).square().mean()

    model, data = MLP(), [torch.randn(32, 48) for _ in range(8)]
    plan = tensorize.analyze(model, calibration=data, loss_fn=loss_fn).plan(0.5)
    kept = tensorize.Plan.from_json(plan.to_json())
    assert kept == plan
    with pytest.raises(tensorize.AnalysisError, match="made for a loss_fn"):
        tensorize.apply(model, kept, calibration=data)
    without = tensorize.analyze(model, calibration=data).plan(0.5)
    with pytest.raises(tensorize.AnalysisError, match="made without a loss_fn"):
        tensorize.apply(model, without, loss_fn=loss_fn)
    one = tensorize.apply(model, plan)
    again = tensorize.apply(model, kept, calibration=data, loss_fn=loss_fn)
    for a, b in zip(one.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
