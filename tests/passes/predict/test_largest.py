"""What compressed weights do to the loss, measured, and the curves that it corrects."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tensorize
from benchmarks import quality
from tensorize import TTSpec
from tensorize.algebra.reconstruct import reconstruct
from tensorize.capture.inputs import batch_of
from tensorize.passes.observe.loss import PreservedLoss
from tensorize.passes.predict import largest, trials
from tensorize.passes.predict.largest import LARGE, LEVELS, MeasureLargest
from tensorize.passes.predict.trials import Reference
from tensorize.passes.stages import Learned
from tests.models import CASES

WORDS, WIDTH, POSITIONS = 300, 24, 12


class Encoder(nn.Module):
    """One row a sample, from a table of words that is most of the model: (B, T) to (B, WIDTH)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(WORDS, WIDTH)
        self.hidden = nn.Sequential(nn.Linear(WIDTH, 96), nn.Tanh(), nn.Linear(96, WIDTH))
        with torch.no_grad():  # words of one kind are alike
            kinds = torch.randn(5, WIDTH)
            self.words.weight.mul_(0.3).add_(kinds[torch.arange(WORDS) % 5])

    def forward(self, ids: Tensor) -> Tensor:
        return self.hidden(self.words(ids).tanh()).tanh().mean(1)


def sentences(count: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(WORDS, (16, POSITIONS), generator=generator) for _ in range(count)]


def analysed(model: nn.Module, cache_dir: Path | None = None) -> tensorize.Analysis:
    return tensorize.analyze(
        model, calibration=sentences(), refine=None, cache_dir=cache_dir, progress=False
    )


def summary_of(analysis: tensorize.Analysis) -> str:
    (stage,) = [stage for stage in analysis.program.history if stage.name == "largest"]
    return stage.summary


def test_a_measurement_is_the_rise_of_the_loss_with_other_weights() -> None:
    model, data = Encoder(), sentences(3)
    batches = [batch_of(ids) for ids in data]
    weight = model.hidden[0].weight.detach() * 0.9
    found = Reference(model, batches, PreservedLoss.fit(model, batches, None)).measure(
        {"hidden.0.weight": weight}
    )
    with torch.no_grad():
        dense = torch.cat([model(ids) for ids in data])
        model.hidden[0].weight.copy_(weight)
        other = torch.cat([model(ids) for ids in data])
    off = (other - dense).double().square().sum()
    spread = (dense - dense.mean(0)).double().square().sum()
    assert found.rise == pytest.approx(float(off / spread), rel=1e-4)
    assert found.output_error == pytest.approx(float(off / spread) ** 0.5, rel=0.05)


def test_outputs_that_are_too_large_to_be_held_are_made_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, data = Encoder(), sentences(3)
    batches = [batch_of(ids) for ids in data]
    loss = PreservedLoss.fit(model, batches, None)
    weights = {"hidden.0.weight": model.hidden[0].weight.detach() * 0.9}
    held = Reference(model, batches, loss).measure(weights)
    calls: list[None] = []
    model.register_forward_hook(lambda *_: calls.append(None))
    monkeypatch.setattr(trials, "_KEPT_BYTES", 1)
    reference = Reference(model, batches, loss)
    assert reference.measure(weights) == held
    assert len(calls) == 3 + 2 + 3  # once, again but for the first, and with other weights


