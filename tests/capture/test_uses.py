"""Calls against a weight, read as matmuls: each one against what torch itself computes.

Shapes: B and T rows, M rows and N columns of the weight W, E experts, C channels.
"""

from __future__ import annotations

import gc
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorize.capture.matmul import Frame, Matmul
from tensorize.capture.observer import Observer
from tensorize.capture.uses import patches

B, T, M, N, E = 4, 3, 6, 5, 3


def draw(shape: Sequence[int], seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def parameter(*shape: int, dtype: torch.dtype = torch.float64) -> nn.Parameter:
    return nn.Parameter(draw(shape, 7, dtype))


@dataclass
class Seen:
    """What an observer told of one weight."""

    matmuls: list[tuple[Frame, Matmul, Tensor]]
    others: list[str]


def observe(run: Callable[[], Any], *weights: nn.Parameter, frozen: bool = False) -> Seen:
    seen = Seen([], [])

    def on_matmul(name: str, frame: Frame, matmul: Matmul, output: Tensor) -> Tensor:
        seen.matmuls.append((frame, matmul, output))
        return output

    named = [(f"w{k}", weight) for k, weight in enumerate(weights)]
    with Observer(named, on_matmul, lambda name, other: seen.others.append(other), frozen=frozen):
        run()
    return seen


def the_matmul(run: Callable[[], Any], weight: nn.Parameter) -> tuple[Frame, Matmul, Tensor]:
    seen = observe(run, weight)
    assert seen.others == []
    assert len(seen.matmuls) == 1
    return seen.matmuls[0]


def product(frame: Frame, matmul: Matmul, weight: Tensor, absolute: bool = False) -> Tensor:
    """x · W as ``Matmul`` promises it: the output's index last, W the parameter's own matrix."""
    x = matmul.x.detach()
    if frame.expert is not None:
        weight = weight[frame.expert]
    if frame.rows is not None:
        weight = weight[slice(*frame.rows)]
    if matmul.convolution is not None:
        rows = patches(matmul, tuple(weight.shape[2:]))
        assert rows is not None
        groups = matmul.convolution.groups
        # Of every place, one row for each group of channels, against its group's outputs.
        x = rows.reshape(-1, groups, 1, rows.shape[-1])
        weight = weight.reshape(groups, weight.shape[0] // groups, -1)
    elif matmul.split:
        weight = weight.reshape(math.prod(weight.shape[: matmul.split]), -1)
    if absolute:
        x, weight = (x if matmul.contract == "lookup" else x.abs()), weight.abs()
    if matmul.contract == "lookup":
        return weight[x]
    if matmul.offsets is not None:
        ends = [0, *matmul.offsets.tolist()]
        matrices = weight.mT if matmul.contract == "columns" else weight
        parts = [x[a:b] @ m for a, b, m in zip(ends[:-1], ends[1:], matrices, strict=True)]
        return torch.cat(parts)
    return x @ (weight.mT if matmul.contract == "columns" else weight)


def check(frame: Frame, matmul: Matmul, output: Tensor, weight: Tensor) -> None:
    """from_rows(x · W) + bias is the output, to the rounding of sums of that length."""
    weight = weight.detach()
    rows, scale = (product(frame, matmul, weight, absolute) for absolute in (False, True))
    if matmul.convolution is not None:  # patches are flat: (batch, places) come back first
        lead = (output.shape[0], *output.shape[2:])
        rows, scale = rows.reshape(*lead, -1), scale.reshape(*lead, -1)
    expected, scale = matmul.from_rows(rows), matmul.from_rows(scale)
    if matmul.bias is not None:
        bias = matmul.bias.detach()
        if matmul.convolution is not None:
            bias = bias.reshape(-1, *[1] * (output.dim() - 2))
        expected, scale = expected + bias, scale + bias.abs()
    assert output.shape == expected.shape
    terms = 2 * math.prod(weight.shape[1:]) + 1
    assert ((output - expected).abs() <= terms * torch.finfo(output.dtype).eps * scale).all()
    assert torch.equal(matmul.to_rows(matmul.from_rows(rows)), rows)
    assert matmul.to_rows(output).shape == rows.shape


# ------------------------------------------------------------------------------------ the table


@dataclass(frozen=True)
class Call:
    """One way to use a weight: its shape, the call, and what it must be read as."""

    kind: str
    contract: str
    weight: tuple[int, ...]
    run: Callable[[Any], Tensor]
    split: int = 0
    groups: int = 1


def einsum(equation: str, x: tuple[int, ...], *, weight_first: bool = False) -> Callable:
    def run(weight: Tensor) -> Tensor:
        operands = (weight, draw(x)) if weight_first else (draw(x), weight)
        return torch.einsum(equation, *operands)

    return run


IDS = torch.tensor([[0, 3, 5], [1, 1, 4]])

CALLS = {
    "linear": Call("linear", "columns", (M, N), lambda w: F.linear(draw((B, N)), w)),
    "linear, bias": Call(
        "linear", "columns", (M, N), lambda w: F.linear(draw((B, T, N)), w, draw((M,)))
    ),
    "linear, keywords": Call(
        "linear",
        "columns",
        (M, N),
        lambda w: F.linear(input=draw((B, N)), weight=w, bias=draw((M,))),
    ),
    "linear, one row": Call("linear", "columns", (M, N), lambda w: F.linear(draw((N,)), w)),
    "linear, no rows": Call("linear", "columns", (M, N), lambda w: F.linear(draw((0, N)), w)),
    "addmm": Call("addmm", "rows", (M, N), lambda w: torch.addmm(draw((N,)), draw((B, M)), w)),
    "addmm, full bias": Call(
        "addmm", "rows", (M, N), lambda w: torch.addmm(draw((B, N)), draw((B, M)), w, alpha=1.0)
    ),
    "addmm, method": Call(
        "addmm", "rows", (M, N), lambda w: draw((B, N)).addmm(draw((B, M)), mat2=w)
    ),
    "mm, right": Call("matmul", "rows", (M, N), lambda w: torch.mm(draw((B, M)), w)),
    "mm, left": Call("matmul", "columns", (M, N), lambda w: torch.mm(w, draw((N, B)))),
    "mm, method": Call("matmul", "rows", (M, N), lambda w: draw((B, M)).mm(w)),
    "mm, method of the weight": Call("matmul", "columns", (M, N), lambda w: w.mm(draw((N, B)))),
    "matmul, right": Call("matmul", "rows", (M, N), lambda w: torch.matmul(draw((B, T, M)), w)),
    "matmul, right, one row": Call("matmul", "rows", (M, N), lambda w: torch.matmul(draw((M,)), w)),
    "matmul, left": Call("matmul", "columns", (M, N), lambda w: torch.matmul(w, draw((B, N, T)))),
    "matmul, left, one column": Call("matmul", "columns", (M, N), lambda w: w.matmul(draw((N,)))),
    "@, right": Call("matmul", "rows", (M, N), lambda w: draw((B, T, M)) @ w),
    "@, left": Call("matmul", "columns", (M, N), lambda w: w @ draw((2, B, N, T))),
    "@, a stack, right": Call("matmul", "rows", (E, M, N), lambda w: draw((E, B, M)) @ w),
    "@, a stack, left": Call("matmul", "columns", (E, M, N), lambda w: w @ draw((E, N, B))),
    "@, a stack under another axis": Call(
        "matmul", "rows", (E, M, N), lambda w: draw((2, E, B, M)) @ w
    ),
    "@, a stack, one axis for all": Call(
        "matmul", "rows", (E, M, N), lambda w: draw((2, 1, B, M)) @ w
    ),
    "bmm, right": Call("matmul", "rows", (E, M, N), lambda w: torch.bmm(draw((E, B, M)), w)),
    "bmm, left": Call("matmul", "columns", (E, M, N), lambda w: w.bmm(draw((E, N, B)))),
    "einsum of a linear": Call("einsum", "columns", (M, N), einsum("btn,mn->btm", (B, T, N))),
    "einsum, rows": Call("einsum", "rows", (M, N), einsum("btm,mn->btn", (B, T, M))),
    "einsum, weight first": Call(
        "einsum", "columns", (M, N), einsum("mn,bnt->btm", (B, N, T), weight_first=True)
    ),
    "einsum, permuted output": Call("einsum", "rows", (M, N), einsum("bmt,mn->nbt", (B, M, T))),
    "einsum, output in front": Call(
        "einsum", "columns", (M, N), einsum("on, n x y -> o x y", (N, 3, 4), weight_first=True)
    ),
    "einsum, several axes out": Call(
        "einsum", "rows", (N, 2, 3), einsum("btd,dhk->bhtk", (B, T, N)), split=1
    ),
    "einsum, several axes in": Call(
        "einsum", "rows", (2, 3, N), einsum("bthk,hkd->btd", (B, T, 2, 3)), split=2
    ),
    "einsum, several axes out, in front": Call(
        "einsum", "columns", (2, 3, N), einsum("hkd,btd->bkth", (B, T, N), weight_first=True), 2
    ),
    "einsum, several axes in, at the end": Call(
        "einsum", "columns", (N, 2, 3), einsum("bkth,dhk->btd", (B, 3, T, 2)), split=1
    ),
    "einsum, a stack for one x": Call(
        "einsum", "columns", (E, M, N), einsum("bn,emn->bem", (B, N)), split=2
    ),
    "einsum, a stack": Call("einsum", "rows", (E, M, N), einsum("ebm,emn->ebn", (E, B, M))),
    "einsum, a stack turned": Call(
        "einsum", "columns", (E, M, N), einsum("emn,ben->bme", (B, E, N), weight_first=True)
    ),
    "einsum, a stack for the same rows": Call(
        "einsum", "rows", (E, M, N), einsum("btm,emn->betn", (B, T, M))
    ),
    "einsum, a stack under other axes": Call(
        "einsum", "rows", (E, M, N), einsum("btem,emn->bten", (B, T, E, M))
    ),
    "einsum, dots": Call("einsum", "columns", (M, N), einsum("...n,mn->...m", (B, T, N))),
    "einsum, no dots under the dots": Call(
        "einsum", "columns", (M, N), einsum("...n,mn->m...", (N,))
    ),
    "einsum, dots in both": Call(
        "einsum", "rows", (E, M, N), einsum("...bm,...mn->n...b", (E, B, M))
    ),
    "einsum, no arrow": Call("einsum", "columns", (M, N), einsum("zn,mn", (B, N))),
    "einsum, dots and no arrow": Call("einsum", "columns", (M, N), einsum("n...,an", (N, B, T))),
    "einsum, three operands": Call(
        "einsum",
        "columns",
        (M, N),
        lambda w: torch.einsum("bt,mn,btn->bmt", draw((B, T)), w, draw((B, T, N))),
    ),
    "einsum, one row": Call("einsum", "columns", (M, N), einsum("n,mn->m", (N,))),
    "einsum, a list": Call(
        "einsum", "columns", (M, N), lambda w: torch.einsum("bn,mn->bm", [draw((B, N)), w])
    ),
    "einsum, numbers": Call(
        "einsum",
        "columns",
        (M, N),
        lambda w: torch.einsum(draw((B, N)), [0, 1], w, [2, 1], [0, 2]),
    ),
    "embedding": Call("embedding", "lookup", (M, N), lambda w: F.embedding(IDS, w)),
    "embedding, padding": Call(
        "embedding", "lookup", (M, N), lambda w: F.embedding(IDS, w, padding_idx=1)
    ),
    "embedding, one": Call(
        "embedding", "lookup", (M, N), lambda w: F.embedding(torch.tensor(2), weight=w)
    ),
    "conv1d": Call("conv1d", "columns", (M, 2, 3), lambda w: F.conv1d(draw((B, 2, 11)), w), 1),
    "conv1d, all options": Call(
        "conv1d",
        "columns",
        (M, 2, 3),
        lambda w: F.conv1d(draw((B, 2, 11)), w, draw((M,)), stride=2, padding=3, dilation=2),
        split=1,
    ),
    "conv1d, tuples": Call(
        "conv1d",
        "columns",
        (M, 2, 3),
        lambda w: F.conv1d(draw((B, 2, 11)), w, None, (2,), (1,), (1,)),
        split=1,
    ),
    "conv1d, groups": Call(
        "conv1d",
        "columns",
        (M, 2, 3),
        lambda w: F.conv1d(draw((B, 6, 11)), w, draw((M,)), 2, 1, groups=3),
        split=1,
        groups=3,
    ),
    "conv2d, groups": Call(
        "conv2d",
        "columns",
        (M, 2, 3, 2),
        lambda w: F.conv2d(draw((B, 4, 7, 8)), w, draw((M,)), padding=1, groups=2),
        split=1,
        groups=2,
    ),
    "conv2d": Call("conv2d", "columns", (M, 2, 3, 2), lambda w: F.conv2d(draw((B, 2, 7, 8)), w), 1),
    "conv2d, bias": Call(
        "conv2d",
        "columns",
        (M, 2, 3, 2),
        lambda w: F.conv2d(draw((B, 2, 7, 8)), w, bias=draw((M,)), padding=2),
        split=1,
    ),
    "conv2d, all options": Call(
        "conv2d",
        "columns",
        (M, 2, 3, 2),
        lambda w: F.conv2d(draw((B, 2, 9, 8)), w, draw((M,)), (2, 1), (1, 2), (1, 3)),
        split=1,
    ),
    "conv2d, patches of a picture": Call(
        "conv2d", "columns", (M, 3, 4, 4), lambda w: F.conv2d(draw((B, 3, 8, 8)), w, stride=4), 1
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_is_read_as_the_matmul_that_it_is(name: str) -> None:
    call = CALLS[name]
    weight = parameter(*call.weight)
    frame, matmul, output = the_matmul(lambda: call.run(weight), weight)
    assert (matmul.kind, matmul.contract, frame) == (call.kind, call.contract, Frame())
    assert matmul.split == call.split
    check(frame, matmul, output, weight)


def test_a_transposed_convolution_is_a_matmul_of_its_pixels() -> None:
    """Each pixel times W is a patch of the output; patches that overlap are added up."""
    weight = parameter(N, M, 3, 2)
    x, size = draw((B, N, 5, 4)), (5 * 2 + 1, 4 * 2)
    frame, matmul, output = the_matmul(
        lambda: F.conv_transpose2d(x, weight, draw((M,)), stride=2), weight
    )
    assert (matmul.kind, matmul.contract, frame) == ("conv_transpose2d", "rows", Frame())
    rows = patches(matmul, (3, 2))
    assert rows is not None
    columns = (rows @ weight.detach().reshape(N, -1)).reshape(B, 20, -1).transpose(1, 2)
    expected = F.fold(columns, size, (3, 2), stride=2) + draw((M,))[:, None, None]
    torch.testing.assert_close(output.detach(), expected)


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_a_bag_is_a_lookup_of_several_rows(mode: str) -> None:
    weight, ends = parameter(M, N), torch.tensor([0, 4])
    frame, matmul, output = the_matmul(
        lambda: F.embedding_bag(IDS.flatten(), weight, ends, mode=mode, padding_idx=1), weight
    )
    assert (matmul.kind, matmul.contract, frame) == ("embedding_bag", "lookup", Frame())
    assert matmul.bag is not None
    assert torch.equal(F.embedding_bag(matmul.x, weight, **matmul.bag), output)


@pytest.mark.parametrize("separate", [False, True], ids=["packed", "separate"])
def test_attention_is_looked_into(separate: bool) -> None:
    widths = {"kdim": 6, "vdim": 10} if separate else {}
    model = nn.MultiheadAttention(8, 2, batch_first=True, **widths).double()
    x, k, v = draw((2, T, 8)), draw((2, T, 6)), draw((2, T, 10))
    given = (x, k, v) if separate else (x, x, x)
    expected, told, others = model(*given)[0], [], []

    def on_matmul(name: str, frame: Frame, matmul: Matmul, output: Tensor) -> Tensor:
        told.append(name)
        check(frame, matmul, output, dict(model.named_parameters())[name])
        return output

    with Observer(model.named_parameters(), on_matmul, lambda name, _: others.append(name)):
        got = model(*given)[0]
    torch.testing.assert_close(got, expected)
    if separate:
        inside = ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
    else:
        inside = ["in_proj_weight"]
    assert list(dict.fromkeys(told)) == [*inside, "out_proj.weight"]
    assert [name for name in others if "weight" in name] == []


def test_grouped_mm_is_read_as_one_matmul_an_expert() -> None:
    weight = parameter(E, 8, 16, dtype=torch.float32)
    x, ends = draw((10, 8), dtype=torch.float32), torch.tensor([4, 4, 10], dtype=torch.int32)
    for run in (
        lambda: F.grouped_mm(x, weight, offs=ends),
        lambda: torch._grouped_mm(x, weight, ends),
    ):
        frame, matmul, output = the_matmul(run, weight)
        assert (matmul.kind, matmul.contract, frame) == ("grouped_mm", "rows", Frame())
        check(frame, matmul, output, weight)


def test_grouped_mm_against_transposed_experts() -> None:
    weight = parameter(E, 16, 8, dtype=torch.float32)
    x, ends = draw((10, 8), dtype=torch.float32), torch.tensor([4, 4, 10], dtype=torch.int32)
    frame, matmul, output = the_matmul(
        lambda: F.grouped_mm(x, weight.transpose(-2, -1), offs=ends), weight
    )
    assert (matmul.contract, frame) == ("columns", Frame(transposed=True))
    check(frame, matmul, output, weight)


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("kernel", [(3, 3), (2, 3)])
def test_patches_of_a_padding_in_words(padding: str, kernel: tuple[int, int]) -> None:
    weight = parameter(M, 2, *kernel)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch copies to pad unevenly
        frame, matmul, output = the_matmul(
            lambda: F.conv2d(draw((B, 2, 7, 7)), weight, padding=padding, dilation=2), weight
        )
    check(frame, matmul, output, weight)


def test_patches_in_three_dimensions_are_not_told() -> None:
    weight = parameter(M, 2, 3, 3, 3)
    _, matmul, _ = the_matmul(lambda: F.conv3d(draw((1, 2, 5, 5, 5)), weight), weight)
    assert (matmul.kind, patches(matmul, (3, 3, 3))) == ("conv3d", None)


# ----------------------------------------------------------------------------------------- views

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


ROWS: dict[str, tuple[Callable[[Any], Any], tuple[int, int]]] = {
    "[a:b]": (lambda w: w[2:5], (2, 5)),
    "[a:]": (lambda w: w[4:], (4, 6)),
    "[:-a]": (lambda w: w[:-1], (0, 5)),
    "[a:b, :]": (lambda w: w[1:3, :], (1, 3)),
    "twice": (lambda w: w[1:][1:3], (2, 4)),
    "narrow": (lambda w: w.narrow(0, 1, 3), (1, 4)),
    "torch.narrow": (lambda w: torch.narrow(w, 0, 0, 2), (0, 2)),
    "narrow from the end": (lambda w: w.narrow(0, -3, 2), (3, 5)),
    "chunk": (lambda w: w.chunk(3)[1], (2, 4)),
    "uneven chunks": (lambda w: torch.chunk(w, 4, dim=0)[2], (4, 6)),
    "split": (lambda w: w.split(4)[1], (4, 6)),
    "split by lengths": (lambda w: torch.split(w, [1, 3, 2])[1], (1, 4)),
    "split, keywords": (lambda w: w.split(dim=0, split_size=2)[1], (2, 4)),
    "detached": (lambda w: w.detach()[2:5].contiguous(), (2, 5)),
}


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


# ---------------------------------------------------------------------- what is no matmul


SQUARE = (4, 4)

NO_MATMULS: dict[str, tuple[tuple[int, ...], Callable[[Any], Any]]] = {
    "linear, the weight twice": (SQUARE, lambda w: F.linear(w, w)),
    "linear, the weight as input": (SQUARE, lambda w: F.linear(w, draw((3, 4)))),
    "linear, the weight as bias": ((1, 4), lambda w: F.linear(draw((B, 4)), draw((4, 4)), w)),
    "mm, the weight twice": (SQUARE, lambda w: torch.mm(w, w)),
    "@, the weight and its transpose": ((M, N), lambda w: w @ w.t()),
    "einsum, the weight twice": (SQUARE, lambda w: torch.einsum("ij,jk->ik", w, w)),
    "mm, out=": (
        (M, N),
        lambda w: torch.mm(draw((B, M)), w.detach(), out=torch.empty(B, N).double()),
    ),
    "addmm, alpha": (
        (M, N),
        lambda w: torch.addmm(draw((N,)), draw((B, M)), w, alpha=0.5),
    ),
    "addmm, beta": ((M, N), lambda w: torch.addmm(draw((N,)), draw((B, M)), w, beta=0)),
    "addmm, the weight on the left": (
        (M, N),
        lambda w: torch.addmm(draw((B,)), w, draw((N, B))),
    ),
    "addmm, the weight as bias": (
        (B, N),
        lambda w: torch.addmm(w, draw((B, M)), draw((M, N))),
    ),
    "embedding, max_norm": ((M, N), lambda w: F.embedding(IDS, w.detach(), max_norm=1.0)),
    "embedding, sparse": ((M, N), lambda w: F.embedding(IDS, w, sparse=True)),
    "embedding, by frequency": (
        (M, N),
        lambda w: F.embedding(IDS, w, scale_grad_by_freq=True),
    ),
    "embedding in the columns": ((N, M), lambda w: F.embedding(IDS, w.t())),
    "einsum, a diagonal": (SQUARE, lambda w: torch.einsum("bi,ii->bi", draw((B, 4)), w)),
    "einsum, a repeated axis of x": (
        (M, N),
        lambda w: torch.einsum("bbn,mn->bm", draw((B, B, N)), w),
    ),
    "einsum, nothing summed": ((M, N), lambda w: torch.einsum("bn,mn->bmn", draw((B, N)), w)),
    "einsum, an axis of x summed away": (
        (M, N),
        lambda w: torch.einsum("bcn,mn->bm", draw((B, 2, N)), w),
    ),
    "einsum, both axes summed": ((M, N), lambda w: torch.einsum("mn,mn->", draw((M, N)), w)),
    "einsum, a batch of rows": ((B, N), lambda w: torch.einsum("bn,bn->b", draw((B, N)), w)),
    "einsum, three operands": (
        (M, N),
        lambda w: torch.einsum("bn,mn,m->bm", draw((B, N)), w, draw((M,))),
    ),
    "einsum, one operand of two rows": ((2, N), lambda w: torch.einsum("mn->nm", w)),
    "einsum, one operand": ((M, N), lambda w: torch.einsum("mn->nm", w)),
    "einsum, a row for each matrix": (
        (E, M, N),
        lambda w: torch.einsum("em,emn->en", draw((E, M)), w),
    ),
    "einsum, dots that stretch a stack of one": (
        (1, M, N),
        lambda w: torch.einsum("...bm,...mn->...bn", draw((E, B, M)), w),
    ),
    "einsum, one column for all": (
        (M, N),
        lambda w: torch.einsum("bn,mn->bm", draw((B, 1)), w),
    ),
    "a bare vector": ((N,), lambda w: draw((B, N)) @ w),
    "two bare vectors": ((N,), lambda w: draw((N,)) @ w),
    "a linear of one output without an axis": ((N,), lambda w: F.linear(draw((B, N)), w)),
    "convolution without a batch": ((4, 2, 3), lambda w: F.conv1d(draw((2, 9)), w)),
    "convolution, the weight as input": (
        (4, 2, 3),
        lambda w: F.conv1d(w, draw((5, 2, 1))),
    ),
    "convolution by a turned kernel": (
        (4, 2, 3, 3),
        lambda w: F.conv2d(draw((B, 2, 9, 9)), w.transpose(2, 3)),
    ),
    "convolution by a weight turned": (
        (2, 4, 3),
        lambda w: F.conv1d(draw((B, 2, 9)), w.transpose(0, 1)),
    ),
    "convolution by channels and places turned": (
        (4, 3, 2),
        lambda w: F.conv1d(draw((B, 2, 9)), w.transpose(1, 2)),
    ),
    "arithmetic": ((M, N), lambda w: 2 * w),
    "arithmetic first": ((M, N), lambda w: F.linear(draw((B, N)), w * 0.5)),
    "another shape": ((M, N), lambda w: F.linear(draw((B, M)), w.reshape(N, M))),
    "another shape by view_as": ((M, N), lambda w: F.linear(draw((B, M)), w.view_as(draw((N, M))))),
    "another dtype": ((M, N), lambda w: F.linear(draw((B, N)).float(), w.float())),
    "another dtype by to": ((M, N), lambda w: w.to(torch.float32)),
    "several experts": ((E, M, N), lambda w: draw((2, B, M)) @ w[1:]),
    "experts by a mask": ((E, M, N), lambda w: w[torch.tensor(True)]),
    "experts turned with the stack": (
        (E, M, N),
        lambda w: F.linear(draw((B, N)), w.transpose(0, 1)[1]),
    ),
    "a row": ((M, N), lambda w: w[1]),
    "every second row": ((M, N), lambda w: F.linear(draw((B, N)), w[::2])),
    "some columns": ((M, N), lambda w: F.linear(draw((B, 2)), w[:, 1:3])),
    "chunks of columns": ((M, 4), lambda w: F.linear(draw((B, 2)), w.chunk(2, dim=1)[0])),
    "rows of a transposed weight": ((N, M), lambda w: F.linear(draw((B, N)), w.t()[1:3])),
    "an embedding in some rows": ((9, N), lambda w: F.embedding(IDS, w[2:])),
    "one x for a stack": ((E, M, N), lambda w: draw((B, M)) @ w),
    "a stack for one column": ((E, M, N), lambda w: w @ draw((N,))),
    "einsum, summed axes apart": (
        (2, N, 3),
        lambda w: torch.einsum("bhk,hdk->bd", draw((B, 2, 3)), w),
    ),
    "einsum, summed axes in another order of a turned weight": (
        (N, M),
        lambda w: torch.einsum("bhk,hkd->bd", draw((B, 2, 3)), w.t().reshape(2, 3, N)),
    ),
    "transposed convolution, groups": (
        (4, 3, 3),
        lambda w: F.conv_transpose1d(draw((B, 4, 9)), w, groups=2),
    ),
    "bag of maxima": ((M, N), lambda w: F.embedding_bag(IDS, w, mode="max")),
    "bag, max_norm": ((M, N), lambda w: F.embedding_bag(IDS, w.detach(), max_norm=1.0)),
}


@pytest.mark.parametrize("name", NO_MATMULS)
def test_what_is_no_matmul_is_told_as_another_use(name: str) -> None:
    shape, run = NO_MATMULS[name]
    weight = parameter(*shape)
    expected, seen = run(weight), observe(lambda: run(weight), weight)
    assert seen.matmuls == []
    assert seen.others
    assert isinstance(expected, Tensor)


def test_grouped_mm_of_two_matrices_is_no_matmul_against_a_stack() -> None:
    weight = parameter(16, 16, dtype=torch.float32)
    ends = torch.tensor([8, 16], dtype=torch.int32)
    seen = observe(
        lambda: F.grouped_mm(draw((16, 16), dtype=torch.float32), weight, offs=ends), weight
    )
    assert seen.matmuls == []
    assert len(seen.others) == 1


def test_asking_for_shape_dtype_and_device_is_no_use() -> None:
    weight = parameter(M, N)

    def ask() -> None:
        _ = weight.shape, weight.dtype, weight.device, weight.ndim, weight.is_contiguous()
        _ = weight.size(0), weight.dim(), len(weight), weight.requires_grad, weight.numel()

    assert observe(ask, weight) == Seen([], [])


# -------------------------------------------------------------------------------- the observer


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
