"""Trains and blocks without the numbers that a change of basis can remove."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tensorize.algebra.identities import with_identities, without_identities
from tensorize.algebra.pivot import BOUND
from tensorize.algebra.reconstruct import reconstruct
from tensorize.ir.spec import TTSpec
from tests.models import relative

SPECS = (
    TTSpec((6, 5), (5, 8), (12,)),
    TTSpec((1, 20), (6, 7), (5,)),
    TTSpec((20, 1, 1), (1, 4, 5), (8, 3)),
    TTSpec((4, 3, 8), (8, 2, 4), (6, 5)),
    TTSpec((2, 3, 2, 3), (3, 2, 3, 2), (4, 6, 4)),
    TTSpec((2, 3), (3, 2), (4,), experts=2),
    TTSpec.block((6, 4), (5, 7), 3),
    TTSpec.block((8, 3), (2, 10), 6, experts=2),
)


def cores_of(spec: TTSpec, condition: float, seed: int) -> list[Tensor]:
    """Random cores in float64 whose components fall to 1 / condition at every bond."""
    draw = torch.Generator().manual_seed(seed)
    cores = [torch.randn(s, generator=draw, dtype=torch.float64) for s in spec.core_shapes]
    for k, rank in enumerate(spec.ranks, 1):
        falls = torch.logspace(0, -math.log10(condition), rank, dtype=torch.float64)
        axis = spec.cores[k].index(f"r{k}")
        cores[k] *= falls.reshape(-1, *(1,) * (cores[k].dim() - axis - 1))
    return cores


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(SPECS), st.integers(0, 8), st.integers(0, 100))
def test_the_weight_is_the_same_with_fewer_numbers(spec: TTSpec, power: int, seed: int) -> None:
    cores = cores_of(spec, 10.0**power, seed)
    bare = spec.in_order_of(1)
    (*stored,) = without_identities(bare, cores, torch.float64)
    count = len(cores)
    assert [tuple(core.shape) for core in stored[:count]] == list(bare.core_shapes)
    assert [tuple(kept.shape) for kept in stored[count:]] == [i.shape for i in bare.indices]
    assert sum(core.numel() for core in stored[:count]) == bare.parameters
    bonds = (math.prod(index.shape) * index.shape[-1] for index in bare.indices)
    assert spec.parameters - bare.parameters == spec.removable == sum(bonds)
    assert all(float(core.abs().max()) <= BOUND * (1 + 1e-9) for core in stored[1:count])
    exact = reconstruct(spec, cores)
    assert relative(reconstruct(spec, with_identities(bare, stored)), exact) < 1e-12


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(SPECS),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    st.integers(0, 8),
    st.integers(0, 100),
)
def test_rounding_costs_at_most_four_times_that_of_plain_cores(
    spec: TTSpec, dtype: torch.dtype, power: int, seed: int
) -> None:
    cores, bare = cores_of(spec, 10.0**power, seed), spec.in_order_of(1)
    exact, count = reconstruct(spec, cores), len(cores)
    stored = without_identities(bare, cores, dtype)
    assert {core.dtype for core in stored[:count]} == {dtype}
    wide = [core.double() for core in stored[:count]]
    off = relative(reconstruct(spec, with_identities(bare, (*wide, *stored[count:]))), exact)
    plain = relative(reconstruct(spec, [core.to(dtype).double() for core in cores]), exact)
    # A weight of one entry may have none of it by chance.
    assert off <= 4 * max(plain, torch.finfo(dtype).eps / 8)


def test_the_first_core_is_made_of_entries_of_the_weight() -> None:
    spec = SPECS[0]
    cores = cores_of(spec, 10.0, 0)
    first, _, kept = without_identities(spec.in_order_of(1), cores, torch.float64)
    weight = reconstruct(spec, cores).reshape(6, 5, 5, 8).transpose(1, 2).reshape(30, 40)
    assert torch.allclose(first.reshape(30, 12), weight[:, kept.long()])


def test_every_block_has_columns_of_its_own() -> None:
    spec = TTSpec.block((6, 4), (5, 7), 3)
    *_, kept = without_identities(spec.in_order_of(1), cores_of(spec, 10.0, 0), torch.float64)
    assert len({tuple(row) for row in kept.flatten(0, 1).tolist()}) > 4
    assert torch.equal(kept, kept.sort(-1).values)


def test_gradients_reach_all_that_is_stored() -> None:
    spec = TTSpec((2, 3, 2), (2, 2, 3), (3, 4))
    bare = spec.in_order_of(1)
    *stored, one, two = without_identities(bare, cores_of(spec, 3.0, 0), torch.float64)

    def weight(*cores: Tensor) -> Tensor:
        return reconstruct(spec, with_identities(bare, (*cores, one, two)))

    assert torch.autograd.gradcheck(weight, [core.requires_grad_() for core in stored])


def test_complex_cores_have_identities_too() -> None:
    spec = TTSpec((6, 5), (5, 8), (12,))
    cores = [
        torch.complex(a, b) for a, b in zip(*(cores_of(spec, 1e3, s) for s in (0, 1)), strict=True)
    ]
    stored = without_identities(spec.in_order_of(1), cores, torch.complex64)
    made = with_identities(spec.in_order_of(1), stored)
    assert float((reconstruct(spec, made) - reconstruct(spec, cores)).norm()) < 1e-5 * float(
        reconstruct(spec, cores).norm()
    )


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_specs_tell_the_form_and_are_read_again(spec: TTSpec) -> None:
    bare = spec.in_order_of(1)
    assert TTSpec.from_dict(bare.to_dict()) == bare != spec
    assert bare.plain == spec == TTSpec.from_dict(spec.to_dict())
    assert eval(repr(bare)) == bare
    assert bare.with_ranks((1,) * len(spec.ranks)).pivoted == 1
    assert bare.shape == spec.shape


def test_it_says_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="no identity in 9 of 6 columns"):
        TTSpec((8, 2), (8, 3), (9,)).in_order_of(1)
    with pytest.raises(ValueError, match="no groups of 2"):
        TTSpec((8, 2), (8, 4), (3,)).in_order_of(2)
    assert TTSpec((8, 2), (8, 3), (6,)).removable == 0  # nothing would be left of the core
