"""Half precision on a processor without instructions for it: products are done in float32."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

import tensorize
from tensorize import TTSpec
from tensorize.formats import interpret
from tensorize.weight import precision, products
from tensorize.weight.contractions import contractions
from tensorize.weight.precision import in_float32

TRAIN, LOW_RANK = TTSpec((8, 9), (10, 8), (3,)), TTSpec.low_rank(72, 80, 24)


@pytest.fixture(autouse=True)
def without_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "SLOW_ON_CPU", frozenset((torch.bfloat16,)))


def draw(spec: TTSpec, rows: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [*spec.core_shapes, (rows, spec.shape[1])]
    *cores, x = (torch.randn(s, generator=generator).to(dtype) for s in shapes)
    return cores, x


def seen_by_the_contraction(cores: Sequence[Tensor], x: Tensor) -> set[torch.dtype]:
    """The dtypes that a train's contraction is called with, through ``ops.matmul``."""
    seen: set[torch.dtype] = set()

    def contract(x: Tensor, cores: Sequence[Tensor], bias: Tensor | None = None) -> Tensor:
        seen.update(tensor.dtype for tensor in (x, *cores))
        return interpret.apply(TRAIN, cores, x, "columns").to(x.dtype)

    assert products.matmul(TRAIN, {"columns": contract}, cores, x, "columns").dtype == x.dtype
    return seen


@pytest.mark.parametrize("spec", [TRAIN, LOW_RANK], ids=repr)
def test_the_result_has_one_rounding_only(spec: TTSpec) -> None:
    cores, x = draw(spec, 4, torch.bfloat16)
    bias = torch.ones(spec.shape[0], dtype=torch.bfloat16)
    with torch.no_grad():
        y = products.matmul(spec, contractions(spec), cores, x, "columns", bias)
    want = interpret.apply(spec, cores, x, "columns") + 1
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), want, rtol=2**-8, atol=1e-4)


def test_a_train_is_contracted_in_float32() -> None:
    with torch.no_grad():
        assert seen_by_the_contraction(*draw(TRAIN, 1, torch.bfloat16)) == {torch.float32}


def test_other_dtypes_stay_what_they_are() -> None:
    with torch.no_grad():
        for dtype in (torch.float16, torch.float64):
            assert seen_by_the_contraction(*draw(TRAIN, 1, dtype)) == {dtype}


def test_recorded_gradients_keep_one_copy_only() -> None:
    assert seen_by_the_contraction(*draw(TRAIN, 1, torch.bfloat16)) == {torch.bfloat16}


def test_low_rank_is_cast_where_the_rows_pay_for_it() -> None:
    """Casting both factors costs as much for one row as for many."""
    x = torch.randn(4, 80).bfloat16()
    with torch.no_grad():
        assert in_float32(x, rank=24)
        assert not in_float32(x[:1], rank=1024)
        assert in_float32(x.expand(64, 4, 80), rank=1024)


def test_a_layer_has_one_rounding_only() -> None:
    dense = nn.Sequential(nn.Linear(80, 72))
    small = tensorize.compile(dense, None, ranks={"*": 24}).bfloat16()
    x = torch.randn(8, 80).bfloat16()
    with torch.no_grad():
        y = small(x)
        want = tensorize.densify(small).double()(x.double())
    assert y.dtype == torch.bfloat16
    # the dense weight of the oracle is rounded as well
    assert (y.double() - want).norm() < 2**-8 * want.norm()


def test_a_graph_is_not_compiled_again_for_it() -> None:
    dense = nn.Sequential(nn.Linear(80, 72))
    small = tensorize.compile(dense, None, ranks={"*": 24}).bfloat16()
    torch.compiler.reset()
    graphs = 0

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        nonlocal graphs
        graphs += 1
        return graph.forward

    compiled = torch.compile(small, backend=count, dynamic=True)
    with torch.no_grad():
        for rows in (2, 5, 64, 300):
            compiled(torch.randn(rows, 80).bfloat16())
    assert graphs == 1
