"""The observer: what it sees of a run, and what it leaves as it was.

Shapes: B rows, M rows and N columns of the weight W.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorize.capture.matmul import Frame, Matmul
from tensorize.capture.observer import Observer
from tests.capture.calls import IDS, B, M, N, draw, parameter
from tests.capture.observed import Seen, check, observe


def test_two_weights_in_one_call_are_both_told() -> None:
    one, two = parameter(M, N), nn.Parameter(draw((N, 2)))
    seen = observe(lambda: one @ two, one, two)
    assert [(frame, m.contract) for frame, m, _ in seen.matmuls] == [
        (Frame(), "columns"),
        (Frame(), "rows"),
    ]
    for weight, (frame, matmul, output) in zip((one, two), seen.matmuls, strict=True):
        check(frame, matmul, output, weight)


def test_the_model_goes_on_with_what_the_observer_gives_back() -> None:
    weight, x = parameter(M, N), draw((B, N))
    with Observer([("w", weight)], lambda name, frame, matmul, output: output + 1):
        y = F.linear(x, weight)
    assert torch.equal(y, F.linear(x, weight) + 1)


def test_a_module_is_seen_through_its_own_forward() -> None:
    model = nn.Sequential(nn.Embedding(M, N), nn.Linear(N, 2), nn.Flatten(0, 1)).double()
    names: list[str] = []

    def on_matmul(name: str, frame: Frame, matmul: Matmul, output: Tensor) -> Tensor:
        names.append(f"{name} {matmul.kind}")
        return output

    with Observer(model.named_parameters(), on_matmul):
        model(IDS)
    assert names == ["0.weight embedding", "1.weight linear"]


def test_a_tensor_at_a_freed_address_is_not_taken_for_the_weight() -> None:
    weight, x = parameter(M, N), draw((B, M))

    def run() -> None:
        for _ in range(200):
            view = weight.t()
            del view
            gc.collect(0)
            # Tensors as large as the view, some of them likely where it was.
            for other in [torch.zeros(N, M, dtype=torch.float64) for _ in range(3)]:
                F.linear(x, other)

    assert observe(run, weight) == Seen([], [])


def test_nothing_is_told_after_the_run() -> None:
    weight, told = parameter(M, N), []
    observer = Observer([("w", weight)], lambda name, frame, matmul, y: told.append(name) or y)
    with observer:
        F.linear(draw((B, N)), weight)
    F.linear(draw((B, N)), weight)
    assert told == ["w"]


FROZEN = {
    "positional": lambda x, w, b: F.linear(x, w, b),
    "keywords": lambda x, w, b: F.linear(input=x, weight=w, bias=b),
    "a view": lambda x, w, b: torch.addmm(b, x, w.t()),
    "a list": lambda x, w, b: torch.einsum("bn,mn->bm", [x, w]) + b,
}


@pytest.mark.parametrize("run", FROZEN.values(), ids=FROZEN)
def test_frozen_parameters_take_no_gradient(run: Callable[..., Tensor]) -> None:
    weight, bias, x = parameter(M, N), nn.Parameter(draw((M,))), draw((B, N)).requires_grad_()
    outputs: list[Tensor] = []
    seen = observe(lambda: outputs.append(run(x, weight, bias)), weight, frozen=True)
    assert len(seen.matmuls) == 1
    outputs[0].sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, weight.detach().sum(0).expand(B, N))
    assert weight.grad is None
    assert bias.grad is None
    assert weight.requires_grad
    assert bias.requires_grad


@pytest.mark.parametrize("run", FROZEN.values(), ids=FROZEN)
def test_frozen_parameters_alone_give_an_output_without_gradient(
    run: Callable[..., Tensor],
) -> None:
    weight, bias, x = parameter(M, N), nn.Parameter(draw((M,))), draw((B, N))
    seen = observe(lambda: run(x, weight, bias), weight, frozen=True)
    assert [output.requires_grad for _, _, output in seen.matmuls] == [False]


def test_a_matmul_that_is_computed_instead_does_not_run() -> None:
    class Counting(torch.overrides.TorchFunctionMode):
        calls = 0

        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.calls += func is F.linear
            return func(*args, **(kwargs or {}))

    one, two, x = parameter(M, N), parameter(M, M), draw((B, N))

    def instead(name: str, frame: Frame, matmul: Matmul, dense: Callable[[], Tensor]) -> Tensor:
        assert torch.equal(matmul.x, x)
        return matmul.x.new_ones(B, M) if name == "one" else dense()

    for name, ran in (("one", 1), ("another", 2)):
        with Counting() as beneath, Observer([(name, one)], instead=instead):
            y = F.linear(F.linear(x, one), two)
        hidden = torch.ones_like(y) if name == "one" else F.linear(x, one)
        assert torch.equal(y, F.linear(hidden, two))
        assert beneath.calls == ran
