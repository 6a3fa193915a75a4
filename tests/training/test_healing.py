"""Healing: the dense model is distilled into the factors, in place, and a killed run goes on."""

from __future__ import annotations

import copy
import functools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

import tensorize
from tensorize.base.errors import CaptureError, CheckpointError, TensorizeError
from tensorize.training import healing
from tensorize.training.distillation import relative_parameter_groups
from tensorize.weight.install import core_names, factored
from tests.models import CASES, relative
from tests.paths import ROOT


class Noisy(nn.Module):
    """Two layers with noise between them in every mode: each call draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(24, 64)
        self.down = nn.Linear(64, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.dropout(torch.relu(self.up(x)), 0.1, training=True))


def decoder(name: str = "gpt") -> nn.Module:
    """A decoder with new weights, large enough that its predictions are sharp."""
    model = CASES[name].model()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
    return model


def texts(count: int, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 128, (4, 16), generator=generator) for _ in range(count)]


def divergence(model: nn.Module, dense: nn.Module, batches: list[Tensor]) -> float:
    """KL in nats a token, by torch's own function."""
    with torch.no_grad():
        pairs = [
            (model(x).logits.log_softmax(-1), dense(x).logits.log_softmax(-1)) for x in batches
        ]
    q, p = (torch.cat(side).flatten(0, 1).double() for side in zip(*pairs, strict=True))
    return float(F.kl_div(q, p, reduction="batchmean", log_target=True))


@torch.no_grad()
def distance(model: nn.Module, dense: nn.Module, x: Tensor) -> float:
    return relative(model(x).float(), dense(x).float())


@functools.cache
def pair(name: str = "gpt") -> tuple[nn.Module, nn.Module]:
    dense = decoder(name)
    return dense, tensorize.compile(dense, 0.6, calibration=texts(3, seed=5))


def models(name: str = "gpt") -> tuple[nn.Module, nn.Module]:
    """A dense decoder, and a copy of its compressed form."""
    dense, small = pair(name)
    return dense, copy.deepcopy(small)


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}


def cores(model: nn.Module) -> set[str]:
    return {core for name, _ in factored(model) for core in core_names(model, name)}


# ------------------------------------------------------------------------------- what it reaches


def test_a_decoder_comes_nearer_to_the_dense_model() -> None:
    (dense, small), unseen = models(), texts(3, seed=9)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_without_logits_come_nearer_too(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 16)).to(dtype)
    mixed = torch.randn(12, 32)  # inputs of which the weights alone know nothing
    data = [(torch.randn(64, 12) @ mixed).to(dtype) for _ in range(12)]
    small = tensorize.compile(dense, 0.5)
    off = distance(small, dense, data[0])
    done = tensorize.heal(small, dense, data, steps=80)
    assert done.unit == "relative squared error"
    assert done.after < 0.8 * done.before
    assert distance(small, dense, data[0]) < off
    assert {p.dtype for p in small.parameters()} == {dtype}


@pytest.mark.slow
def test_a_trained_gpt_at_a_tenth_of_its_size_recovers_half_of_the_rise() -> None:
    """``python -m benchmarks.heal`` takes 300 steps on more text."""
    from benchmarks.quality import divergence, loss, text
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


# ------------------------------------------------------------------------------- what it changes


@pytest.mark.parametrize("train", ["cores", "all"])
def test_only_what_was_asked_for_is_trained(train: str) -> None:
    dense, small = models()
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


def test_the_same_seed_gives_the_same_bits() -> None:
    found: list[dict[str, Tensor]] = []
    for seed in (0, 0, 1):
        dense, small = models()
        tensorize.heal(small, dense, texts(8), steps=8, seed=seed)
        found.append(values(small))
    names = cores(small)
    assert all(torch.equal(found[0][name], found[1][name]) for name in names)
    assert not all(torch.equal(found[0][name], found[2][name]) for name in names)


# ------------------------------------------------------------------- where it does not get better


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
    done = tensorize.heal(small, dense, texts(12), steps=96, rate=0.9)
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


# ---------------------------------------------------------------------------- going on where it was

KILLED = """
import os, signal, sys, torch, tensorize
from tests.training.test_healing import Noisy, noisy_run
def progress(stage, done, total):
    if done == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
noisy_run(sys.argv[1], progress)
"""


def noisy_run(
    directory: str | Path | None, progress: Callable[[str, int, int], None] | bool = False
) -> tuple[healing.Healing, nn.Module]:
    """A healing of a model that draws random numbers; few batches, so that the order matters."""
    torch.manual_seed(0)
    dense = Noisy().eval()
    data = [torch.randn(32, 24) for _ in range(5)]
    small = tensorize.compile(dense, 0.6, metric="frobenius")
    done = tensorize.heal(
        small, dense, data, steps=40, train="all", checkpoint_dir=directory, progress=progress
    )
    return done, small


