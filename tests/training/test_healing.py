"""Healing: the dense model is distilled into the factors, in place."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tensorize
from tensorize.base.errors import CaptureError, TensorizeError
from tensorize.weight.install import factored
from tests.models import relative
from tests.training.healed_models import changed, cores, divergence, models, texts, values


@torch.no_grad()
def distance(model: nn.Module, dense: nn.Module, x: Tensor) -> float:
    return relative(model(x).float(), dense(x).float())


# ---------------------------------------------------------------------------------- what it reaches


@pytest.mark.parametrize("pivoted", [False, True])
def test_a_decoder_comes_nearer_to_the_dense_model(pivoted: bool) -> None:
    (dense, small), unseen = models(pivoted=pivoted), texts(3, seed=9)
    before = divergence(small, dense, unseen)
    done = tensorize.heal(small, dense, texts(24), held_out=unseen, steps=96)
    assert done.before == pytest.approx(before, rel=1e-4)
    assert done.after == pytest.approx(divergence(small, dense, unseen), rel=1e-4)
    assert done.after < 0.8 * done.before
    assert done.recovered == pytest.approx(1 - done.after / done.before)
    assert done.unit == "nats"
    assert len(done.losses) == done.steps == 96
    assert (done.best_step, done.after) == min(done.checks, key=lambda check: check[1])
    assert json.loads(json.dumps(done.to_dict()))["best_step"] == done.best_step


@pytest.mark.parametrize("name", ["gpt", "llama", "gpt2"])
@pytest.mark.slow
def test_as_many_steps_do_nearly_as_much_without_an_identity(name: str) -> None:
    """A column that is kept has one factor to move it, where others have two."""
    done = []
    for pivoted in (False, True):
        dense, small = models(name, pivoted=pivoted)
        assert any(weight.spec.pivoted for _, weight in factored(small)) == pivoted
        done.append(tensorize.heal(small, dense, texts(24), held_out=texts(3, seed=9), steps=64))
    plain, found = done
    assert found.before == pytest.approx(plain.before, rel=1e-3)
    assert found.after < 1.06 * plain.after
    assert found.recovered > 0.8 * plain.recovered


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_without_logits_come_nearer_too(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 16)).to(dtype)
    mixed = torch.randn(12, 32)  # inputs of which the weights alone know nothing
    data = [(torch.randn(64, 12) @ mixed).to(dtype) for _ in range(12)]
    small = tensorize.compile(dense, 0.6)
    off = distance(small, dense, data[0])
    done = tensorize.heal(small, dense, data, steps=80)
    assert done.unit == "relative squared error"
    assert done.after < 0.8 * done.before
    assert distance(small, dense, data[0]) < off
    assert {p.dtype for p in small.parameters()} == {dtype}


@pytest.mark.slow
def test_a_trained_gpt_at_a_tenth_of_its_size_recovers_half_of_the_rise() -> None:
    """``python -m benchmarks.heal`` takes 300 steps on more text."""
    from benchmarks.subjects import divergence, loss, text
    from examples.gpt import load_pretrained

    dense = load_pretrained()
    small = tensorize.compile(dense, 0.1, calibration=text("validation", 32, 256).split(8))
    unseen = text("held_out", 16, 256)
    before = divergence(small, dense, unseen), loss(small, unseen) - loss(dense, unseen)
    batches = text("train", 400, 128, seed=1).split(8)
    tensorize.heal(small, dense, batches, steps=100)
    after = divergence(small, dense, unseen), loss(small, unseen) - loss(dense, unseen)
    assert after[0] < 0.5 * before[0]
    assert after[1] < 0.5 * before[1]


def test_layers_are_matched_where_asked_for() -> None:
    ids, off = texts(1, seed=9)[0], {}

    def block(model: nn.Module) -> Tensor:
        found: list[Tensor] = []
        hook = model.get_submodule("blocks.0").register_forward_hook(lambda *a: found.append(a[2]))
        model(ids)
        hook.remove()
        return found[0].detach()

    for layers in (None, "blocks.0", True):
        dense, small = models()
        tensorize.heal(small, dense, texts(24), steps=64, layers=layers, layer_weight=100.0)
        off[layers] = relative(block(small), block(dense))
    assert off["blocks.0"] < 0.9 * off[None]
    assert off[True] < 0.95 * off[None]


# ---------------------------------------------------------------------------------- what it changes


@pytest.mark.parametrize("pivoted", [False, True])
@pytest.mark.parametrize("train", ["cores", "all"])
def test_only_what_was_asked_for_is_trained(train: str, pivoted: bool) -> None:
    dense, small = models(pivoted=pivoted)
    small.train()
    small.requires_grad_(False)
    before, taught, state = values(small), values(dense), torch.get_rng_state()
    tensorize.heal(small, dense, texts(8), steps=8, train=train)
    moved = changed(small, before)
    if train == "cores":
        assert moved == cores(small)
    else:
        assert moved > cores(small)
        assert "blocks.0.attention_norm.bias" in moved
    assert not changed(dense, taught)
    assert torch.equal(torch.get_rng_state(), state)
    assert small.training
    assert not any(p.requires_grad or p.grad is not None for p in small.parameters())
    assert not any(module._forward_hooks for module in (*small.modules(), *dense.modules()))


def test_masked_positions_count_in_nothing() -> None:
    results = []
    for filler in (3, 90):
        data = []
        for ids in texts(6):
            mask = torch.ones_like(ids)
            mask[1:, 9:] = 0
            data.append({"input_ids": ids.where(mask != 0, filler), "attention_mask": mask})
        dense, small = models("llama")
        done = tensorize.heal(small, dense, data, steps=8)
        results.append((done, values(small)))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(value, results[1][1][name]) for name, value in results[0][1].items())


def test_the_report_says_that_the_factors_are_others() -> None:
    dense, small = models()
    notes = tensorize.report(small).notes
    done = tensorize.heal(small, dense, texts(8), steps=8)
    *kept, note = tensorize.report(small).notes
    assert tuple(kept) == notes
    assert note.startswith(f"healed: {done}")
    assert "% recovered" in note
    assert tensorize.report(small).verdict.lost == done.after
    assert "measured to lose" in str(tensorize.report(small))


def test_the_same_seed_gives_the_same_bits() -> None:
    found: list[dict[str, Tensor]] = []
    for seed in (0, 0, 1):
        dense, small = models()
        tensorize.heal(small, dense, texts(8), steps=8, seed=seed)
        found.append(values(small))
    names = cores(small)
    assert all(torch.equal(found[0][name], found[1][name]) for name in names)
    assert not all(torch.equal(found[0][name], found[2][name]) for name in names)


# --------------------------------------------------------------------- where it does not get better


def test_a_run_that_cannot_gain_stops_early_and_changes_nothing() -> None:
    _, small = models()
    before = values(small)
    done = tensorize.heal(small, tensorize.densify(small), texts(6), steps=160, patience=1)
    assert done.stopped_early
    assert done.steps < 80
    assert done.best_step == 0 or done.after < done.before
    if done.best_step == 0:
        assert not changed(small, before)


def test_too_large_a_rate_is_cut() -> None:
    dense, small = models()
    done = tensorize.heal(small, dense, texts(12), steps=96, rate=0.5)
    assert max(loss for _, loss in done.checks) > done.before  # it did overshoot
    assert done.after < done.before


def test_a_step_that_is_not_finite_is_not_taken() -> None:
    dense, small = models()
    calls = 0

    def loss_fn(outputs: Any, batch: Any) -> Tensor:
        nonlocal calls
        calls += outputs.logits.requires_grad
        broken = outputs.logits.requires_grad and calls == 2
        return outputs.logits.square().mean() * (float("nan") if broken else 1.0)

    done = tensorize.heal(small, dense, texts(8), steps=16, loss_fn=loss_fn)
    assert sum(loss != loss for loss in done.losses) == 1
    assert done.after < done.before
    assert all(torch.isfinite(p).all() for p in small.parameters())


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_error_leaves_the_model_as_it_was(error: type[BaseException]) -> None:
    dense, small = models()
    before = values(small)

    def progress(stage: str, done: int, total: int) -> None:
        if done == 5:
            raise error("stop")

    with pytest.raises(error, match="stop"):
        tensorize.heal(small, dense, texts(8), steps=16, progress=progress)
    assert not changed(small, before)
    assert "healed" not in "".join(tensorize.report(small).notes)


# ----------------------------------------------------------------------------------------- mistakes


def test_mistakes_are_named() -> None:
    (dense, small), data = models(), texts(4)

    def message(*arguments: Any, **options: Any) -> str:
        with pytest.raises(CaptureError) as caught:
            tensorize.heal(*arguments, **{"steps": 4, **options})
        return str(caught.value)

    assert "compress it first" in message(dense, tensorize.densify(small), data)
    assert "model and teacher are one" in message(small, small, data)
    assert "train='biases' is not one of" in message(small, dense, data, train="biases")
    assert "'block.*' matches no module" in message(small, dense, data, layers="block.*")
    assert "makes no sense" in message(small, dense, data, steps=0)
    assert "batches is empty" in message(small, dense, [])
    assert "batch 0 does not fit" in message(small, dense, [torch.rand(2, 3, 4)] * 4)
    with torch.no_grad():
        next(iter(factored(small)))[1].cores[0].fill_(float("nan"))
    assert "not finite" in message(small, dense, data)
    assert issubclass(CaptureError, TensorizeError)
