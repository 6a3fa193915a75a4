"""Forecasters of time series, compressed: PatchTST, Informer and TimesFM shapes of transformers.

    python -m examples.time_series --shape informer --budgets 0.75 0.5

The series are made here: a day and a week of random strength, a slow drift, and noise. PatchTST and
TimesFM forecast numbers, and what is preserved are these, as a share of their variance. An Informer
forecasts the parameters of a Student's t: there only its likelihood of what came says what they are
worth, so `loss_fn=` takes the model's own loss, and what is predicted is the rise of that, in nats.

Shapes: B series, T steps.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

import tensorize
from examples.budgets import Row, shown
from examples.fitting import fit

DAY, WEEK = 24, 168
PAST, FUTURE = 96, 24
WIDTH, LAYERS = 48, 2
_LAGS = [1, 2, DAY]
_SIZES: dict[str, Any] = {
    "d_model": WIDTH, "encoder_layers": LAYERS, "decoder_layers": LAYERS,
    "encoder_ffn_dim": 2 * WIDTH, "decoder_ffn_dim": 2 * WIDTH,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4,
}  # fmt: skip
Data = Mapping[str, Any]


def series(number: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Series (B, T) of unit size, and the hours (T,) that they begin with."""
    steps = PAST + max(_LAGS) + FUTURE
    first = torch.randint(WEEK, (number, 1), generator=generator)
    hours = first + torch.arange(steps)
    draw = torch.randn(number, 5, 1, generator=generator)
    day, week = (2 * math.pi * hours / period for period in (DAY, WEEK))
    waves = draw[:, 0] * day.sin() + draw[:, 1] * (2 * day).cos() + draw[:, 2] * week.sin()
    drift = draw[:, 3] * torch.linspace(-1, 1, steps)
    noise = 0.2 * torch.randn(number, steps, generator=generator)
    return waves + drift + draw[:, 4] + noise, hours


# ------------------------------------------------------------------------------------ the shapes


@dataclass(frozen=True)
class Shape:
    """A model, how it is given series and their hours, and what compression is to preserve."""

    model: nn.Module
    given: Callable[[Tensor, Tensor], Data]
    loss_fn: Callable[[Any, Data], Tensor] | None = None


def patchtst() -> Shape:
    """An encoder of patches of a series."""
    config = hf.PatchTSTConfig(
        num_input_channels=1, context_length=PAST, prediction_length=FUTURE, patch_length=8,
        patch_stride=8, d_model=WIDTH, ffn_dim=2 * WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=4, pooling_type=None,
    )  # fmt: skip

    def given(values: Tensor, hours: Tensor) -> Data:
        past, future = _split(values.unsqueeze(-1))
        return {"past_values": past[:, -PAST:], "future_values": future}

    return Shape(hf.PatchTSTForPrediction(config), given)


def informer() -> Shape:
    """An encoder and a decoder with sparse attention; each step is a distribution."""
    config = hf.InformerConfig(
        context_length=PAST, prediction_length=FUTURE, lags_sequence=_LAGS, num_time_features=2,
        **_SIZES,
    )  # fmt: skip

    def given(values: Tensor, hours: Tensor) -> Data:
        angles = torch.stack([2 * math.pi * hours / period for period in (DAY, WEEK)], -1)
        (past, future), (then, to_come) = _split(values), _split(angles.sin())
        return {
            "past_values": past, "past_time_features": then, "future_values": future,
            "past_observed_mask": torch.ones_like(past), "future_time_features": to_come,
        }  # fmt: skip

    return Shape(hf.InformerForPrediction(config), given, loss_fn=own_loss)


def timesfm() -> Shape:
    """A decoder of patches, which takes series one by one."""
    config = hf.TimesFmConfig(
        patch_length=8, context_length=PAST, horizon_length=FUTURE, hidden_size=WIDTH,
        intermediate_size=2 * WIDTH, head_dim=12, num_attention_heads=4, num_hidden_layers=LAYERS,
    )  # fmt: skip

    def given(values: Tensor, hours: Tensor) -> Data:
        past, future = _split(values)
        several = list(past[:, -PAST:])
        return {"past_values": several, "freq": [0] * len(several), "future_values": future}

    return Shape(hf.TimesFmModelForPrediction(config), given)


def _split(values: Tensor) -> tuple[Tensor, Tensor]:
    return values[:, :-FUTURE], values[:, -FUTURE:]


def own_loss(outputs: Any, batch: Data) -> Tensor:
    """The loss that a model of transformers gives by itself where it gets ``future_values``."""
    return outputs.loss


SHAPES = {"patchtst": patchtst, "informer": informer, "timesfm": timesfm}


# ---------------------------------------------------------------------------------------- the run


def train(shape: Shape, steps: int, batch: int, generator: torch.Generator) -> None:
    """Learn to forecast random series by the model's own loss."""

    def loss() -> Tensor:
        return shape.model(**shape.given(*series(batch, generator))).loss

    fit(shape.model, loss, steps, rate=3e-3)


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Sequence[Data]) -> float:
    """The model's own loss on batches: squared errors, or nats a step.

    An Informer draws the keys that it looks at: all models draw the same.
    """
    losses = []
    for batch in batches:
        torch.manual_seed(0)
        losses.append(float(model(**batch).loss))
    return sum(losses) / len(losses)


def compare(
    shape: Shape, budgets: Sequence[float], known: Sequence[Data], unseen: Sequence[Data]
) -> list[Row]:
    """The dense model, and one for every budget, calibrated on the batches that are known.

    What is lost is a share of the forecasts' variance, or nats where a loss of its own is kept.
    """
    dense = shape.model
    analysis = tensorize.analyze(dense, calibration=known, loss_fn=shape.loss_fn, refine=None)
    rows = [Row(None, sum(p.numel() for p in dense.parameters()), mean_loss(dense, unseen))]
    for budget in sorted(budgets, reverse=True):
        plan = analysis.plan(budget, refine=None)
        small = tensorize.apply(dense, plan)
        loss = mean_loss(small, unseen)
        if shape.loss_fn is None:
            lost = tensorize.evaluate(small, dense, unseen, time=False).models[0].quality.distance
        else:
            lost = loss - rows[0].own
        parameters = sum(p.numel() for p in small.parameters())
        rows.append(Row(budget, parameters, loss, lost, plan.predicted.loss_interval))
    return rows


def main(arguments: Sequence[str] | None = None) -> dict[str, list[Row]]:
    """Learn, compress, forecast; the rows of every shape."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--shape", choices=SHAPES, nargs="+", default=list(SHAPES))
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.75, 0.5, 0.25])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--batches", type=int, default=16, help="to calibrate on")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    found = {}
    for name in options.shape:
        torch.manual_seed(options.seed)
        generator = torch.Generator().manual_seed(options.seed)
        shape = SHAPES[name]()
        train(shape, options.steps, options.batch, generator)
        drawn = [shape.given(*series(options.batch, generator)) for _ in range(options.batches + 8)]
        known, unseen = drawn[: options.batches], drawn[options.batches :]
        found[name] = compare(shape, options.budgets, known, unseen)
        unit = "of the variance" if shape.loss_fn is None else "nats"
        print(f"{name}, trained {options.steps} steps")
        print(f"{shown(found[name], 'own loss', f'lost, {unit}')}\n")
    return found


if __name__ == "__main__":
    main()