def test_what_a_decoder_caches_is_not_held() -> None:
    case = CASES["gpt2"]
    model, batches = case.model(), [batch_of(case.batch(k)) for k in range(2)]
    reference = Reference(model, batches, PreservedLoss.fit(model, batches, None))
    assert [set(kept) for kept in reference._kept.values()] == [{"logits"}, {"logits"}]


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured is used, whether or not it makes the trial plan better."""
    monkeypatch.setattr(largest, "_is_better", lambda one, other, reference: True)


@pytest.mark.usefixtures("taken")
def test_the_largest_weights_are_measured_by_themselves() -> None:
    """Each rise is what the model loses with that weight alone at that rank."""
    model = Encoder()
    analysis = analysed(model)
    curve = analysis.program.spectra["words.weight"]
    assert curve.site.parameters > LARGE * sum(p.numel() for p in model.parameters())
    assert "measured : predicted alone: words.weight" in summary_of(analysis)
    batches = [batch_of(ids) for ids in sentences()]
    reference = Reference(model, batches, PreservedLoss.fit(model, batches, None))
    ranks = sorted({max(1, int(x * WORDS * WIDTH / (WORDS + WIDTH))) for x in LEVELS}, reverse=True)
    for rank, (lost, rise) in zip(ranks, curve.measured, strict=True):
        spec = TTSpec.low_rank(WORDS, WIDTH, rank)
        assert lost == float(curve.distortion[rank])
        dense = model.words.weight.detach()
        weight = reconstruct(spec, curve.factors(spec, dense))
        assert rise == pytest.approx(reference.measure({"words.weight": weight}).rise, rel=1e-4)


@pytest.mark.usefixtures("taken")
def test_plans_are_made_by_what_was_measured() -> None:
    analysis = analysed(Encoder())
    curve = analysis.program.spectra["words.weight"]
    (choice,) = [site for site in analysis.plan(0.5).sites if site.name == "words.weight"]
    assert choice.spec is not None
    lost = curve.distortion_of(choice.spec)
    assert choice.predicted_loss == pytest.approx(float(curve.rise(np.array(lost))))
    assert choice.predicted_error == pytest.approx(curve.error(lost))


@pytest.mark.usefixtures("taken")
def test_a_measured_curve_comes_out_of_the_cache_again(tmp_path: Path) -> None:
    first = analysed(Encoder(), tmp_path)
    again = analysed(Encoder(), tmp_path)
    assert first.program.spectra["words.weight"].measured
    for name, curve in first.program.spectra.items():
        assert curve.measured == again.program.spectra[name].measured
    assert first.plan(0.4).sites == again.plan(0.4).sites


def test_what_makes_plans_worse_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(largest, "_is_better", lambda one, other, reference: False)
    analysis = analysed(Encoder())
    assert not any(curve.measured for curve in analysis.program.spectra.values())
    assert "not used" in summary_of(analysis)


def test_the_better_of_two_plans_is_told_by_measuring_both() -> None:
    model, batches = Encoder(), tuple(batch_of(ids) for ids in sentences())
    learned = analysed(model).program.to(Learned, model=model)
    reference = Reference(model, batches, PreservedLoss.fit(model, batches, None))
    spectra = dict(learned.spectra)
    curve = spectra["words.weight"]
    # As if the table cost nothing: it would be given the least, and the model would lose most.
    free = replace(curve, measured=((1e-9, 1e-12), (1.0, 1e-9)))
    wrong = replace(learned, spectra={**spectra, "words.weight": free})
    assert not largest._is_better(wrong, learned, reference)
    assert largest._is_better(learned, wrong, reference)


def test_decoders_keep_their_curves() -> None:
    case = CASES["gpt2"]
    data = [case.batch(seed) for seed in range(4)]
    analysis = tensorize.analyze(case.model(), calibration=data, refine=None, progress=False)
    assert not any(curve.measured for curve in analysis.program.spectra.values())
    assert "every position has an output of its own" in summary_of(analysis)


def test_weights_alone_are_not_measured() -> None:
    learned = Learned(model=Encoder(), metric="frobenius", sites=(), sizes={}, spectra={})
    assert MeasureLargest((), None).run(learned).summary == "nothing to measure: there is no loss"


@pytest.mark.slow
def test_a_trained_sentence_encoder_loses_less_by_it() -> None:
    subject = quality.MODELS["minilm"](0)
    analysis = tensorize.analyze(
        subject.model, calibration=subject.calibration.batches, refine=None, progress=False
    )
    curves = analysis.program.spectra
    plain = {name: replace(curve, measured=()) for name, curve in curves.items()}
    without = replace(analysis, program=replace(analysis.program, spectra=plain))
    for budget, share in ((0.25, 0.75), (0.5, 1.0)):
        lost = [
            subject.unseen(
                tensorize.apply(subject.model, one.plan(budget, refine=None), progress=False)
            )["error"]
            for one in (analysis, without)
        ]
        assert lost[0] < share * lost[1]
