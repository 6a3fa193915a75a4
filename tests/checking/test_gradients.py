"""Gradients of guarded models: the same, and checked; steps with wrong ones are skipped."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

import tensorize
from tests.checking.guarded_models import BATCH, FORMS, data, guarded, net


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    model(BATCH).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def wrong(gradient: Tensor) -> Tensor:
    """A gradient with one entry that is off."""
    found = gradient.clone(memory_format=torch.contiguous_format)
    found.view(-1)[5] += gradient.abs().max()
    return found


BARE = ("bare train", "bare block")


@pytest.mark.parametrize("form", [*FORMS, *BARE])
def test_gradients_are_those_of_the_model_without_a_guard(form: str) -> None:
    plain, model = net(form, trains=True), guarded(form, trains=True)
    want, got = gradients(plain), gradients(model)
    assert want.keys() == got.keys()
    for name, gradient in want.items():
        assert torch.equal(gradient, got[name]), name
    report = tensorize.guard_report(model)
    assert report.faults == ()
    assert all(site.gradients or site.use == "lookup" for site in report.sites)
    assert not [why for _, why in report.not_covered if "gradient" in why]


@pytest.mark.parametrize("form", FORMS)
def test_a_flip_in_a_gradient_of_an_input_is_computed_again(form: str) -> None:
    model = guarded(form, trains=True)
    want = gradients(model)
    outcomes = set()
    for seed in range(6):
        y, known = model(BATCH).square().sum(), len(tensorize.guard_report(model).faults)
        model.zero_grad()
        how = {"where": "intermediates", "bits": [26], "most": 1, "seed": seed}
        with tensorize.inject(model, rate=0.3, **how):
            y.backward()
        told = {fault.outcome for fault in tensorize.guard_report(model).faults[known:]}
        outcomes |= told
        if "skipped" not in told:  # what was wrong on the way to a weight's gradient as well
            for name, parameter in model.named_parameters():
                scale = float(want[name].abs().max())
                assert torch.allclose(parameter.grad, want[name], rtol=0, atol=1e-4 * scale), name
    assert outcomes & {"recomputed", "skipped"}


@pytest.mark.parametrize("form", [*FORMS, *BARE])
def test_a_step_with_a_wrong_gradient_of_a_weight_is_skipped_and_counted(form: str) -> None:
    model: Any = guarded(form, trains=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    for k, layer in enumerate((model.table, model.up, model.down, model.head)):
        # The products of the backward get something else than what the check saw.
        hook = layer.register_forward_hook(lambda *call: call[-1].register_hook(wrong) and None)
        gradients(model)
        hook.remove()
        optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert tensorize.guard_report(model).skipped == k + 1
    outcomes = {fault.outcome for fault in tensorize.guard_report(model).faults}
    assert "skipped" in outcomes
    gradients(model)
    optimizer.step()  # the next one is taken
    assert not torch.equal(before[0], next(model.parameters()))


def test_with_raise_a_wrong_gradient_is_an_error() -> None:
    model: Any = guarded("low rank", trains=True, on_fault="raise")
    model.up.register_forward_hook(lambda *call: call[-1].register_hook(wrong) and None)
    with pytest.raises(tensorize.FaultError, match=r"up\.weight.*gradient"):
        gradients(model)


def test_other_uses_of_a_parameter_are_told_and_not_taken_for_faults() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(50, 24)

        def forward(self, ids: Tensor) -> Tensor:
            return nn.functional.linear(torch.tanh(self.table(ids)), self.table.weight)

    torch.manual_seed(0)
    model = tensorize.guard(Tied(), calibration=data())
    gradients(model)
    report = tensorize.guard_report(model)
    assert report.faults == ()
    why = "its gradient is not checked: calibration saw none, or other uses"
    assert ("table.weight", why) in report.not_covered


def test_checkpointed_and_repeated_backward_passes_are_no_faults() -> None:
    model: Any = guarded("pivoted", trains=True)
    y = torch.utils.checkpoint.checkpoint(model, BATCH, use_reentrant=False)
    y.square().sum().backward()
    y = model(BATCH).square().sum()
    y.backward(retain_graph=True)
    y.backward()
    (torch.autograd.grad(model(BATCH).sum(), [model.up.first.weight]))
    gradients(model)
    assert tensorize.guard_report(model).faults == ()
