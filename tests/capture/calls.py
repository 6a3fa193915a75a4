"""Calls of torch against a weight: those that are matmuls, and those that are not.

Shapes: B and T rows, M rows and N columns of the weight W, E experts, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

B, T, M, N, E = 4, 3, 6, 5, 3


def draw(shape: Sequence[int], seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def parameter(*shape: int, dtype: torch.dtype = torch.float64) -> nn.Parameter:
    return nn.Parameter(draw(shape, 7, dtype))


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
    "einsum, others that share no axis of the weight": Call(
        "einsum",
        "rows",
        (2, 3, N),
        lambda w: torch.einsum("uvn,zu,zv->zn", w, draw((B, 2)), draw((B, 3))),
        split=2,
    ),
    "einsum, others with an axis of their own": Call(
        "einsum",
        "rows",
        (2, 3, N),
        lambda w: torch.einsum("uvn,zui,zvi->zn", w, draw((B, 2, 3)), draw((B, 3, 3))),
        split=2,
    ),
    "tensordot": Call("einsum", "rows", (M, N), lambda w: torch.tensordot(draw((B, M)), w, dims=1)),
    "tensordot, the weight first": Call(
        "einsum", "columns", (M, N), lambda w: torch.tensordot(w, draw((B, N, T)), ([1], [1]))
    ),
    "tensordot, several axes": Call(
        "einsum",
        "rows",
        (2, 3, N),
        lambda w: torch.tensordot(draw((B, 3, 2)), w, dims=((2, 1), (0, 1))),
        split=2,
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
    "arithmetic": ((M, N), lambda w: 2 + w),
    "a multiple by a tensor": ((M, N), lambda w: F.linear(draw((B, N)), w * draw((1,)))),
    "a multiple looked up": ((9, N), lambda w: F.embedding(IDS, 2 * w)),
    "nothing of it": ((M, N), lambda w: F.linear(draw((B, N)), 0 * w)),
    "a number over it": ((M, N), lambda w: F.linear(draw((B, N)), 2 / w)),
    "tensordot, axes apart": (
        (2, N, 3),
        lambda w: torch.tensordot(draw((B, 2, 3)), w, ((1, 2), (0, 2))),
    ),
    "einsum, others that are large together": (
        (2, 3, N),
        lambda w: torch.einsum("uvn,zu,yv->zyn", w, draw((40, 2)), draw((40, 3))),
    ),
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
