"""The loss to preserve: which tensors of a model's outputs count, which rows, and in which unit.

Shapes: B samples, T positions, H and W height and width, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tensorize
from tensorize.base.errors import AnalysisError, CaptureError
from tensorize.capture.batches import calibration_batches
from tensorize.passes.observe.loss import PreservedLoss, split
from tensorize.passes.observe.outputs import call, outputs_of, samples_of


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Given(nn.Module):
    """A linear, and outputs that are made of what it gives."""

    def __init__(self, made: Any, width: int = 8, out: int = 6, labels: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.linear = nn.Linear(width, 64), nn.Linear(64, out)
        self.made = made
        self.config = SimpleNamespace(num_labels=labels)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Any:
        return self.made(self.linear(self.inner(x).relu()))


def outputs(model: nn.Module, *given: Any) -> list[Any]:
    (batch,) = calibration_batches([given], model)
    return outputs_of(call(model, batch), batch, model)


def test_logits_of_one_class_are_scores_and_their_error_is_squared() -> None:
    """A reward model's or reranker's: a softmax over a single entry is 1, whatever it is."""
    model = Given(lambda y: {"logits": y}, out=1)
    batches = [draw(16, 8, seed=k) for k in range(8)]
    (output,) = outputs(model, batches[0])
    assert not output.logits
    analysis = tensorize.analyze(model, calibration=batches)
    assert analysis.program.predictor.unit == "relative squared error"
    assert not any("no counted output" in note for note in analysis.notes)
    plan = analysis.plan(0.6)
    assert plan.predicted.loss is not None
    assert plan.predicted.loss > 0


def test_classes_of_pixels_are_rows_of_classes() -> None:
    """As in transformers' segmentation: (B, C, H, W)."""

    def image(y: Tensor) -> Mapping[str, Tensor]:
        return {"logits": y.reshape(2, 3, 4, 6).movedim(-1, 1)}  # B, H, W, C to B, C, H, W

    (output,) = outputs(Given(image, labels=6), draw(2, 12, 8))
    assert output.shape == (2, 3, 4, 6)
    assert output.rows.shape == (24, 6)
    (unknown,) = outputs(Given(image), draw(2, 12, 8))  # nothing says which axis the classes are
    assert unknown.rows.shape == (2 * 6 * 3, 4)


def ends(y: Tensor) -> Mapping[str, Tensor]:
    """Where an answer starts and where it ends, as in transformers' question answering."""
    return {"start_logits": y[..., 0], "end_logits": y[..., 1]}


def test_scores_of_positions_are_one_a_row_and_padding_counts_in_none() -> None:
    model, mask = Given(ends), torch.ones(2, 5)
    mask[1, 3:] = 0
    start, end = outputs(model, draw(2, 5, 8), mask)
    assert start.rows.shape == end.rows.shape == (8, 1)
    (batch,) = calibration_batches([(draw(2, 5, 8), mask)], model)
    assert samples_of(call(model, batch), model) is None


def test_batches_of_several_lengths_calibrate_scores_of_positions() -> None:
    model = Given(ends)
    batches = [draw(2, time, 8, seed=time) for time in (7, 9, 8, 10)]
    loss = tensorize.analyze(model, calibration=batches).plan(0.6).predicted.loss
    assert loss is not None
    assert loss > 0


