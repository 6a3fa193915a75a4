"""Healing under autocast, in wrappers, and in other people's loops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

import tensorize
from tensorize.base.errors import CaptureError, TensorizeError
from tensorize.training.distillation import relative_parameter_groups
from tests.training.healed_models import changed, cores, divergence, models, texts, values


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