@pytest.mark.parametrize("step", [pytest.param(3, marks=pytest.mark.slow), 23])
def test_a_killed_run_goes_on_to_the_same_bits(step: int, tmp_path: Path) -> None:
    killed = subprocess.run(
        [sys.executable, "-c", KILLED.format(step=step), str(tmp_path)],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
        },
        cwd=ROOT,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    seen: list[int] = []
    done, small = noisy_run(tmp_path, lambda stage, at, total: seen.append(at))
    want, untouched = noisy_run(None)
    assert seen[0] == 4 * (step // 4)  # the last check before it was killed
    assert done == want
    assert all(torch.equal(value, values(untouched)[n]) for n, value in values(small).items())
    again, _ = noisy_run(tmp_path)  # of a run that has ended, the result is read
    assert again == want


def test_an_interrupted_run_goes_on_in_the_same_process(tmp_path: Path) -> None:
    (dense, small), (_, other) = models(), models()
    want = tensorize.heal(other, dense, texts(8), steps=32)

    def progress(stage: str, done: int, total: int) -> None:
        if done == 21:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tensorize.heal(small, dense, texts(8), steps=32, checkpoint_dir=tmp_path, progress=progress)
    assert tensorize.heal(small, dense, texts(8), steps=32, checkpoint_dir=tmp_path) == want
    assert not changed(small, values(other))


def test_what_a_killed_run_left_half_written_is_removed(tmp_path: Path) -> None:
    (tmp_path / f".{healing.STATE}-1-0.tmp").write_bytes(b"half of it")
    (tmp_path / "mine.tmp").touch()
    dense, small = models()
    tensorize.heal(small, dense, texts(8), steps=1, checkpoint_dir=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [healing.STATE, "mine.tmp"]


def test_the_state_of_another_run_is_refused(tmp_path: Path) -> None:
    dense, small = models()
    start = values(small)
    tensorize.heal(small, dense, texts(8), steps=4, checkpoint_dir=tmp_path)
    small.load_state_dict(start)
    for options in ({"steps": 5}, {"seed": 1}, {"train": "all"}):
        with pytest.raises(CheckpointError, match="other weights, data or settings"):
            tensorize.heal(
                small, dense, texts(8), checkpoint_dir=tmp_path, **{"steps": 4, **options}
            )
    with pytest.raises(CheckpointError, match="other weights, data or settings"):
        tensorize.heal(small, dense, texts(8, seed=2), steps=4, checkpoint_dir=tmp_path)
    (tmp_path / healing.STATE).write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="damaged"):
        tensorize.heal(small, dense, texts(8), steps=4, checkpoint_dir=tmp_path)
    assert not changed(small, start)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be written"):
        tensorize.heal(small, dense, texts(8), steps=4, checkpoint_dir=tmp_path / "file")


# -------------------------------------------------------------------------------------- mistakes


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


# ----------------------------------------------------------------------------- other people's loops


def test_under_autocast_it_is_refused() -> None:
    """Its copies of weights would be those of before every step."""
    dense, small = models()
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(TensorizeError, match=r"heal was called under torch\.autocast"),
    ):
        tensorize.heal(small, dense, texts(4), steps=4)


def test_models_in_wrappers_and_with_other_outputs() -> None:
    class Wrapped(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.module(*args, **kwargs)

    class Twice(Wrapped):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            hidden = self.module(*args, **kwargs).logits
            return (hidden, hidden) if self.training else hidden

    dense, small = models()
    (ids,) = texts(1)
    plain = tensorize.distillation_loss(dense, layers=True)
    assert torch.equal(plain(Wrapped(small), ids), plain(small, ids))
    with pytest.raises(CaptureError, match="one model gives 1 outputs for batch 0, the other 2"):
        tensorize.distillation_loss(Twice(dense).eval())(Twice(small).train(), ids)
    with pytest.raises(CaptureError, match="has no layer"):
        plain(nn.Sequential(nn.Linear(1, 1), small), ids)


def test_a_loop_of_ones_own() -> None:
    (dense, small), unseen = models(), texts(2, seed=9)
    before = divergence(small, dense, unseen)
    distance = tensorize.distillation_loss(dense)
    optimizer = torch.optim.AdamW(relative_parameter_groups(small, 0.03), weight_decay=0.0)
    first = float(distance(small, unseen[0]).detach())
    assert first == pytest.approx(divergence(small, dense, unseen[:1]), rel=1e-4)
    for batch in texts(48):
        optimizer.zero_grad()
        distance(small, batch).backward()
        optimizer.step()
    assert divergence(small, dense, unseen) < 0.9 * before


def test_the_trainer_of_transformers(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    dense, small = models("gpt2")
    for module in small.modules():
        if isinstance(module, nn.Dropout):  # the Trainer trains in training mode
            module.p = 0.0
    unseen, before = texts(2, seed=9), values(small)
    start = divergence(small, dense, unseen)
    data = []
    for ids in torch.cat(texts(24)):
        labels = ids.clone()
        labels[12:] = -100
        data.append({"input_ids": ids, "labels": labels})
    distance = tensorize.distillation_loss(dense, layers=True, layer_weight=0.1)
    arguments = hf.TrainingArguments(
        str(tmp_path), max_steps=40, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", logging_steps=10,
        weight_decay=0.0, lr_scheduler_type="cosine",
    )  # fmt: skip
    groups = relative_parameter_groups(small, 0.01)
    with distance.compute_loss_func(small) as compute_loss_func:
        trainer = hf.Trainer(
            small, arguments, train_dataset=data, compute_loss_func=compute_loss_func,
            optimizers=(torch.optim.AdamW(groups), None),
        )  # fmt: skip
        trainer.train()
        # The mean over positions 0 to 10, whose next token is labelled.
        batch = {k: torch.stack([d[k] for d in data[:4]]) for k in data[0]}
        with torch.no_grad():
            seen = trainer.compute_loss(small, dict(batch))
            kl = tensorize.distillation_loss(dense)(small, batch)
    assert float(kl) < float(seen)  # the layers' share comes on top
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]
    assert divergence(small, dense, unseen) < 0.95 * start
    assert changed(small, before) == cores(small)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in small.modules())


def test_positions_without_a_label_do_not_count() -> None:
    dense, small = models("gpt2")
    ids = texts(1)[0]
    labels = ids.clone()
    labels[:, 9:] = -100
    distance = tensorize.distillation_loss(dense)
    with torch.no_grad():
        cut = distance(small, {"input_ids": ids[:, :8]})
        hidden = distance(small, {"input_ids": ids, "labels": labels})
    assert float(hidden) == pytest.approx(float(cut), rel=1e-4)
