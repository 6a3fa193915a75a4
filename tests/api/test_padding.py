"""What stands in padding changes nothing of a compressed model, however its rows are routed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tensorize
from tests.marks import slow, slow_but
from tests.passes.observe import routed
from tests.passes.observe.routed import Routed, build, data

# Torch's encoder makes nested tensors by itself.
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")


def logits(result: Any) -> Tensor:
    return result["logits"] if isinstance(result, dict) else result


def compressed(model: nn.Module, padding: int, **options: Any) -> nn.Module:
    ranks = {
        name: max(1, min(p.shape) // 3)
        for name, p in model.named_parameters()
        if p.dim() == 2 and min(p.shape) > 3 and not name.startswith(("table", "head"))
    }
    given = data(model, padding, batches=8, left=options.pop("left", False))
    return tensorize.compile(
        model,
        None,
        calibration=given,
        exclude=["table", "head"],
        ranks=ranks,
        progress=False,
        **options,
    )


def same(kind: Callable[[], Routed], **options: Any) -> None:
    """On rows that no padding stands in, both compressed models give what rounding leaves."""
    model, seen = build(kind), data(build(kind), 0, batches=2)
    for batch in seen:
        for name, hides in (("attention_mask", 1), ("src_key_padding_mask", 0)):
            if name in batch:
                batch[name] = torch.full_like(batch[name], hides)
        batch["ids"] = batch["ids"].clamp(min=1)
        if "lengths" in batch:
            batch["lengths"] = torch.full_like(batch["lengths"], routed.T)
        if "labels" in batch:
            batch["labels"] = batch["ids"]
    one, two = (compressed(model, padding, **options) for padding in (0, routed.PADDING))
    predictions = [tensorize.report(small).plan.predicted.loss for small in (one, two)]
    if predictions[0] is not None:
        # Where points are nearly as good, rounding decides which plans are tried.
        assert predictions[0] == pytest.approx(predictions[1], rel=0.1)
    with torch.no_grad():
        for batch in seen:
            dense, a, b = (logits(each(**batch)) for each in (model, one, two))
            error, apart = float((a - dense).norm()), float((a - b).norm())
            assert error > 0
            assert apart <= 1e-3 * error


@pytest.mark.parametrize("kind", slow_but((routed.Encoder, routed.Packed), routed.EVERY))
@pytest.mark.parametrize("metric", ["loss", slow("input")])
def test_a_refit_of_what_is_padded(kind: Callable[[], Routed], metric: str) -> None:
    same(kind, metric=metric, refine="refit")


@pytest.mark.parametrize("kind", [routed.TimeFirst, routed.Encoder, routed.Shifted])
@pytest.mark.slow
def test_a_polish_of_what_is_padded(kind: Callable[[], Routed]) -> None:
    same(kind, refine="polish")


@pytest.mark.parametrize("kind", [slow(routed.TimeFirst), slow(routed.Masked), routed.Encoder])
def test_padding_on_the_left(kind: Callable[[], Routed]) -> None:
    same(kind, refine="refit", left=True)


def test_a_plan_of_a_kept_analysis_finds_the_rows_again(tmp_path: Any) -> None:
    model = build(routed.TimeFirst)
    given = data(model, routed.PADDING, batches=4)
    options: dict[str, Any] = {"calibration": given, "progress": False}
    analysis = tensorize.analyze(model, **options, cache_dir=tmp_path)
    plan = analysis.plan(0.7, refine="refit")
    again = tensorize.Plan.from_json(plan.to_json())
    one, two = tensorize.apply(model, plan), tensorize.apply(model, again, **options)
    for (name, a), (_, b) in zip(one.named_parameters(), two.named_parameters(), strict=True):
        assert torch.equal(a, b), name
