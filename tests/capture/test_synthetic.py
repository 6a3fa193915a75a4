"""Calibration data that a model makes itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import tensorize
from benchmarks.subjects import divergence, text
from examples.gpt import load_pretrained as trained_gpt
from examples.llama import load_pretrained as trained_llama
from tensorize.base.errors import CaptureError
from tensorize.capture import synthetic
from tensorize.capture.synthetic import self_made
from tensorize.ir.sites import Batch
from tests.marks import slow
from tests.models import CASES, MLP


@pytest.mark.parametrize("name", ["gpt", slow("llama"), "gpt2", slow("mixtral")])
def test_a_decoder_writes_text(name: str) -> None:
    model = CASES[name].model()
    state = torch.get_rng_state()
    small = tensorize.compile(model, 0.5, calibration="self")
    assert torch.equal(state, torch.get_rng_state())
    report = tensorize.report(small)
    assert report.plan.metric == "loss"
    assert any("tokens that the model wrote itself" in note for note in report.notes)


@pytest.mark.parametrize("name", [slow("bert"), slow("vit"), slow("t5"), "mlp"])
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
        pytest.param(trained_llama, marks=pytest.mark.slow, id="llama"),
    ],
)
def test_on_trained_weights_it_is_much_better_than_the_weights_alone(make: object) -> None:
    model = make()  # type: ignore[operator]
    unseen = text("held_out", 8, 256)
    alone = tensorize.compile(model, 0.5, metric="frobenius")
    written = tensorize.compile(model, 0.5, calibration="self")
    assert divergence(written, model, unseen) < 0.5 * divergence(alone, model, unseen)


# ------------------------------------------------------------------------------------- unasked


def notes_of(model: nn.Module) -> str:
    return " ".join(tensorize.report(model).notes)


@pytest.mark.slow
@pytest.mark.own_data
def test_without_data_a_model_calibrates_itself() -> None:
    model = trained_llama()
    unseen = text("held_out", 8, 256)
    small = tensorize.compile(model, 0.5)
    plan = tensorize.report(small).plan
    assert plan.metric == "loss"
    assert plan.refine == "refit"
    assert "no calibration data: calibrated on" in notes_of(small)
    assert "tokens that the model wrote itself" in notes_of(small)
    alone = tensorize.compile(model, 0.5, metric="frobenius")
    assert divergence(small, model, unseen) < 0.5 * divergence(alone, model, unseen)


@pytest.mark.own_data
@pytest.mark.parametrize("options", [{"metric": "frobenius"}, {"refine": None}])
def test_the_weights_alone_are_judged_where_that_is_asked_for(options: dict) -> None:
    model, asked = CASES["llama"].model(), "metric" in options
    plan = tensorize.report(tensorize.compile(model, 0.5, **options)).plan
    assert (plan.metric, plan.refine) == ("frobenius" if asked else "loss", None)


@pytest.mark.own_data
def test_a_model_that_would_take_long_is_judged_by_its_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(synthetic, "_UNASKED_FLOPS", 1e6)
    small = tensorize.compile(CASES["llama"].model(), 0.5)
    assert tensorize.report(small).plan.metric == "frobenius"
    assert 'calibration="self" takes them' in notes_of(small)


@pytest.mark.own_data
def test_second_moments_that_would_fill_the_memory_are_not_taken_unasked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(synthetic, "_UNASKED_MOMENTS", 1e3)
    assert tensorize.analyze(CASES["llama"].model()).plan(0.5).metric == "frobenius"


@pytest.mark.own_data
@pytest.mark.slow
def test_a_larger_model_makes_less_data(monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    for flops in (1e11, 6e7):
        monkeypatch.setattr(synthetic, "_UNASKED_FLOPS", flops)
        analysis = tensorize.analyze(CASES["llama"].model(), refine=None)
        written.append(sum(batch.given["input_ids"].numel() for batch in analysis.calibration))
    assert written[0] >= 2 * written[1] > 0


@pytest.mark.own_data
def test_a_model_that_fails_on_data_of_its_own_is_judged_by_its_weights() -> None:
    class Picky(nn.Module):
        """It runs on ones alone."""

        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            if not bool((x == 1).all()):
                raise RuntimeError("only ones, please")
            return self.head(x)

    small = tensorize.compile(Picky(), 0.5, example_inputs=(torch.ones(4, 32),))
    assert tensorize.report(small).plan.metric == "frobenius"
    assert "only ones, please" in notes_of(small)


@pytest.mark.own_data
def test_without_known_inputs_the_weights_are_judged() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(32, 32)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.head(x + y)

    assert "no inputs are known" in notes_of(tensorize.compile(Sum(), 0.5))
