"""Products are chosen by their rows, and only where they may be."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorize.passes.lowering.cpu_products import ChooseProducts
from tensorize.passes.lowering.graph import lower
from tensorize.passes.lowering.group import GroupProjections
from tensorize.weight.onednn import onednn_linear
from tests.backend.lowered_models import EAGER, X, calls, compressed, lowered_and_run, traced
from tests.models import relative


def test_products_are_chosen_by_their_rows() -> None:
    """oneDNN for many or unknown rows, a transposed copy of a tall weight for one."""
    model = compressed()

    def chosen(rows: int) -> list[str]:
        torch._dynamo.reset()  # else the rows are not known the second time
        return calls(lower(traced(model, torch.randn(1, rows, 32)), (ChooseProducts(),)).graph)

    assert chosen(64).count("onednn_linear.default") == 8
    assert chosen(8).count("linear") == 8
    assert chosen(1).count("t") == 4  # the second factors: 32 x 4


def test_products_are_not_changed_where_they_are_not_in_float32_or_not_of_parameters() -> None:
    half = lower(traced(compressed().to(torch.bfloat16), X.bfloat16()), (ChooseProducts(),))
    assert set(calls(half.graph)) == {"linear", "mul", "add"}

    class Computed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, x.flatten(0, 1) + 1)

    computed = lower(traced(Computed(), torch.randn(1, 64, 32)), (ChooseProducts(),))
    assert calls(computed.graph) == ["flatten", "add", "linear"]


def test_a_vector_is_no_matrix_of_a_linear() -> None:
    class Score(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.weight = nn.Linear(32, 16), nn.Parameter(torch.randn(16))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.layer(x), self.weight)

    model, x = Score(), torch.randn(64, 32)
    lowered = torch.compile(model, backend="tensorize", options={"inner": "eager"})
    with torch.no_grad():
        assert relative(lowered(x), model(x)) < 1e-5


def test_a_weight_that_is_used_twice_has_one_copy() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.narrow = nn.Linear(32, 96), nn.Linear(96, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.wide(self.narrow(self.wide(x)))

    model = Twice()
    program, found = lowered_and_run(model, X, ChooseProducts())
    assert calls(program.graph) == ["t", "linear", "linear", "t", "linear"]
    assert len(program.packed) == 1
    assert relative(found, model(X).detach()) < 1e-6


def test_weights_that_dispatch_for_themselves_are_left_alone() -> None:
    class Own(Tensor):
        """As a quantized weight, or a shard of one, is."""

    program = traced(compressed(), torch.randn(1, 64, 32))
    before = calls(program.graph)
    own = {k: v.as_subclass(Own) for k, v in program.parameters.items()}
    changed = lower(replace(program, parameters=own), (GroupProjections(64), ChooseProducts()))
    assert calls(changed.graph) == before


def test_products_are_not_changed_under_autocast() -> None:
    class Autocast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.small = compressed()

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return self.small(x)

    model, x = Autocast(), torch.randn(1, 64, 32)
    program, _ = lowered_and_run(model, x, ChooseProducts())
    assert calls(program.graph).count("linear") == 8
    lowered = torch.compile(model, backend="tensorize", options=EAGER)
    with torch.no_grad():
        assert torch.equal(lowered(x), model(x))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("out", "into"), [(8, 32), (32, 8)])
def test_the_product_by_onednn_is_a_linear_with_its_gradients(
    bias: bool, out: int, into: int
) -> None:
    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, requires_grad=True)

    arguments = (draw(2, 3, into), draw(out, into), draw(out) if bias else None)
    plain = [a if a is None else a.detach() for a in arguments]
    torch.library.opcheck(torch.ops.tensorize.onednn_linear.default, plain)
    onednn = onednn_linear
    got, want = onednn(*arguments), F.linear(*arguments)
    assert relative(got.detach(), want.detach()) < 1e-6
    given = [a for a in arguments if a is not None]
    g = torch.randn_like(got)
    for one, other in zip(*(torch.autograd.grad(y, given, g) for y in (got, want)), strict=True):
        assert relative(one, other) < 1e-6
    # Twice differentiable: the gradient of a gradient.
    squares = [
        torch.autograd.grad(f(*arguments), arguments[0], g, create_graph=True)[0].square().sum()
        for f in (onednn, F.linear)
    ]
    one, other = (torch.autograd.grad(square, arguments[1])[0] for square in squares)
    assert relative(one, other) < 1e-6