def test_outputs_of_several_widths_have_one_mean_entry() -> None:
    """A convolutional model's, whose rows are as long as its images are wide."""

    class Same(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Linear(1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return x

    shifted = [3 + draw(4, 50, width, seed=width) for width in (8, 12)]
    batches = calibration_batches(shifted, Same())
    (variance,) = PreservedLoss.fit(Same(), batches, None).variances.values()
    entries = torch.cat([x.flatten() for x in shifted]).double()
    assert variance == pytest.approx(float(entries.var(correction=0)) * 10, rel=1e-6)


def test_a_mask_counts_by_position_as_by_name() -> None:
    def rows(model: nn.Module, given: Any) -> int:
        (batch,) = calibration_batches([given], model)
        return len(outputs_of(call(model, batch), batch, model)[0].rows)

    model, x, mask = Given(lambda y: y), draw(2, 5, 8), torch.tensor([[1, 1, 1, 0, 0]] * 2)
    assert rows(model, (x, mask)) == rows(model, {"x": x, "attention_mask": mask}) == 6


def test_outputs_may_be_nested() -> None:
    model = Given(lambda y: {"boxes": {"left": y, "right": [y, {"far": y}]}})
    names = [output.name for output in outputs(model, draw(4, 8))]
    assert names == ["boxes.left", "boxes.right.output 0", "boxes.right.output 1.far"]


@pytest.mark.parametrize("forecast", ["prediction_outputs", "mean_predictions", "params"])
def test_hidden_states_that_end_in_a_forecast_are_no_outputs(forecast: str) -> None:
    """Of forecasters of transformers, which give both; of encoders hidden states are all there is.

    A forecast may be one tensor, or the parameters of a distribution.
    """
    whole = Given(lambda y: {forecast: (y, y.exp()), "encoder_last_hidden_state": y, "loc": y})
    names = [output.name for output in outputs(whole, draw(4, 8))]
    assert names == [f"{forecast}[0]", f"{forecast}[1]", "loc"]
    encoder = Given(lambda y: {"last_hidden_state": y, "pooler_output": y[:, :2]})
    names = [output.name for output in outputs(encoder, draw(4, 8))]
    assert names == ["last_hidden_state", "pooler_output"]


def test_with_a_loss_of_the_caller_outputs_may_be_anything() -> None:
    class Boxes:
        __slots__ = ("held",)

        def __init__(self, held: Tensor) -> None:
            self.held = held

    model = Given(Boxes)
    batches = [draw(16, 8, seed=k) for k in range(4)]
    analysis = tensorize.analyze(
        model, calibration=batches, loss_fn=lambda boxes, _: boxes.held.square().mean()
    )
    assert analysis.program.predictor.unit == "loss_fn"
    assert tensorize.apply(model, analysis.plan(0.6)) is not None


@pytest.mark.parametrize(
    "given", [lambda y: float(y.detach().sum()), lambda y: y], ids=["float", "matrix"]
)
def test_a_loss_that_is_no_scalar_tensor_is_refused(given: Any) -> None:
    with pytest.raises(AnalysisError, match=r"loss_fn gave .* for batch 0, which is no scalar"):
        tensorize.analyze(
            Given(lambda y: y), calibration=[draw(4, 8)], loss_fn=lambda outputs, _: given(outputs)
        )


@pytest.mark.parametrize("name", ["logits", "hidden"])
def test_outputs_that_are_not_finite_are_refused_with_their_batch(name: str) -> None:
    model = Given(lambda y: {name: y})
    good, bad = draw(4, 8), torch.full((4, 8), torch.nan)
    with pytest.raises(AnalysisError, match=rf"the dense model's {name} for batch 1 is not finite"):
        tensorize.analyze(model, calibration=[good, bad, good])


def test_a_batch_that_does_not_fit_is_named_by_its_place_among_those_given() -> None:
    model = Given(lambda y: {"logits": y})
    batches = [draw(4, 8, seed=k) for k in range(8)]
    for bad in range(8):
        given = [*batches[:bad], draw(4, 7), *batches[bad + 1 :]]
        with pytest.raises(CaptureError, match=f"batch {bad} does not fit"):
            tensorize.analyze(model, calibration=given, example_inputs=batches[0])


@pytest.mark.parametrize(
    ("count", "held"),
    [
        (2, [1]),
        (3, [1]),
        (4, [2]),
        (7, [3]),
        (9, [2, 6]),
        (16, [3, 4, 11, 12]),
        (28, [5, 6, 7, 8, 20, 21, 22]),
    ],
)
def test_a_quarter_is_held_out_in_runs_as_documents_are(count: int, held: list[int]) -> None:
    batches = calibration_batches([draw(1, 8)] * count, Given(lambda y: y))
    learnt, held_out = split(batches)
    assert [b.number for b in held_out] == held
    assert [b.number for b in learnt] == [k for k in range(count) if k not in held]
