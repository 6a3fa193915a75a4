"""What holds of factors holds of integers of a few bits."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

import tensorize
from tensorize.algebra import packing
from tensorize.formats.format import Chain
from tensorize.formats.quantized import Quantized, inputs_in_full
from tensorize.weight.install import factored
from tensorize.weight.whole_model import limit_saved, numbers
from tests.models import relative
from tests.weight.quantized_models import FORMS, IDS, NAMES, Form, net, put, small_net

EACH = pytest.mark.parametrize("form", FORMS, ids=NAMES)
HALF = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
OFFSETS = torch.tensor([4, 4, 12, 16], dtype=torch.int32)
INPUTS = 0.02
"""What rounding inputs to eight bits may change, relative to the outputs."""


class Own(nn.Module):
    """A stack of matrices, and a function of it and of the input."""

    def __init__(self, use: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.use = nn.Parameter(torch.randn(4, 40, 24) / 5), use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(x, self.weight)


class Attention(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x.flip(1), x, need_weights=False)[0]


def several(x: Tensor, w: Tensor) -> Tensor:
    return torch.bmm(w[torch.tensor([2, 0, 2])], x[:3].unsqueeze(-1)).squeeze(-1)


ROWS, SOME = (16, 24), (2, 8)
# A model, its weight, and the shape of its input (of two numbers below 50: rows of a table).
USES: dict[str, tuple[Callable[[], nn.Module], str, tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(24, 40)), "0.weight", ROWS),
    "Conv1D": (lambda: nn.Sequential(Conv1D(40, 24)), "0.weight", ROWS),
    "convolution": (lambda: nn.Sequential(nn.Conv2d(4, 16, 3)), "0.weight", (2, 4, 6, 6)),
    "table": (lambda: nn.Sequential(nn.Embedding(50, 24)), "0.weight", SOME),
    "bag": (lambda: nn.Sequential(nn.EmbeddingBag(50, 24)), "0.weight", SOME),
    "attention": (lambda: Attention(24, 2, batch_first=True), "in_proj_weight", (2, 5, 24)),
    "one expert": (lambda: Own(lambda x, w: F.linear(x, w[2])), "weight", ROWS),
    "several experts": (lambda: Own(several), "weight", ROWS),
    "stack": (lambda: Own(lambda x, w: x @ w.mT), "weight", (4, 16, 24)),
    "grouped": (lambda: Own(lambda x, w: F.grouped_mm(x, w.mT, offs=OFFSETS)), "weight", ROWS),
}


def model_and_input(use: str, dtype: torch.dtype) -> tuple[nn.Module, str, Tensor]:
    torch.manual_seed(0)
    build, name, shape = USES[use]
    x = torch.randint(0, 50, shape) if shape is SOME else torch.randn(shape).to(dtype)
    return build().eval().to(dtype), name, x


@EACH
@HALF
@pytest.mark.parametrize("use", USES)
def test_every_use_is_that_of_the_numbers(use: str, form: Form, dtype: torch.dtype) -> None:
    model, name, x = model_and_input(use, dtype)
    put(model, name, form)
    dense = tensorize.densify(model)
    rounding = 16 * torch.finfo(dtype).eps
    with torch.no_grad():
        wanted = dense(x)
        assert model(x).dtype == wanted.dtype
        assert relative(model(x), wanted) < INPUTS
        with inputs_in_full():
            assert relative(model(x), wanted) < rounding


@EACH
@pytest.mark.parametrize("recorded", [True, False])
def test_autocast_says_the_dtype_of_products(form: Form, recorded: bool) -> None:
    model, name, x = model_and_input("linear", torch.float32)
    put(model, name, form)
    with torch.set_grad_enabled(recorded), torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
        assert relative(model(x).detach(), tensorize.densify(model)(x).detach()) < INPUTS


@EACH
def test_a_lookup_builds_no_table(form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    model, name, x = model_and_input("table", torch.float32)
    put(model, name, form)
    wanted = tensorize.densify(model)(x)
    made: list[tuple[int, ...]] = []
    values = packing.values

    def seen(*args: Any) -> Tensor:
        found = values(*args)
        made.append(tuple(found.shape))
        return found

    def refuse(*_: object) -> Tensor:
        raise AssertionError("the table was built")

    monkeypatch.setattr(packing, "values", seen)
    for kind in (Chain, Quantized):
        monkeypatch.setattr(kind, "reconstruct", refuse)
    assert relative(model(x).detach(), wanted.detach()) < 1e-6
    assert made[0][0] == x.numel()
    assert (50, 24) not in made


@EACH
def test_gradients_of_the_scales_are_those_through_the_numbers(form: Form) -> None:
    small, other = small_net(form), small_net(form)
    dense = tensorize.densify(other)
    small(IDS).square().sum().backward()
    values = {name: w.dense() for name, w in factored(other) if name != "head.weight"}
    functional_call(dense, values, (IDS,)).square().sum().backward()
    for (name, weight), (_, wanted) in zip(factored(small), factored(other), strict=True):
        for scale, oracle in zip(weight.cores, wanted.cores, strict=True):
            assert scale.grad is not None, name
            assert relative(scale.grad, oracle.grad) < 1e-4  # type: ignore[arg-type]


def test_codes_do_not_train() -> None:
    small = small_net(("int4", 0, False))
    with pytest.raises(RuntimeError, match="floating point"):
        small.up.weight_cores.codes_0.requires_grad_()
    small.up.weight.requires_grad_(False)
    assert not any(scale.requires_grad for scale in small.up.weight.cores)


@EACH
@HALF
def test_copies_are_the_same_to_the_bit(form: Form, dtype: torch.dtype) -> None:
    small, blank, file = small_net(form, dtype), small_net(form, dtype), io.BytesIO()
    for tensor in (*blank.parameters(), *blank.buffers()):
        tensor.detach().zero_()
    blank.load_state_dict(small.state_dict())
    torch.save(small, file)
    file.seek(0)
    for again in (
        blank,
        copy.deepcopy(small),
        pickle.loads(pickle.dumps(small)),
        torch.load(file, weights_only=False),
        tensorize.weight.pivoted(copy.deepcopy(small)),
        tensorize.weight.plain(copy.deepcopy(small)),
    ):
        mine, theirs = again.state_dict(), small.state_dict()
        assert mine.keys() == theirs.keys()
        assert all(mine[key].equal(theirs[key]) for key in theirs)
        assert again.head.weight.cores[0] is again.table.weight.cores[0]
        with torch.no_grad():
            assert torch.equal(again(IDS), small(IDS))


@EACH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.half, torch.double], ids=str)
def test_another_dtype_is_one_of_the_scales(form: Form, dtype: torch.dtype) -> None:
    small = small_net(form)
    cast = copy.deepcopy(small).to(dtype)
    for (name, before), (_, after) in zip(small.named_buffers(), cast.named_buffers(), strict=True):
        assert after.equal(before), name
        assert after.dtype == before.dtype
    with torch.no_grad(), inputs_in_full():
        rounding = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
        assert relative(cast(IDS), small(IDS)) < 16 * rounding


@EACH
def test_graphs_of_it_are_whole(form: Form) -> None:
    small = small_net(form)
    with torch.no_grad():
        compiled = torch.compile(small, backend="eager", fullgraph=True)
        assert relative(compiled(IDS), small(IDS)) < 1e-6
        exported = torch.export.export(small, (IDS,)).module()
        # Of fewer than eight bits it has the numbers: a pack is no part of the model.
        with contextlib.nullcontext() if form[0] == "int8" else inputs_in_full():
            assert relative(exported(IDS), small(IDS)) < 1e-6
    torch._dynamo.reset()


@pytest.mark.parametrize("form", [("int8", 0, False), ("int4", 0, False)], ids=str)
def test_a_trace_holds_the_numbers(form: Form) -> None:
    small = small_net(form)
    with warnings.catch_warnings():  # it is deprecated
        warnings.simplefilter("ignore", DeprecationWarning)
        # Its check compares with integers, which the model runs by.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        traced: Any = torch.jit.trace(small, (IDS,))
    with torch.no_grad(), inputs_in_full():
        assert relative(traced(IDS), small(IDS)) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["inductor", "tensorize"])
@pytest.mark.parametrize("form", [FORMS[0], FORMS[1], FORMS[7]], ids=str)
def test_compiled_graphs_compute_the_same(form: Form, backend: str) -> None:
    small = small_net(form)
    with torch.no_grad():
        assert relative(torch.compile(small, backend=backend)(IDS), small(IDS)) < 1e-5
    torch._dynamo.reset()


@EACH
def test_codes_count_as_the_numbers_that_they_stand_for(form: Form) -> None:
    small = small_net(form)
    specs = {id(weight.cores[0]): weight.spec for _, weight in factored(small)}
    others = 40 + 24 + 2 * 40  # biases and the norm
    assert numbers(small) == others + sum(spec.parameters for spec in specs.values())
    if not form[1]:
        assert numbers(small) == numbers(net())


def test_a_limit_on_what_is_saved_changes_nothing() -> None:
    small = small_net(("int8", 7, True))
    wanted = small(IDS).detach()
    limit_saved(small)
    small(IDS).sum().backward()
    assert torch.equal(small(IDS).detach(), wanted)
