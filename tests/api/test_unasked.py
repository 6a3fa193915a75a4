"""What ``compile`` does when nobody gives data, as users call it: nothing here switches it off.

The model calibrates itself. Where it fails at that, or memory runs out, its weights alone are
judged and a note says why. A defect of the library's is never taken for either.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tensorize
from tensorize.base.errors import AnalysisError, CaptureError
from tensorize.capture import observer, synthetic
from tensorize.passes.curves import metric, spectra
from tensorize.passes.observe import gathering, outputs
from tensorize.passes.predict.calibrate import CalibratePrediction
from tensorize.passes.rewrite import polish, refit
from tests.marks import slow_but
from tests.models import CASES, MLP

pytestmark = pytest.mark.own_data

INPUTS = (torch.ones(4, 48),)


def compiled(model: nn.Module, **options: Any) -> tensorize.Report:
    small = tensorize.compile(model, **{"budget": 0.5, "example_inputs": INPUTS, **options})
    return tensorize.report(small)


def alone(report: tensorize.Report) -> str:
    """Why the weights alone were judged."""
    assert report.plan.metric == "frobenius"
    (note,) = (note for note in report.notes if note.startswith("no calibration data"))
    assert "\n" not in note
    return note.removeprefix("no calibration data: weights alone, ")


class ConvNet(nn.Sequential):
    def __init__(self) -> None:
        convolutions = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3)]
        super().__init__(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


COMMON: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    **{name: (case.model, case.batch) for name, case in CASES.items()},
    "conv net": (ConvNet, lambda: (torch.randn(4, 3, 12, 12),)),
    "lstm": (lambda: nn.LSTM(16, 32), lambda: (torch.randn(5, 4, 16),)),
    "torch's encoder": (
        lambda: nn.TransformerEncoderLayer(32, 4, 64),
        lambda: (torch.randn(5, 4, 32),),
    ),
}


@pytest.mark.parametrize("name", slow_but(COMMON.keys() - {"t5", "vit", "bert", "mixtral"}, COMMON))
def test_common_models_calibrate_themselves(name: str) -> None:
    model, inputs = COMMON[name]
    report = compiled(model().eval(), example_inputs=inputs())
    assert report.plan.metric == "loss"
    assert any(note.startswith("no calibration data: calibrated on") for note in report.notes)


# ------------------------------------------------------------------------------ the model's errors


class Changed(MLP):
    """An MLP with something done to its output, only on data that are not the example's."""

    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.change = change

    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        return y if bool((x == 1).all()) else self.change(y)


def refuse(y: Tensor) -> Tensor:
    raise KeyError("only ones, please")


class NoWayBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        raise NotImplementedError("there is no way back")


def infinite_gradient(y: Tensor) -> Tensor:
    return (y - y.detach()).abs().sqrt() + y


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (refuse, "does not fit the model's forward: KeyError: 'only ones, please'"),
        (NoWayBack.apply, "has no gradients: NotImplementedError: there is no way back"),
        (lambda y: y.detach(), "do not depend on any weight in a differentiable way"),
        (lambda y: y / 0, "the dense model's output for batch 0 is not finite"),
        (infinite_gradient, "is not finite"),
        (lambda y: y.argmax(-1), "holds no floating-point tensor that has rows"),
        (lambda y: y.to_sparse(), "holds no floating-point tensor that has rows"),
        (lambda y: y[y[:, 0] > 0], "rows and entries of output for batch 0, the other"),
    ],
    ids=[
        "forward",
        "backward",
        "detached",
        "NaN",
        "NaN gradients",
        "no output",
        "sparse",
        "other outputs",
    ],
)
def test_a_model_that_fails_on_data_of_its_own(change: Callable[[Tensor], Any], why: str) -> None:
    note = alone(compiled(Changed(change)))
    assert note.startswith("as the model failed on data of its own (ModelError: ")
    assert why in note


def test_a_decoder_that_fails_while_it_writes() -> None:
    model = CASES["gpt"].model()
    forward, longest = model.forward, 4

    def forgetful(ids: Tensor) -> Any:
        result = forward(ids)
        if ids.shape[1] > longest:
            result.logits = result.logits * torch.nan
        return result

    model.forward = forgetful  # type: ignore[method-assign]
    report = compiled(model, example_inputs=(torch.ones(2, 4, dtype=torch.long),))
    assert "the logits of a text of 5 tokens are not finite" in alone(report)


