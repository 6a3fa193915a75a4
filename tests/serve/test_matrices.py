"""A weight as an engine multiplies with it is the weight, whole and in the parts of ranks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tensorize.algebra.metric import Metric
from tensorize.formats.quantized import Quantized
from tensorize.formats.registry import format_of
from tensorize.ir.coded import DenseSpec, QuantizedSpec
from tensorize.ir.spec import Spec, TTSpec
from tensorize.serve.layout import columns_of_rank, rows_of_rank
from tensorize.serve.matrices import Matrix, Weight, weight_of

M, N, R = 12, 8, 3
PLAIN = TTSpec.low_rank(M, N, R)
PIVOTED = TTSpec.low_rank(M, N, R, pivoted=True)
SPECS: dict[str, Spec] = {
    "low rank": PLAIN,
    "pivoted": PIVOTED,
    "train": TTSpec((3, 4), (4, 2), (2,)),
    "block": TTSpec.block((3, 4), (4, 2), 2),
    "int8": QuantizedSpec(DenseSpec((M, N)), "int8"),
    "int8 low rank": QuantizedSpec(PLAIN, "int8"),
    "int8 pivoted": QuantizedSpec(PIVOTED, "int8"),
    "int4 low rank": QuantizedSpec(PLAIN, "int4"),
    "int3": QuantizedSpec(DenseSpec((M, N)), "int3"),
}


def held(spec: Spec) -> list[Tensor]:
    """Random cores in the form that a checkpoint has."""
    plain = [torch.randn(shape) for shape in spec.plain.core_shapes]
    form = format_of(spec)
    if not isinstance(form, Quantized):
        return list(form.stored(spec, plain, torch.float32))
    assert isinstance(spec, QuantizedSpec)
    inner = form.numbers.stored(spec.inner, plain, torch.float32)
    return list(form.rounded(spec, inner, [Metric(1.0, None, None)], torch.float32))


def values(matrix: Matrix) -> Tensor:
    return matrix.entries if matrix.scale is None else matrix.entries * matrix.scale


def whole(weight: Weight) -> Tensor:
    last = values(weight.last)
    return last if weight.first is None else last @ values(weight.first)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("integers", [False, True])
def test_a_weight_is_what_its_cores_say(name: str, integers: bool) -> None:
    spec = SPECS[name]
    cores = held(spec)
    oracle = format_of(spec).reconstruct(spec, cores)
    found = weight_of(spec, cores, "key", torch.float32, integers=integers)
    torch.testing.assert_close(whole(found), oracle)
    turned = weight_of(spec, cores, "key", torch.float32, transposed=True, integers=integers)
    torch.testing.assert_close(whole(turned), oracle.t())


def test_integers_stay_integers_where_they_are_multiplied() -> None:
    for name, coded in (("int8", (True,)), ("int8 low rank", (True, True))):
        spec = SPECS[name]
        found = weight_of(spec, held(spec), "key", torch.float32, integers=True)
        assert tuple(m.coded for m in (found.last, found.first) if m is not None) == coded
    spec = SPECS["int8 pivoted"]
    found = weight_of(spec, held(spec), "key", torch.float32, integers=True)
    assert found.first is not None
    assert (found.last.coded, found.first.coded) == (True, False)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_have_the_weight_between_them(name: str, world: int) -> None:
    spec = SPECS[name]
    weight = weight_of(spec, held(spec), "key", torch.float32, integers=True)
    oracle, x = whole(weight), torch.randn(5, N)
    every = columns_of_rank(N, N, 0)
    rows = [rows_of_rank([M], [M // world], rank, world) for rank in range(world)]
    by_rows = torch.cat([whole(weight.on_rank(own, every)) for own in rows])
    torch.testing.assert_close(by_rows, oracle)
    columns = [columns_of_rank(N, N // world, rank) for rank in range(world)]
    partial = [x[:, c] @ whole(weight.on_rank([slice(0, M)], c)).t() for c in columns]
    torch.testing.assert_close(torch.stack(partial).sum(0), x @ oracle.t())


def test_keys_and_values_fewer_than_ranks_are_repeated() -> None:
    # Eight heads of 4 with two groups on four ranks: q has 8 rows a rank, k and v one group each.
    totals, sizes = [32, 8, 8], [8, 4, 4]
    found = [rows_of_rank(totals, sizes, rank, 4) for rank in range(4)]
    assert [own[0].start for own in found] == [0, 8, 16, 24]
    assert [own[1].start - 32 for own in found] == [0, 0, 4, 4]
    assert [own[2].start - 40 for own in found] == [0, 0, 4, 4]
    assert rows_of_rank([32], [32], 3, 4) == [slice(0, 32)]  # a replicated layer
