"""Second moments of the gradients, and how many samples they are taken of.

Shapes: B batch, T time, D width, V vocabulary, M and N rows and columns of a weight.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tensorize
from tensorize.base.errors import AnalysisError
from tensorize.passes.observe import moments as observe_moments
from tensorize.passes.observe.moments import Term
from tests.passes.observe.moments import (
    Classifier,
    close,
    collect,
    draw,
    run,
    second_moment,
    the_term,
    touchy,
)

# --------------------------------------------------------------------------- the gradients' moments


def test_gradients_of_logits_are_those_of_labels_drawn_from_the_prediction() -> None:
    model, x = Classifier(), draw((9, 5))
    a = model.first(x).detach().requires_grad_()
    z = model.second(torch.tanh(a))
    z.retain_grad()
    chance = z.detach().float().softmax(-1)
    labels = torch.multinomial(chance, 1, generator=torch.Generator().manual_seed(3))
    F.cross_entropy(z, labels[:, 0], reduction="sum").backward()
    assert a.grad is not None
    assert z.grad is not None
    found = collect(model, [x], seed=3)
    # The loss is taken in float32, whatever the model's dtype.
    close(the_term(found["first.weight"]).rows, second_moment(a.grad), torch.float32)
    close(the_term(found["second.weight"]).rows, second_moment(z.grad), torch.float32)
    close(the_term(found["first.weight"]).columns, second_moment(x))


def test_gradients_of_other_outputs_are_those_of_gaussian_probes() -> None:
    model, x = nn.Linear(5, 3).double(), draw((9, 5))
    y = model(x).detach()
    variance = float((y - y.mean(0)).square().sum(1).mean())
    noise = torch.randn(9, 3, generator=torch.Generator().manual_seed(3))
    term = the_term(collect(model, [x], seed=3)["weight"])
    close(term.rows, second_moment(noise) * 2 / variance, torch.float32)


def test_gradients_of_a_loss_of_the_caller() -> None:
    model, x, target = nn.Linear(5, 3).double(), draw((9, 5)), draw((9, 3), 1)
    found = collect(
        model,
        [{"input": x}],
        loss_fn=lambda outputs, batch: (outputs - target).square().sum(1).mean(),
    )
    term = the_term(found["weight"])
    close(term.rows, second_moment(2 * (model(x) - target).detach()))


def test_gradients_are_summed_over_a_sites_rows_and_averaged_over_the_outputs() -> None:
    """A site that sees many rows for every row of the output matters as much more."""

    class Summed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).sum(1)

    x = draw((9, 4, 5))
    model = Summed()
    y = model(x).detach()
    variance = float((y - y.mean(0)).square().sum(1).mean())
    noise = torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
    term = the_term(collect(model, [x], by_sample=False)["layer.weight"])
    assert term.input_rows == 36
    close(term.rows, 4 * second_moment(noise) * 2 / variance, torch.float32)


def test_recurrent_layers_have_gradients_in_evaluation_mode_on_a_gpu_too() -> None:
    """Not by cuDNN, which is then left out."""
    used: list[bool] = []

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.LSTM(5, 6, batch_first=True), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            used.append(torch.backends.cudnn.enabled)
            return self.head(self.layer(x)[0])

    before = torch.backends.cudnn.enabled
    collect(Recurrent().double(), [draw((2, 4, 5))])
    assert not any(used)
    assert torch.backends.cudnn.enabled == before
    used.clear()
    plain = touchy()
    plain.register_forward_hook(lambda *_: used.append(torch.backends.cudnn.enabled))
    collect(plain, [draw((8, 5)).float()])
    assert all(seen == before for seen in used)


# ------------------------------------------------------------------------------- samples as a whole


def test_a_weight_that_no_output_depends_on_is_left_out_with_a_note() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(5, 3).double(), nn.Linear(5, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            self.idle(x)
            return self.used(x)

    program = run(Idle(), [draw((9, 5))], "loss")
    assert program.statistics["idle.weight"].terms == {}
    assert program.statistics["used.weight"].terms
    (note,) = (note for note in program.notes if note.startswith("idle.weight: no counted output"))
    assert "ranks={'idle.weight': 1}" in note


def test_outputs_without_any_gradient_are_an_error_with_a_way_out() -> None:
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 3).double()

        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    with pytest.raises(AnalysisError, match="do not depend on any weight") as caught:
        collect(Detached(), [draw((9, 5))])
    assert 'metric="input"' in str(caught.value)
    term = the_term(collect(Detached(), [draw((9, 5))], "input")["layer.weight"])
    close(term.columns, second_moment(draw((9, 5))))


def test_the_frobenius_metric_runs_nothing() -> None:
    program = run(Classifier(), [draw((9, 5))], "frobenius")
    assert program.statistics == {}


# --------------------------------------------------------------------------------- how many samples


def test_rows_not_seen_yet_are_expected_as_often_as_rows_seen_once() -> None:
    """Good (1953), on draws from a known distribution: the mass of what was not drawn."""
    generator = torch.Generator().manual_seed(0)
    chance = torch.rand(2000, generator=generator).pow(6)
    chance /= chance.sum()
    drawn = torch.multinomial(chance, 600, replacement=True, generator=generator)
    counts = torch.bincount(drawn, minlength=2000).double()
    missed = float(chance[counts == 0].sum())
    assert observe_moments.unseen_share(counts, 1) == pytest.approx(missed, abs=0.05)
    assert observe_moments.unseen_share(4 * counts, 4) == observe_moments.unseen_share(counts, 1)


def test_few_output_rows_are_probed_several_times() -> None:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).mean(1)

    data = [torch.randn(4, 9, 6) for _ in range(4)]
    analysis = tensorize.analyze(Mean(), calibration=data, refine=None)
    (step,) = [s for s in analysis.program.history if s.name == "statistics"]
    assert "in 4 probes" in step.summary


def test_gradients_of_one_output_row_count_once() -> None:
    term = Term("columns", input_rows=400, output_rows=12, probes=4)
    assert term.samples == (12, 100)
    assert Term("rows", input_rows=400, output_rows=12, probes=4).samples == (100, 12)