# -------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError("no room"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
    ids=["GPU", "Python", "CPU"],
)
@pytest.mark.parametrize("ours", [False, True], ids=["in the model", "in the library"])
def test_memory_that_runs_out(
    error: Exception, ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> Any:
        raise error

    if ours:
        monkeypatch.setattr(gathering, "_add_rows", full)
    note = alone(compiled(MLP() if ours else Changed(full)))
    assert note == f"as memory ran out on data of its own ({type(error).__name__}: {error})"


def test_real_memory_of_the_cpu_that_runs_out() -> None:
    note = alone(compiled(Changed(lambda y: y + torch.empty(1 << 60))))
    assert note.startswith("as memory ran out on data of its own")


def test_memory_that_the_caller_does_not_allow() -> None:
    note = alone(compiled(MLP(), max_memory=1000))
    assert note.startswith("as memory ran out on data of its own (MemoryLimitError: ")
    assert "second moments take" in note


# ------------------------------------------------------------------------------ our own errors


class Defect(Exception):
    """A mistake in the library."""


DEFECTS = [ZeroDivisionError, RuntimeError, KeyError, AnalysisError, CaptureError]

STAGES: dict[str, tuple[Any, str]] = {
    "the data": (synthetic, "_drawn"),
    "what the data are like": (synthetic, "_looked_up"),
    "the loss": (outputs, "_by_rows"),
    "changed inputs": (gathering, "peculiar"),
    "moments, in the backward pass": (gathering, "_add_term"),
    "moments, after it": (gathering, "_normalise"),
    "metrics": (metric, "shrinkage"),
    "spectra": (spectra, "singular_squares"),
    "refits, in the model": (refit, "stand_in"),
    "refits": (refit, "best_factors"),
    "prediction": (CalibratePrediction, "_measured"),
}


def broken(monkeypatch: pytest.MonkeyPatch, where: Any, name: str, error: BaseException) -> None:
    """Something fails once, so that all would go well with the weights alone."""
    real = getattr(where, name)

    def fail(*_: object, **__: object) -> None:
        monkeypatch.setattr(where, name, real)
        raise error

    monkeypatch.setattr(where, name, fail)


@pytest.mark.parametrize("stage", STAGES)
def test_a_defect_of_ours_is_not_taken_for_the_models(
    stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(monkeypatch, *STAGES[stage], Defect("ours"))
    with pytest.raises(Defect):
        compiled(MLP())


@pytest.mark.parametrize("kind", DEFECTS)
@pytest.mark.parametrize("stage", ["moments, in the backward pass", "refits, in the model"])
def test_whatever_it_raises(
    kind: type[Exception], stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = kind("ours")
    broken(monkeypatch, *STAGES[stage], error)
    with pytest.raises(kind) as told:
        compiled(MLP())
    assert told.value is error


def test_a_model_that_catches_everything_does_not_hide_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Careless(MLP):
        def forward(self, x: Tensor) -> Tensor:
            try:
                return super().forward(x)
            except Exception:
                return x

    broken(monkeypatch, refit, "stand_in", Defect("ours"))
    with pytest.raises(Defect):
        compiled(Careless())


def test_a_defect_in_a_polished_model_is_not_taken_for_the_models(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its factors run inside of it."""
    real = polish.polish

    def with_a_defect(small: nn.Module, *rest: Any) -> Any:
        broken(monkeypatch, type(small), "forward", Defect("ours"))
        return real(small, *rest)

    monkeypatch.setattr(polish, "polish", with_a_defect)
    with pytest.raises(Defect):
        compiled(MLP(), refine="polish")


def test_a_defect_while_uses_are_seen_is_no_misfit_of_the_example(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken(monkeypatch, observer, "view", Defect("ours"))
    with pytest.raises(Defect):
        compiled(nn.Sequential(nn.Linear(48, 48), nn.LayerNorm(48)))


def test_keys_that_stop_a_run_stop_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(y: Tensor) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compiled(Changed(interrupted))
    broken(monkeypatch, gathering, "_add_term", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        compiled(MLP())


def test_the_weights_alone_are_not_judged_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def fail(*_: object, **__: object) -> None:
        nonlocal calls
        calls += 1
        raise MemoryError("no room")

    monkeypatch.setattr(synthetic, "_UNASKED_FLOPS", 0.0)
    monkeypatch.setattr(spectra, "singular_squares", fail)
    with pytest.raises(MemoryError):
        compiled(nn.Sequential(nn.Linear(48, 48)))
    assert calls == 1


def test_data_of_its_own_are_made_again_from_the_example_inputs_of_a_plan_from_json() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(48, 48), nn.Linear(48, 48)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.relu(self.one(x)) + self.other(y)

    model, inputs = Two(), (torch.randn(8, 48), torch.randn(8, 48))
    given: dict[str, Any] = {"example_inputs": inputs, "calibration": "self"}
    plan = tensorize.analyze(model, seed=3, **given).plan(0.5, refine="refit")
    one = tensorize.apply(model, plan)
    again = tensorize.apply(model, tensorize.Plan.from_json(plan.to_json()), **given)
    for a, b in zip(one.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
