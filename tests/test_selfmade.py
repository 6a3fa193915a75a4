"""Calibration data that a model makes itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import tensorize
from benchmarks.quality import divergence, text
from examples.gpt import load_pretrained as trained_gpt
from examples.llama import load_pretrained as trained_llama
from tensorize.errors import CaptureError
from tensorize.ir import Batch
from tensorize.selfmade import self_made
from tests.models import CASES, MLP


@pytest.mark.parametrize("name", ["gpt", "llama", "gpt2", "mixtral"])
def test_a_decoder_writes_text(name: str) -> None:
    model = CASES[name].model()
    state = torch.get_rng_state()
    small = tensorize.compile(model, 0.5, calibration="self")
    assert torch.equal(state, torch.get_rng_state())
    report = tensorize.report(small)
    assert report.plan.metric == "loss"
    assert any("tokens that the model wrote itself" in note for note in report.notes)


@pytest.mark.parametrize("name", ["bert", "vit", "t5", "mlp"])
def test_any_other_model_gets_inputs_like_its_example(name: str) -> None:
    case = CASES[name]
    given = case.batch()
    small = tensorize.compile(case.model(), 0.5, calibration="self", example_inputs=given)
    report = tensorize.report(small)
    assert report.plan.metric == "loss"
    assert any("batches drawn at random" in note for note in report.notes)


def test_drawn_inputs_have_the_mean_and_the_spread_of_the_example() -> None:
    x = 3 + 2 * torch.randn(64, 48)
    batches, _ = self_made(MLP(), Batch((x,), {}, (x,)), seed=0)
    drawn = torch.cat([batch.args[0] for batch in batches])
    assert drawn.shape[0] == 16 * 64
    assert float(drawn.mean()) == pytest.approx(3, abs=0.1)
    assert float(drawn.std()) == pytest.approx(2, abs=0.1)


def test_ids_are_drawn_from_the_whole_vocabulary_and_kinds_are_left() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.kinds = nn.Embedding(100, 32), nn.Embedding(2, 32)
            self.head = nn.Linear(32, 32)

        def forward(self, ids: Tensor, kind: Tensor) -> Tensor:
            return self.head(self.words(ids) + self.kinds(kind))

    inputs = torch.zeros(8, 16, dtype=torch.long), torch.ones(8, 16, dtype=torch.long)
    batches, _ = self_made(Tagger(), Batch(inputs, {}, inputs), seed=0)
    ids = torch.cat([batch.args[0] for batch in batches])
    assert ids.unique().numel() == 100
    assert all(torch.equal(batch.args[1], inputs[1]) for batch in batches)


def test_the_same_seed_makes_the_same_data() -> None:
    model = CASES["gpt"].model()
    first, second, other = (
        tensorize.compile(model, 0.5, calibration="self", seed=seed) for seed in (0, 0, 1)
    )
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    assert any(
        a.shape != b.shape or not torch.equal(a, b)
        for a, b in zip(first.parameters(), other.parameters(), strict=True)
    )


def test_without_inputs_there_is_nothing_to_start_from() -> None:
    class Strange(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(8, 8)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.head(x + y)

    with pytest.raises(CaptureError, match="example_inputs"):
        tensorize.compile(Strange(), 0.5, calibration="self")


@pytest.mark.parametrize(
    "make",
    # Written without a cache of keys, every token is a pass over the text so far.
    [
        pytest.param(trained_gpt, marks=pytest.mark.slow, id="gpt"),
        pytest.param(trained_llama, id="llama"),
    ],
)
def test_on_trained_weights_it_is_much_better_than_the_weights_alone(make: object) -> None:
    model = make()  # type: ignore[operator]
    unseen = text("held_out", 8, 256)
    alone = tensorize.compile(model, 0.5)
    written = tensorize.compile(model, 0.5, calibration="self")
    assert divergence(written, model, unseen) < 0.5 * divergence(alone, model, unseen)
