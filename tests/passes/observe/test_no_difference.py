"""What makes no difference to the moments, and what taking them leaves as it was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorize.base.errors import CaptureError
from tensorize.capture.batches import calibration_batches
from tensorize.passes.observe.loss import PreservedLoss
from tensorize.passes.observe.sites import FindSites
from tensorize.passes.observe.statistics import CollectStatistics
from tensorize.passes.stages import Given
from tests.passes.observe.moments import Classifier, Logits, collect, draw, same, the_term, touchy

# ------------------------------------------------------------------------------- samples as a whole


def test_gradients_of_frozen_weights_are_the_same() -> None:
    x = draw((9, 5))
    torch.manual_seed(0)
    model = Classifier()
    free = collect(model, [x])
    model.requires_grad_(False)
    same(free, collect(model, [x]), torch.float64)


def test_inputs_that_carry_gradients_make_no_difference() -> None:
    model, x = Classifier(), draw((9, 5))
    plain = collect(model, [x])
    leaf = x.clone().requires_grad_()
    same(plain, collect(model, [leaf]), torch.float64)
    same(plain, collect(model, [leaf * 1.0]), torch.float64)
    assert leaf.grad is None


def test_calls_by_keyword_make_no_difference() -> None:
    class Keywords(Classifier):
        def forward(self, x: Tensor) -> Logits:
            hidden = F.linear(input=x, weight=self.first.weight, bias=self.first.bias)
            hidden = torch.tanh(hidden)
            return Logits(F.linear(hidden, bias=self.second.bias, weight=self.second.weight))

    x = draw((9, 5))
    model, twin = Classifier(), Keywords()
    twin.load_state_dict(model.state_dict())
    same(collect(model, [x]), collect(twin, [x]), torch.float64)


def test_an_output_changed_in_place_makes_no_difference() -> None:
    class InPlace(Classifier):
        def forward(self, x: Tensor) -> Logits:
            return Logits(self.second(self.first(x).tanh_()).add_(1.0))

    x = draw((9, 5))
    model, twin = Classifier(), InPlace()
    twin.load_state_dict(model.state_dict())
    same(collect(model, [x]), collect(twin, [x]), torch.float32)


def test_an_input_changed_in_place_after_its_use_makes_no_difference() -> None:
    class Residual(nn.Module):
        def __init__(self, in_place: bool) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(5, 5).double(), nn.Linear(5, 4).double()
            self.in_place = in_place

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(x)
            y = self.first(x)
            x = x.add_(y) if self.in_place else x + y
            return self.second(x)

    x = draw((9, 5))
    model, twin = Residual(False), Residual(True)
    twin.load_state_dict(model.state_dict())
    for metric in ("input", "loss"):
        same(collect(model, [x], metric), collect(twin, [x], metric), torch.float64)


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not() -> None:
    model, x = Classifier(), draw((9, 5))
    one, two = (the_term(collect(model, [x], seed=3)["first.weight"]) for _ in range(2))
    assert one.rows is not None
    assert two.rows is not None
    assert torch.equal(one.rows, two.rows)
    other = the_term(collect(model, [x], seed=4)["first.weight"]).rows
    assert other is not None
    assert not torch.equal(one.rows, other)


# ------------------------------------------------------------------------ the model stays as it was


@dataclass
class State:
    """All that a calibration could change."""

    values: dict[str, Tensor]
    modes: list[bool]
    needs: list[bool]
    gradients: list[Tensor | None]
    random: Tensor

    @classmethod
    def of(cls, model: nn.Module) -> State:
        return cls(
            {key: value.clone() for key, value in model.state_dict().items()},
            [module.training for module in model.modules()],
            [p.requires_grad for p in model.parameters()],
            [None if p.grad is None else p.grad.clone() for p in model.parameters()],
            torch.get_rng_state(),
        )

    def check(self, other: State) -> None:
        assert self.modes == other.modes
        assert self.needs == other.needs
        assert torch.equal(self.random, other.random)
        assert self.values.keys() == other.values.keys()
        assert all(torch.equal(self.values[key], other.values[key]) for key in self.values)
        for a, b in zip(self.gradients, other.gradients, strict=True):
            assert (a is None) == (b is None)
            assert a is None or b is None or torch.equal(a, b)


@pytest.mark.parametrize("metric", ["input", "loss"])
def test_the_model_stays_as_it_was(metric: str) -> None:
    model = touchy()
    before = State.of(model)
    collect(model, [draw((8, 5), seed).float() for seed in range(3)], metric)
    before.check(State.of(model))
    assert all(not module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("metric", ["input", "loss"])
def test_the_model_stays_as_it_was_when_a_batch_fails(metric: str) -> None:
    model = touchy()
    before = State.of(model)
    good, bad = draw((8, 5)).float(), draw((8, 7)).float()
    batches = calibration_batches((good, good, bad, good), model)
    given = Given(model=model, inputs=batches[0], calibration=batches, metric=metric)
    found = FindSites().run(given)
    loss = PreservedLoss.fit(model, batches[:2], None) if metric == "loss" else None
    with pytest.raises(CaptureError, match="batch 2 does not fit"):
        CollectStatistics(batches, loss).run(found)
    before.check(State.of(model))


def test_the_model_stays_as_it_was_when_the_loss_of_the_caller_fails() -> None:
    model = touchy()
    before = State.of(model)

    def loss_fn(outputs: Tensor, batch: Any) -> Tensor:
        raise ZeroDivisionError("not mine")

    with pytest.raises(ZeroDivisionError):
        collect(model, [draw((8, 5)).float()], loss_fn=loss_fn)
    before.check(State.of(model))


def test_calibration_tensors_stay_as_they_were() -> None:
    model, x = Classifier(), draw((9, 5))
    before = x.clone()
    collect(model, [x])
    assert torch.equal(x, before)
    assert not x.requires_grad
