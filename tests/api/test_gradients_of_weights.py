"""Who wants the gradient of a weight itself: hooks on it, custom functions that take it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

import tensorize
from tensorize.base.errors import BudgetError, TensorizeError

X = torch.randn(8, 24, generator=torch.Generator().manual_seed(1))
IDS = torch.tensor([[1, 2, 23]])


def compress(model: nn.Module, budget: Any = 0.8, inputs: Tensor = X, **more: Any) -> Any:
    chosen = {"metric": "frobenius", "progress": False, **more}
    return tensorize.compile(model, budget, example_inputs=(inputs,), **chosen)


def reasons(small: nn.Module) -> dict[str, tuple[str, str]]:
    return {site.name: (site.format, site.reason) for site in tensorize.report(small).sites}


# ---------------------------------------------------------------------------------------- hooks


def table() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(24, 24), nn.Linear(24, 24))


@pytest.mark.parametrize("inplace", [False, True])
def test_a_hook_on_a_weight_keeps_it_dense_and_is_called(inplace: bool) -> None:
    """Only the last rows are trained, as where words are added to a table."""
    model = table()
    calls: list[int] = []
    mask = torch.zeros(24, 1)
    mask[20:] = 1

    def hook(gradient: Tensor) -> Tensor:
        calls.append(1)
        return gradient * mask

    model[0].weight.register_hook(hook)
    small = compress(model, inputs=IDS, inplace=inplace)
    form, reason = reasons(small)["0.weight"]
    assert form == "dense"
    assert "gradient hook" in reason
    assert reasons(small)["1.weight"][0] == "low_rank"
    before = small[0].weight.detach().clone()
    small(IDS).square().sum().backward()
    torch.optim.SGD(small.parameters(), 0.1).step()
    moved = (small[0].weight.detach() - before).abs().amax(1)
    assert calls
    assert float(moved[:20].max()) == 0
    assert float(moved[23]) > 0


def test_hooks_on_other_parameters_go_with_the_copy() -> None:
    model = table()
    seen: list[str] = []
    model[1].bias.register_hook(lambda gradient: seen.append("hook"))
    model[1].bias.register_post_accumulate_grad_hook(lambda bias: seen.append("after"))
    compress(model, inputs=IDS)(IDS).sum().backward()
    assert seen == ["hook", "after"]
    model(IDS).sum().backward()
    assert seen == ["hook", "after"] * 2


def test_a_hook_after_accumulation_keeps_a_weight_dense() -> None:
    model = table()
    seen: list[Tensor] = []
    model[1].weight.register_post_accumulate_grad_hook(seen.append)
    small = compress(model, inputs=IDS)
    assert reasons(small)["1.weight"][0] == "dense"
    small(IDS).sum().backward()
    assert seen[0] is small[1].weight


def test_hooks_on_every_weight_are_an_error_that_names_one() -> None:
    """As where the optimizer steps in the backward pass."""
    model = table()
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(BudgetError, match="gradient hook sits on it"):
        compress(model, inputs=IDS)


ASKED: dict[str, Callable[[Any, Tensor], Any]] = {
    "register_hook": lambda w, y: w.register_hook(lambda g: g),
    "post_accumulate": lambda w, y: w.register_post_accumulate_grad_hook(lambda p: None),
    "of the class": lambda w, y: torch.Tensor.register_hook(w, lambda g: g),
    "grad": lambda w, y: torch.autograd.grad(y.sum(), w),
    "backward": lambda w, y: torch.autograd.backward(y.sum(), inputs=[w]),
    "of its data": lambda w, y: w.detach().register_hook(lambda g: g),
    "transposed": lambda w, y: w.t().register_hook(lambda g: g),
}


@pytest.mark.parametrize("name", ASKED)
@pytest.mark.parametrize("layer", [0, 1])
def test_the_gradient_of_a_lazy_weight_cannot_be_asked_for(name: str, layer: int) -> None:
    small = compress(table(), None, inputs=IDS, ranks={"*": 4})
    y = small(IDS)
    with pytest.raises(TensorizeError, match="factors are trained") as caught:
        ASKED[name](small[layer].weight, y)
    assert "exclude=" in str(caught.value)
    seen: list[int] = []
    for core in small[layer].weight.cores:  # the way out
        core.register_hook(lambda gradient: seen.append(1))
    small(IDS).sum().backward()
    assert len(seen) == 2


def test_hooks_on_several_tensors_refuse_a_lazy_weight() -> None:
    small = compress(table(), None, inputs=IDS, ranks={"*": 4})
    with pytest.raises((TensorizeError, AttributeError)):
        torch.autograd.graph.register_multi_grad_hook([small[1].weight], lambda gradients: None)


# ------------------------------------------------------------------------------ custom functions


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.t()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        (g,) = gradients
        return g @ w, g.t() @ x


class Twice(torch.autograd.Function):
    """Two weights, in the newer style, differentiated once."""

    @staticmethod
    def forward(x: Tensor, v: Tensor, w: Tensor) -> Tensor:
        return x @ v.t() @ w.t()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, v, w = ctx.saved_tensors
        (g,) = gradients
        return g @ w @ v, (g @ w).t() @ x, g.t() @ (x @ v.t())


@torch.library.custom_op("tests_own::product", mutates_args=())
def _product(x: Tensor, w: Tensor) -> Tensor:
    return x @ w.t()


_product.register_autograd(
    lambda ctx, g: (g @ ctx.saved_tensors[1], g.t() @ ctx.saved_tensors[0]),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


class Own(nn.Module):
    """A layer whose weights are used by ``call``."""

    def __init__(self, call: Callable[..., Tensor], several: bool = False) -> None:
        super().__init__()
        self.call = call
        self.weight = nn.Parameter(torch.randn(24, 24) / 5)
        self.other = nn.Parameter(torch.randn(24, 24) / 5) if several else None

    def forward(self, x: Tensor) -> Tensor:
        own = [w for w in (self.weight, self.other) if w is not None]
        return self.call(x, *own)


def stacked(own: Own, first: bool) -> Any:
    layers = [nn.Linear(24, 24), nn.Linear(24, 24)]
    return nn.Sequential(own, *layers) if first else nn.Sequential(*layers, own)


def through_a_view(x: Tensor, w: Tensor) -> Tensor:
    return Product.apply(x, w.t().t())  # type: ignore[no-any-return]


def within_a_checkpoint(x: Tensor, w: Tensor) -> Tensor:
    return checkpoint(Product.apply, x, w, use_reentrant=False)  # type: ignore[return-value]


KEPT: dict[str, Callable[[], Own]] = {
    "product": lambda: Own(Product.apply),
    "two weights": lambda: Own(Twice.apply, several=True),
    "a view": lambda: Own(through_a_view),
    "checkpoint": lambda: Own(within_a_checkpoint),
}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", KEPT)
def test_what_a_custom_function_takes_stays_dense_and_is_trained(name: str, first: bool) -> None:
    torch.manual_seed(0)
    model = stacked(KEPT[name](), first)
    small = compress(model, 0.9)
    own = small[0] if first else small[2]
    for leaf, _ in own.named_parameters():
        form, reason = reasons(small)[f"{0 if first else 2}.{leaf}"]
        assert form == "dense"
        assert "autograd.Function" in reason
    small(X).square().sum().backward()
    plain = copy.deepcopy(small)
    (plain[0] if first else plain[2]).call = lambda x, *w: (
        x @ w[0].T if len(w) == 1 else (x @ w[0].T @ w[1].T)
    )
    plain.zero_grad()
    plain(X).square().sum().backward()
    for (leaf, got), want in zip(small.named_parameters(), plain.parameters(), strict=True):
        assert got.grad is not None, leaf
        assert torch.allclose(got.grad, want.grad, rtol=1e-4, atol=1e-4), leaf


def test_a_budget_that_needs_it_is_an_error_that_names_it() -> None:
    with pytest.raises(BudgetError, match=r"0\.weight.*autograd\.Function Product") as caught:
        compress(nn.Sequential(Own(Product.apply), nn.Linear(24, 24)), 0.5)
    way_out = caught.value.way_out
    assert way_out is not None
    least = float(way_out.partition("budget=")[2].partition(",")[0])
    assert compress(nn.Sequential(Own(Product.apply), nn.Linear(24, 24)), least) is not None


def reentrant(x: Tensor, w: Tensor) -> Tensor:
    """The function that checkpoints is given the input only."""
    return checkpoint(lambda y: F.linear(y, w), x, use_reentrant=True)  # type: ignore[return-value]


def by_an_operator(x: Tensor, w: Tensor) -> Tensor:
    return _product(x, w)


TRAINED: dict[str, Callable[..., Tensor]] = {
    "custom operator": by_an_operator,
    "checkpoint": lambda x, w: checkpoint(F.linear, x, w, use_reentrant=False),
    "vmap": lambda x, w: torch.func.vmap(lambda row: F.linear(row, w))(x),
    "jvp": lambda x, w: torch.func.jvp(lambda y: F.linear(y, w), (x,), (x,))[1],
}


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("first", [True, False])
def test_factors_get_gradients_through(name: str, first: bool) -> None:
    torch.manual_seed(0)
    small = compress(stacked(Own(TRAINED[name]), first), 0.3)
    own = small[0] if first else small[2]
    assert reasons(small)["0.weight" if first else "2.weight"][0] == "low_rank"
    small(X).square().sum().backward()
    got = [core.grad for core in own.weight.cores]
    twin = copy.deepcopy(small)
    twin.zero_grad()
    (twin[0] if first else twin[2]).call = lambda x, w: x @ w.dense().T
    twin(X).square().sum().backward()
    for ours, core in zip(got, (twin[0] if first else twin[2]).weight.cores, strict=True):
        assert ours is not None
        assert torch.allclose(ours, core.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_what_checkpoints_by_a_function_takes_no_weight() -> None:
    torch.manual_seed(0)
    small = compress(stacked(Own(reentrant), first=False), 0.3)
    assert reasons(small)["2.weight"][0] == "low_rank"
    small(X).square().sum().backward()
    assert all(core.grad is not None for core in small[2].weight.cores)
