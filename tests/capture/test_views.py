"""Views of a weight, and parts of it, are still the weight.

Shapes: B rows, M rows and N columns of the weight W, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tensorize.capture.matmul import Frame
from tests.capture.calls import ROWS, B, E, M, N, draw, parameter
from tests.capture.observed import check, the_matmul

TRANSPOSED = {
    "t()": lambda w: w.t(),
    "torch.t": torch.t,
    "T": lambda w: w.T,
    "mT": lambda w: w.mT,
    "transpose": lambda w: w.transpose(0, 1),
    "transpose, negative": lambda w: torch.transpose(w, -1, -2),
    "transpose, keywords": lambda w: w.transpose(dim0=1, dim1=0),
    "transposed copy": lambda w: w.t().contiguous(),
    "three times": lambda w: w.t().T.mT,
}
UNCHANGED = {
    "detach": lambda w: w.detach(),
    "torch.detach": torch.detach,
    "contiguous": lambda w: w.contiguous(),
    "twice transposed": lambda w: w.t().t(),
    "to the same dtype": lambda w: w.to(torch.float64),
    "to the same dtype and device": lambda w: w.to("cpu", torch.float64),
    "to a tensor of the same dtype": lambda w: w.to(draw((1,))),
    "type_as": lambda w: w.type_as(draw((1,))),
    "view_as": lambda w: w.view_as(w),
}

MULTIPLES = {
    "times a number": (lambda w: w * 0.5, 0.5),
    "a number first": (lambda w: -2 * w, -2.0),
    "over a number": (lambda w: w / 4, 0.25),
    "torch.mul, torch.div": (lambda w: torch.div(torch.mul(w, 3), 2), 1.5),
}


@pytest.mark.parametrize("name", MULTIPLES)
def test_a_multiple_of_a_weight_is_still_the_parameter(name: str) -> None:
    look, scale = MULTIPLES[name]
    weight = parameter(M, N)
    frame, matmul, output = the_matmul(lambda: F.linear(draw((B, N)), look(weight)), weight)
    assert (frame, matmul.contract) == (Frame(scale=scale), "columns")
    check(frame, matmul, output, weight)
    frame, matmul, output = the_matmul(
        lambda: draw((B, M - 2)) @ look(weight[1:].t()).t()[1:], weight
    )
    assert (frame, matmul.contract) == (Frame(scale=scale, rows=(2, M)), "rows")


@pytest.mark.parametrize("look", TRANSPOSED.values(), ids=TRANSPOSED)
def test_a_transposed_weight_is_still_the_parameter(look: Callable[[Tensor], Tensor]) -> None:
    weight = parameter(N, M)
    frame, matmul, output = the_matmul(lambda: F.linear(draw((B, N)), look(weight)), weight)
    assert (frame, matmul.contract) == (Frame(transposed=True), "rows")
    check(frame, matmul, output, weight)
    frame, matmul, output = the_matmul(lambda: draw((B, M)) @ look(weight), weight)
    assert (frame, matmul.contract) == (Frame(transposed=True), "columns")
    check(frame, matmul, output, weight)


@pytest.mark.parametrize("look", UNCHANGED.values(), ids=UNCHANGED)
def test_an_unchanged_weight_is_still_the_parameter(look: Callable[[Tensor], Tensor]) -> None:
    weight = parameter(M, N)
    frame, matmul, output = the_matmul(lambda: F.linear(draw((B, N)), look(weight)), weight)
    assert (frame, matmul.contract) == (Frame(), "columns")
    check(frame, matmul, output, weight)


@pytest.mark.parametrize("name", ROWS)
def test_some_rows_of_a_weight_are_seen(name: str) -> None:
    look, rows = ROWS[name]
    weight, width = parameter(M, N), rows[1] - rows[0]
    frame, matmul, output = the_matmul(lambda: F.linear(draw((B, N)), look(weight)), weight)
    assert (frame, matmul.contract) == (Frame(rows=rows), "columns")
    check(frame, matmul, output, weight)
    frame, matmul, output = the_matmul(lambda: draw((B, N)) @ look(weight).t(), weight)
    assert (frame, matmul.contract) == (Frame(transposed=True, rows=rows), "columns")
    check(frame, matmul, output, weight)
    frame, matmul, output = the_matmul(lambda: draw((B, width)) @ look(weight), weight)
    assert (frame, matmul.contract) == (Frame(rows=rows), "rows")
    check(frame, matmul, output, weight)


@pytest.mark.parametrize("expert", [0, 2, -1, torch.tensor(1)], ids=["0", "2", "-1", "tensor"])
def test_one_expert_of_a_stack_is_seen(expert: Any) -> None:
    weight = parameter(E, M, N)
    frame, matmul, output = the_matmul(lambda: F.linear(draw((B, N)), weight[expert]), weight)
    assert frame.expert is expert
    assert matmul.contract == "columns"
    check(frame, matmul, output, weight)


def test_several_experts_of_a_stack_are_seen() -> None:
    weight, experts = parameter(E, M, N), torch.tensor([2, 0, 0, 1])
    for run, contract in (
        (lambda: torch.bmm(draw((4, 1, M)), weight[experts]), "rows"),
        (lambda: torch.bmm(weight[experts], draw((4, N, 1))), "columns"),
    ):
        frame, matmul, output = the_matmul(run, weight)
        assert frame.expert is experts
        assert matmul.contract == contract
        check(frame, matmul, output, weight)


@pytest.mark.parametrize(
    "look", [lambda w: w[1].t(), lambda w: w.transpose(1, 2)[1], lambda w: w.mT[1]]
)
def test_one_expert_transposed_is_seen(look: Callable[[Tensor], Tensor]) -> None:
    weight = parameter(E, N, M)
    frame, matmul, output = the_matmul(lambda: F.linear(draw((B, N)), look(weight)), weight)
    assert (frame, matmul.contract) == (Frame(transposed=True, expert=1), "rows")
    check(frame, matmul, output, weight)
