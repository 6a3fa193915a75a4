"""Coded tensors: bits that are kept, bounds that hold whatever the entries are, damage refused."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from tensorize.coding.planes import as_integers
from tensorize.coding.tensors import ENTRIES, decode, encode, range_of

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
OTHERS = (
    torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8,
    torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool, torch.uint16,
)  # fmt: skip
ODD = (
    math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0, 5e-324, 1e-45, -1e-40, 6e-8, 1e-38,
    65504.0, 3.4e38, -3.4e38, 1.79e308, 1.0, 256.0,
)  # fmt: skip


def there_and_back(tensor: Tensor, bound: float = 0.0) -> Tensor:
    coding, data = encode(tensor, bound)
    assert len(data) == coding.bytes
    return decode(coding, memoryview(data))


def bits(tensor: Tensor) -> Tensor:
    plain = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return as_integers(plain.contiguous().reshape(-1))


def draw_tensor(draw: random.Random, dtype: torch.dtype) -> Tensor:
    """Numbers of any size, together or apart, with odd ones among them."""
    generator = torch.Generator().manual_seed(draw.randrange(2**31))
    shape = [draw.choice((0, 1, 2, 3, 7, 40)) for _ in range(draw.randrange(4))]
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    kind = draw.randrange(4)
    if kind == 0:
        values *= 10 ** draw.uniform(-320, 300)
    elif kind == 1:
        values *= 10 ** draw.uniform(-8, 4)
    elif kind == 2:
        values *= 10 ** (torch.rand(shape, generator=generator, dtype=torch.float64) * 80 - 45)
    else:
        values = values.round() * 10 ** draw.uniform(-6, 2)
    flat = values.reshape(-1)
    for _ in range(draw.randrange(4) if flat.numel() else 0):
        flat[draw.randrange(flat.numel())] = draw.choice(ODD)
    return values.to(dtype)


def farthest(before: Tensor, after: Tensor) -> Fraction:
    """The largest error of an entry, without any rounding; NaN and infinity have to be the same."""
    odd = ~before.isfinite()
    assert torch.equal(bits(before[odd]), bits(after[odd]))
    pairs = zip(before[~odd].double().tolist(), after[~odd].double().tolist(), strict=True)
    return max((abs(Fraction(a) - Fraction(b)) for a, b in pairs), default=Fraction(0))


def check_bound(seed: int) -> None:
    draw = random.Random(seed)
    tensor = draw_tensor(draw, draw.choice(FLOATS))
    bound = 10 ** draw.uniform(-330, 308)
    if draw.random() < 0.7:
        bound = range_of(tensor) * 10 ** draw.uniform(-12, 0.5)
    found = there_and_back(tensor, bound)
    assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
    assert farthest(tensor, found) <= Fraction(bound if math.isfinite(bound) else 1.8e308), seed


def test_no_entry_passes_the_bound() -> None:
    for seed in range(400):
        check_bound(seed)


@pytest.mark.slow
def test_no_entry_of_ten_thousand_tensors_passes_the_bound() -> None:
    for seed in range(10_000):
        check_bound(seed)


@pytest.mark.parametrize("dtype", [*FLOATS, *OTHERS], ids=str)
def test_without_a_bound_every_bit_is_kept(dtype: torch.dtype) -> None:
    draw = random.Random(0)
    for _ in range(10):
        tensor = draw_tensor(draw, torch.float64).nan_to_num(0).clamp(-100, 100)
        if dtype in FLOATS:
            tensor = draw_tensor(draw, dtype)
        tensor = tensor.to(dtype)
        found = there_and_back(tensor)
        assert (found.dtype, found.shape) == (dtype, tensor.shape)
        assert torch.equal(bits(found), bits(tensor))


def test_complex_entries_are_bounded_as_distances() -> None:
    tensor = torch.randn(500, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    found = there_and_back(tensor, 0.01)
    error = float((found - tensor).abs().max())
    assert 0.005 < error <= 0.01


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_what_was_found_is_the_largest_error(dtype: torch.dtype) -> None:
    tensor = torch.randn(5000, generator=torch.Generator().manual_seed(0)).to(dtype)
    coding, data = encode(tensor, 0.02)
    found = decode(coding, memoryview(data))
    assert coding.found == float((found.double() - tensor.double()).abs().max()) <= coding.bound
    assert len(data) < 0.5 * tensor.nbytes


def test_several_blocks_are_the_same_in_one_thread_and_in_two() -> None:
    tensor = torch.randn(2 * ENTRIES + 7, generator=torch.Generator().manual_seed(0)).half()
    before = torch.get_num_threads()
    made = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            coding, data = encode(tensor, 1e-3)
            made.append((coding, data, decode(coding, memoryview(data))))
    finally:
        torch.set_num_threads(before)
    assert len(made[0][0].blocks) == 3
    assert made[0][:2] == made[1][:2]
    assert torch.equal(made[0][2], made[1][2])
    assert float((made[0][2].double() - tensor.double()).abs().max()) <= 1e-3


def test_damage_is_refused_or_does_nothing() -> None:
    """A changed bit is found by a checksum, or is one of those that the format does not read."""
    tensor = torch.randn(600, generator=torch.Generator().manual_seed(0))
    tensor[3] = math.nan
    coding, data = encode(tensor, 1e-2)
    good = decode(coding, memoryview(data))
    draw = random.Random(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(data)
        damaged[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        try:
            found = decode(coding, memoryview(damaged))
        except ValueError:
            refused += 1
            continue
        assert torch.equal(bits(found), bits(good))
    assert refused > 280


def test_a_record_that_says_something_else_is_refused() -> None:
    coding, data = encode(torch.randn(40, generator=torch.Generator().manual_seed(0)), 1e-2)
    (block,) = coding.blocks
    for other in (
        replace(coding, shape=(41,)),
        replace(coding, shape=(2**40,)),
        replace(coding, dtype="float33"),
        replace(coding, dtype="nn"),
        replace(coding, blocks=(replace(block, packing=7),)),
        replace(coding, blocks=(replace(block, parts=()),)),
        replace(coding, blocks=(replace(block, parts=(-5, block.parts[0] + 5)),)),
        replace(coding, blocks=(replace(block, entries=-1), replace(block, entries=41))),
        replace(coding, blocks=(replace(block, beside=3),)),
    ):
        with pytest.raises(ValueError, match=r"."):
            decode(other, memoryview(data))
