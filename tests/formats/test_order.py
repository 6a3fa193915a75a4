"""Columns in another order: what indexing gives, whatever the tensor and whatever asks for it."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from tensorize.algebra.pivot import columns
from tensorize.formats.order import in_order, inverse

ORDER = torch.randperm(12, generator=torch.Generator().manual_seed(0)).int()
GROUPS = [torch.tensor(order).int() for order in ([2, 0, 1], [3, 5, 0, 2, 1, 4], [0])]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(12,), (1, 12), (5, 12), (2, 3, 12), (0, 12)])
def test_columns_are_those_of_an_index(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = draw(*shape, dtype=dtype)
    for each in (x, x.expand(2, *shape), x.unsqueeze(0).transpose(0, -2)):
        assert torch.equal(in_order(each, ORDER), each[..., ORDER.long()])
        assert torch.equal(in_order(in_order(each, ORDER), inverse(ORDER)), each)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(12,), (1, 12), (5, 12), (2, 3, 12), (0, 12)])
def test_groups_of_neighbours_stay_together(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = draw(*shape, dtype=dtype)
    shifted = draw(*shape[:-1], 14, dtype=dtype)[..., 1:13]  # no word begins where its rows do
    for order in GROUPS:
        width = 12 // len(order)
        every = [width * int(group) + k for group in order for k in range(width)]
        assert columns(order, 12).tolist() == every
        for each in (x, shifted, x.expand(2, *shape), x.unsqueeze(0).transpose(0, -2)):
            assert torch.equal(in_order(each, order), each[..., every])
            assert torch.equal(in_order(in_order(each, order), inverse(order)), each)


@pytest.mark.parametrize("order", GROUPS)
def test_groups_have_the_same_gradients_and_graphs(order: Tensor) -> None:
    x = draw(2, 3, 12).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: in_order(x, order), (x,))
    every = columns(order, 12).long()
    assert torch.equal(torch.func.vmap(lambda x: in_order(x, order))(x), x[..., every])
    torch._dynamo.reset()
    run = torch.compile(lambda x: 2 * in_order(x, order), backend="eager", fullgraph=True)
    assert torch.equal(run(x), 2 * x[..., every])


def test_gradients_of_both_kinds_and_orders() -> None:
    x = draw(2, 3, 12).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: in_order(x, ORDER), (x,))
    assert torch.autograd.gradgradcheck(lambda x: in_order(x, ORDER).sin(), (x,))
    for given in (x, x.detach()):
        torch.library.opcheck(torch.ops.tensorize.in_order.default, (given, ORDER))


@pytest.mark.parametrize("compiled", [False, True])
def test_transforms_of_functions_see_through_it(compiled: bool) -> None:
    x, pushed = draw(4, 12), draw(4, 12)

    def square(x: Tensor) -> Tensor:
        return in_order(x, ORDER).square()

    def all_of_them(x: Tensor) -> tuple[Tensor, ...]:
        return (
            torch.func.grad(lambda x: square(x).sum())(x),
            torch.func.vmap(square)(x),
            torch.func.jvp(square, (x,), (pushed,))[1],
        )

    torch._dynamo.reset()
    run = torch.compile(all_of_them, backend="eager", fullgraph=True) if compiled else all_of_them
    gradient, batched, tangent = run(x)
    torch.testing.assert_close(gradient, 2 * x)
    torch.testing.assert_close(batched, square(x))
    torch.testing.assert_close(tangent, in_order(2 * x * pushed, ORDER))


class Ordered(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return in_order(x, ORDER)


def test_graphs_that_are_kept_have_torchs_own_operations() -> None:
    x = draw(5, 12, dtype=torch.bfloat16)
    exported = torch.export.export(Ordered(), (x,))
    assert "in_order" not in str(exported.graph)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = torch.jit.trace(Ordered(), x)
    assert "in_order" not in str(traced.graph)
    for graph in (exported.module(), traced):
        assert torch.equal(graph(x), in_order(x, ORDER))
