"""Data that a model does not take: the error names the option, and its way out works as it is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import tensorize

X = torch.randn(16, 32, generator=torch.Generator().manual_seed(1))


class OfOne(nn.Module):
    """Takes a whole batch as one dict."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        return self.second(self.first(batch["x"]).relu())


class OfTwo(OfOne):
    """Takes one tensor, and may take a second."""

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        x = x if shift is None else x + shift
        return super().forward({"x": x})


def layers() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))


LABELS = torch.zeros(16).long()
WITH_TARGETS: list[Any] = [
    pytest.param(layers, DataLoader(TensorDataset(X, LABELS), 4), 1, id="x and a target"),
    pytest.param(layers, [(X, LABELS), (X, LABELS)], 1, id="tuples"),
    pytest.param(layers, [[X, LABELS]], 1, id="one batch"),
    pytest.param(OfTwo, [[X, X, LABELS]] * 2, 2, id="two and a target"),
]
CASES: list[Any] = [
    pytest.param(OfOne, [{"x": X}, {"x": X}], id="a dict as one argument"),
    pytest.param(OfTwo, [{"x": X, "token_type_ids": LABELS}] * 2, id="a name too many"),
    pytest.param(layers, [X.numpy(), X.numpy()], id="arrays"),
]


def fixed(error: tensorize.TensorizeError, option: str, data: Any) -> Any:
    """The data as the way out makes them."""
    code = re.search(rf"{option}=(.*)", str(error.way_out))
    assert code is not None, error
    return eval(code[1], {option: data, "torch": torch, "np": np})


@pytest.mark.parametrize(("make", "data"), CASES)
@pytest.mark.parametrize("metric", [None, "input"])
def test_calibration(make: type[nn.Module], data: Any, metric: str | None) -> None:
    with pytest.raises(tensorize.CaptureError, match=r"^calibration: batch 0 does") as found:
        tensorize.compile(make(), 0.5, calibration=data, metric=metric)
    right = fixed(found.value, "calibration", data)
    tensorize.compile(make(), 0.5, calibration=right, metric=metric)


@pytest.mark.parametrize(("make", "data"), CASES)
def test_batches_of_other_verbs(make: type[nn.Module], data: Any) -> None:
    model = make()
    small = tensorize.initialize(model, 0.5)
    with pytest.raises(tensorize.CaptureError, match=r"^batches: batch 0 does not fit") as caught:
        tensorize.evaluate(small, model, data, time=False)
    right = fixed(caught.value, "batches", data)
    tensorize.evaluate(small, model, right, time=False)
    with pytest.raises(tensorize.CaptureError, match=r"^batches: batch 0 does not fit") as caught:
        tensorize.heal(small, model, data, steps=1)
    tensorize.heal(small, model, fixed(caught.value, "batches", data), steps=1)


@pytest.mark.parametrize(("make", "data"), CASES)
def test_example_inputs(make: type[nn.Module], data: Any) -> None:
    given = next(iter(data))
    with pytest.raises(tensorize.CaptureError, match=r"^the example inputs do not fit") as caught:
        tensorize.compile(make(), 0.5, example_inputs=given, metric="frobenius")
    right = fixed(caught.value, "example_inputs", given)
    tensorize.compile(make(), 0.5, example_inputs=right, metric="frobenius")


@pytest.mark.parametrize(("make", "data", "taken"), WITH_TARGETS)
def test_targets_behind_what_forward_takes_are_left_out(make: Any, data: Any, taken: int) -> None:
    torch.manual_seed(0)
    model = make()
    small = tensorize.compile(model, 0.5, calibration=data)
    alone = tensorize.compile(model, 0.5, calibration=[tuple(batch[:taken]) for batch in data])
    assert all(
        torch.equal(a, b) for a, b in zip(small.parameters(), alone.parameters(), strict=True)
    )
    said = [note for note in tensorize.report(small).notes if "targets" in note]
    assert len(said) == 1
    assert not any("targets" in note for note in tensorize.report(alone).notes)
    picked = tensorize.compile(
        model, 0.5, calibration=data, to_inputs=lambda batch: tuple(batch[:taken])
    )
    assert all(
        torch.equal(a, b) for a, b in zip(small.parameters(), picked.parameters(), strict=True)
    )
    tensorize.evaluate(small, model, data, time=False)
    tensorize.heal(small, model, data, steps=1)


def test_a_loss_of_the_callers_gets_the_targets() -> None:
    seen: list[Any] = []

    def loss_fn(outputs: Tensor, batch: Any) -> Tensor:
        seen.append(batch[1])
        return nn.functional.cross_entropy(outputs, batch[1])

    data = [(X, LABELS)]
    tensorize.compile(layers(), 0.5, calibration=data, loss_fn=loss_fn)
    assert all(len(each) in (1, 16) for each in seen)  # its samples, where it is divided


def test_batches_that_are_something_else_are_made_inputs() -> None:
    data = [{"image": X, "name": "a"}, {"image": X + 1, "name": "b"}]

    def to_inputs(batch: Any) -> Tensor:
        return batch["image"]

    model = layers()
    plan = tensorize.analyze(model, calibration=data, to_inputs=to_inputs).plan(0.5)
    small = tensorize.apply(model, plan)
    tensorize.evaluate(small, model, data, to_inputs=to_inputs, time=False)
    tensorize.heal(small, model, data, steps=1, to_inputs=to_inputs)
    written = tensorize.Plan.from_json(plan.to_json())
    again = tensorize.apply(model, written, calibration=data, to_inputs=to_inputs)
    assert again(X).shape == (16, 32)
    with pytest.raises(tensorize.CaptureError, match="no function"):
        tensorize.compile(model, 0.5, calibration=data, to_inputs="image")  # pyright: ignore


def test_another_dtype_and_another_shape() -> None:
    with pytest.raises(tensorize.CaptureError) as caught:
        tensorize.compile(layers(), 0.5, calibration=[X.double()])
    assert "tensor.to(torch.float32)" in str(caught.value.way_out)
    with pytest.raises(tensorize.CaptureError, match="batch 1 does not fit") as caught:
        tensorize.compile(layers(), 0.5, calibration=[X, X[:, :3]])
    assert "a tensor, a tuple of positional or a dict" in str(caught.value.way_out)


def test_a_batch_of_another_device_is_told_the_models() -> None:
    with pytest.raises(tensorize.CaptureError) as caught:
        tensorize.compile(layers(), 0.5, calibration=[X.to("meta")])
    assert "tensor.to('cpu')" in str(caught.value.way_out)


def test_what_fits_is_taken_as_it_is() -> None:
    model = OfTwo()
    bits = [
        list(tensorize.compile(model, 0.5, calibration=data).parameters())
        for data in ([(X,), (X,)], [X, X], [{"x": X}, {"x": X}])
    ]
    for other in bits[1:]:
        assert all(torch.equal(a, b) for a, b in zip(bits[0], other, strict=True))


def test_a_distance_is_called_with_a_model_and_a_batch() -> None:
    model = layers()
    small = tensorize.initialize(layers(), 0.5)
    distance = tensorize.distillation_loss(model)
    with pytest.raises(tensorize.CaptureError, match=r"called as distance\(model, batch\)"):
        distance(small(X), X)
    assert distance(small, X).requires_grad
    with pytest.raises(tensorize.CaptureError, match=r"^the batch does not fit") as caught:
        distance(small, (X, LABELS))
    assert distance(small, fixed(caught.value, "batch", (X, LABELS))).requires_grad
    assert "distance(model, batch)" in str(tensorize.distillation_loss.__doc__)
