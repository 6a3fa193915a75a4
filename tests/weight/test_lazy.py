"""Calls against a lazy weight: the same answers, and no dense matrix.

Shapes: B and T rows, M rows and N columns of the weight W, E experts, C channels.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorize.algebra.reconstruct import reconstruct
from tensorize.ir.spec import TTSpec
from tests.capture.calls import CALLS, IDS, NO_MATMULS, ROWS
from tests.weight.factored_models import B, E, M, N, close, draw, draw_cores, lazy, no_dense


def specs_for(shape: tuple[int, ...], split: int = 0, groups: int = 1) -> list[TTSpec]:
    """Low rank, and for a plain (M, N) also trains of two and three cores, and blocks."""
    if split:
        m, n = math.prod(shape[:split]), math.prod(shape[split:])
        return [TTSpec.low_rank(m // groups, n, 2, experts=groups if groups > 1 else 0)]
    low = TTSpec.low_rank(*shape[-2:], 2, experts=shape[0] if len(shape) == 3 else 0)
    if shape != (M, N):
        return [low]
    trains = [TTSpec((2, 3), (5, 1), (4,)), TTSpec((2, 1, 3), (1, 5, 1), (2, 3))]
    return [low, *trains, TTSpec.block((2, 3), (1, 5), 2), TTSpec.block((3, 2), (5, 1), 1)]


def same_gradients(got: Tensor, want: Tensor, cores: Sequence[Tensor]) -> None:
    """Value and gradients of the two ways to compute from the same cores."""
    close(got, want)
    for a, b in zip(
        torch.autograd.grad(got.square().sum(), cores, allow_unused=True),
        torch.autograd.grad(want.square().sum(), cores, allow_unused=True),
        strict=True,
    ):
        assert a is not None
        assert b is not None
        close(a, b, 512)


# ----------------------------------------------------------------------------- the table of uses.py


@pytest.mark.parametrize("name", CALLS)
def test_every_call_of_the_table_is_a_contraction(name: str) -> None:
    call = CALLS[name]
    for spec in specs_for(call.weight, call.split, call.groups):
        cores = draw_cores(spec)
        with no_dense():
            got = call.run(lazy(spec, cores, call.weight))
        want = call.run(reconstruct(spec, cores).reshape(call.weight))
        same_gradients(got, want, cores)


def test_a_transposed_convolution_is_a_contraction() -> None:
    spec, shape = TTSpec.low_rank(N, M * 3 * 2, 2), (N, M, 3, 2)
    cores = draw_cores(spec)

    def run(w: Any) -> Tensor:
        return F.conv_transpose2d(draw((B, N, 5, 4)), w, draw((M,)), stride=2, padding=1)

    with no_dense():
        got = run(lazy(spec, cores, shape))
    same_gradients(got, run(reconstruct(spec, cores).reshape(shape)), cores)


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("padding", [None, 1])
def test_a_bag_is_a_contraction(mode: str, padding: int | None) -> None:
    spec = TTSpec.low_rank(M, N, 2)
    cores, ends = draw_cores(spec), torch.tensor([0, 4])

    def run(w: Any) -> Tensor:
        return F.embedding_bag(IDS.flatten(), w, ends, mode=mode, padding_idx=padding)

    with no_dense():
        got = run(lazy(spec, cores))
    same_gradients(got, run(reconstruct(spec, cores)), cores)


@pytest.mark.parametrize("name", ROWS)
def test_some_rows_are_a_contraction(name: str) -> None:
    look, rows = ROWS[name]
    if "detach" in name:
        return
    for spec in specs_for((M, N)):
        cores = draw_cores(spec)
        for run in (
            lambda w: F.linear(draw((B, N)), w),
            lambda w: draw((B, rows[1] - rows[0])) @ w,
            lambda w: draw((B, N)) @ w.t(),
        ):
            # Rows of a train are no train: they are built.
            with no_dense() if spec.format == "low_rank" else contextlib.nullcontext():
                got = run(look(lazy(spec, cores)))
            same_gradients(got, run(look(reconstruct(spec, cores))), cores)


LOOKS: dict[str, Callable[[Any], Any]] = {
    "t()": lambda w: w.t(),
    "torch.t": torch.t,
    "T": lambda w: w.T,
    "mT": lambda w: w.mT,
    "transpose": lambda w: w.transpose(0, 1),
    "transpose, keywords": lambda w: torch.transpose(w, dim0=-1, dim1=-2),
    "twice": lambda w: w.t().t().t(),
    "contiguous": lambda w: w.t().contiguous(),
    "to": lambda w: w.to(torch.float64).t(),
}


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_a_transposed_weight_is_a_contraction(look: Callable[[Any], Any]) -> None:
    for spec in specs_for((M, N)):
        cores = draw_cores(spec)
        for run in (lambda w: F.linear(draw((B, M)), w), lambda w: draw((B, N)) @ w):
            with no_dense():
                seen = look(lazy(spec, cores))
                assert seen.shape == (N, M)
                got = run(seen)
            same_gradients(got, run(look(reconstruct(spec, cores))), cores)


@pytest.mark.parametrize(
    "look",
    [
        lambda w: w[1],
        lambda w: w[-1],
        lambda w: w[torch.tensor(2)],
        lambda w: w[1].t().t(),
        lambda w: w.transpose(1, 2)[0].t(),
    ],
)
def test_one_expert_is_a_contraction(look: Callable[[Any], Any]) -> None:
    spec = TTSpec.low_rank(M, N, 2, experts=E)
    cores = draw_cores(spec)
    with no_dense():
        got = F.linear(draw((B, N)), look(lazy(spec, cores)))
    same_gradients(got, F.linear(draw((B, N)), look(reconstruct(spec, cores))), cores)


@pytest.mark.parametrize("rank", [1, 4, 5])
@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_experts_are_contractions(rank: int, transposed: bool) -> None:
    spec = TTSpec.low_rank(8, 16, rank, experts=E)
    cores = draw_cores(spec, torch.float32)
    ends = torch.tensor([4, 4, 10], dtype=torch.int32)
    x = draw((10, 16 if transposed else 8), dtype=torch.float32)

    def run(w: Any) -> Tensor:
        w = w.transpose(1, 2) if transposed else w
        return F.grouped_mm(x, w, offs=ends)

    with no_dense():
        got = run(lazy(spec, cores))
    same_gradients(got, run(reconstruct(spec, cores)), cores)


@pytest.mark.parametrize("name", NO_MATMULS)
def test_any_other_function_gets_the_dense_matrix(name: str) -> None:
    shape, run = NO_MATMULS[name]
    if len(shape) < 2:
        return
    stack = shape[0] if len(shape) == 3 and "onvolution" not in name else 0
    if stack:
        spec = TTSpec.low_rank(*shape[1:], 2, experts=stack)
    else:
        spec = TTSpec.low_rank(shape[0], math.prod(shape[1:]), 2)
    cores = draw_cores(spec)
    got = run(lazy(spec, cores, shape))
    want = run(reconstruct(spec, cores).reshape(shape))
    assert isinstance(got, Tensor)
    if want.requires_grad and "sparse" not in name:
        same_gradients(got, want, cores)
    else:
        close(got, want)


ARITHMETIC: dict[str, Callable[[Any], Any]] = {
    "times a number": lambda w: w * 2.0,
    "a number times": lambda w: 2.0 * w,
    "times a tensor": lambda w: w * draw((M, N)),
    "a tensor times": lambda w: draw((M, N)) * w,
    "plus": lambda w: w + draw((M, N)),
    "minus": lambda w: 1.0 - w,
    "with itself": lambda w: w + w,
    "over": lambda w: w / 3.0,
    "negative": lambda w: -w,
    "power": lambda w: w**2,
    "norm": lambda w: w.norm(dim=1),
    "torch.norm": lambda w: torch.linalg.vector_norm(w),
    "a slice": lambda w: w[1:, ::2],
    "a row": lambda w: w[torch.tensor([1, 4])],
    "flatten": lambda w: w.flatten(),
    "chunk": lambda w: torch.cat(w.chunk(2)),
    "abs": lambda w: torch.abs(w).sum(),
    "clone": lambda w: w.clone(),
}


@pytest.mark.parametrize("run", ARITHMETIC.values(), ids=ARITHMETIC)
def test_arithmetic_is_done_on_the_dense_matrix(run: Callable[[Any], Any]) -> None:
    for spec in specs_for((M, N)):
        cores = draw_cores(spec)
        same_gradients(run(lazy(spec, cores)), run(reconstruct(spec, cores)), cores)


COMPARISONS: dict[str, Callable[[Any], Any]] = {
    "less": lambda w: w < 0,
    "at least": lambda w: (w >= 0.5).sum(),
    "equal": lambda w: w == 0,
    "to itself": lambda w: (w == w).all(),
    "torch.equal": lambda w: torch.tensor(torch.equal(w, w)),
    "finite": lambda w: torch.isfinite(w),
}


@pytest.mark.parametrize("run", COMPARISONS.values(), ids=COMPARISONS)
def test_comparisons_are_those_of_the_dense_matrix(run: Callable[[Any], Any]) -> None:
    spec = TTSpec.low_rank(M, N, 2)
    cores = draw_cores(spec)
    assert torch.equal(run(lazy(spec, cores)), run(reconstruct(spec, cores)))
    assert {lazy(spec, cores): 1}  # a key, as a tensor is


WRITES: dict[str, Callable[[Any], Any]] = {
    "add_": lambda w: w.add_(1),
    "copy_": lambda w: w.copy_(torch.zeros(M, N)),
    "zero_": lambda w: w.zero_(),
    "init": lambda w: nn.init.normal_(w),
    "init of a table": lambda w: nn.init.kaiming_uniform_(w, a=1),
    "out=": lambda w: torch.add(torch.zeros(M, N), 1, out=w),
    "an entry": lambda w: w.__setitem__(0, 1.0),
    "data": lambda w: setattr(w, "data", torch.zeros(M, N)),
    "into data": lambda w: w.data.copy_(torch.zeros(M, N)),
    "into a view": lambda w: w.t().mul_(2),
    "into rows": lambda w: w[1:3].fill_(0),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_nothing_is_written_to_where_it_would_be_lost(write: Callable[[Any], Any]) -> None:
    spec = TTSpec.low_rank(M, N, 2)
    cores = draw_cores(spec)
    before = [core.clone() for core in cores]
    with pytest.raises(TypeError, match=r"factorized and cannot be assigned; use tensorize\.dens"):
        write(lazy(spec, cores))
    assert all(torch.equal(a, b) for a, b in zip(cores, before, strict=True))


def test_a_lazy_weight_is_written_from() -> None:
    spec = TTSpec.low_rank(M, N, 2)
    cores = draw_cores(spec)
    want, got = reconstruct(spec, cores), torch.zeros(M, N, dtype=torch.float64)
    with torch.no_grad():
        got[:2] = lazy(spec, cores).data[:2]
        got[2:].copy_(lazy(spec, cores)[2:])
    close(got, want)


def test_a_detached_weight_takes_no_gradient() -> None:
    spec = TTSpec.low_rank(M, N, 2)
    x = draw((B, N)).requires_grad_()
    for look in (lambda w: w.detach(), torch.detach):
        assert F.linear(x, look(lazy(spec, draw_cores(spec)))).grad_fn is not None
        y = F.linear(draw((B, N)), look(lazy(spec, draw_cores(spec))))
        assert not y.requires_grad


def test_shape_dtype_and_device_cost_nothing() -> None:
    for spec, shape in ((TTSpec.low_rank(M, N, 2), (M, N)), (TTSpec((2, 3), (5, 1), (4,)), (M, N))):
        w = lazy(spec, draw_cores(spec, torch.bfloat16))
        with no_dense():
            assert w.shape == w.size() == shape
            assert (w.size(0), w.size(-1), len(w), w.numel()) == (M, N, M, M * N)
            assert w.ndim == w.dim() == 2
            assert w.t().shape == w.T.shape == w.mT.shape == (N, M)
            assert (w.dtype, w.device) == (torch.bfloat16, torch.device("cpu"))
            assert w.requires_grad
            assert w.is_floating_point()
            assert not w.is_meta
            assert repr(w).startswith("FactoredWeight((6, 5), TTSpec(")
        assert w.dense().shape == shape


# ------------------------------------------------------------------------------ padding of a lookup


@pytest.mark.parametrize("padding", [1, -5])
def test_the_padding_row_takes_no_gradient(padding: int) -> None:
    """As in a dense embedding: whatever arrives at a padding position changes no core."""
    ids = torch.tensor([[0, 1, 3], [1, 1, 5]])
    for spec in specs_for((M, N)):
        cores = draw_cores(spec)
        with no_dense():
            got = F.embedding(ids, lazy(spec, cores), padding)
        want = F.embedding(ids, reconstruct(spec, cores), padding)
        same_gradients(got, want, cores)


@pytest.mark.parametrize("wrong", [M, M + 7, -1, 2 * M])
def test_a_row_number_out_of_range_is_an_error_as_in_a_dense_table(wrong: int) -> None:
    for spec in specs_for((M, N)):
        with pytest.raises(IndexError):
            F.embedding(torch.tensor([0, wrong]), lazy(spec, draw_cores(spec)))


def test_a_lookup_of_nothing_is_empty() -> None:
    for spec in specs_for((M, N)):
        got = F.embedding(torch.zeros(0, 3, dtype=torch.long), lazy(spec, draw_cores(spec)))
        assert got.shape == (0, 3, N)
