"""Every family, compiled ahead of time for every target: no spills, and shared memory that fits."""

from __future__ import annotations

import re

import pytest
import torch

from tensorize.base.errors import TensorizeError
from tensorize.codegen.device import autotune, compiler
from tensorize.codegen.device.compiler import TARGETS
from tensorize.codegen.triton import source, tiles
from tensorize.ir.spec import TTSpec
from tensorize.ir.work import Epilogue, Work
from tests.kernels import FAMILIES, GUARDED, SMALL

pytest.importorskip("triton", reason="triton is not installed")

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
EVERY = {**FAMILIES, **GUARDED}
# One dtype is enough for the default run.
CASES = [
    pytest.param(
        name, target, dtype, id=f"{name}-{target}-{dtype}", marks=() if quick else pytest.mark.slow
    )
    for name in EVERY
    for target in TARGETS
    for dtype in DTYPES
    for quick in [dtype == "bfloat16" and name in ("pair", "decode", "three cores")]
]

SHARED_LIMIT = {
    "cuda:80": 166912,
    "cuda:90": 232448,
    "cuda:100": 232448,
    "hip:gfx90a": 65536,
    "hip:gfx942": 65536,
}
"""Bytes of shared memory that one block may have."""


@pytest.fixture(autouse=True)
def _not_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize(("name", "target", "dtype"), CASES)
def test_it_fits(name: str, target: str, dtype: str) -> None:
    made = compiler.compile(EVERY[name](DTYPES[dtype]), target, DTYPES[dtype])
    assert made.spills == 0
    assert 0 < made.registers <= (256 if target.startswith("cuda") else 512)
    assert 0 < made.shared_bytes <= SHARED_LIMIT[target]
    assert made.binary[:4] == b"\x7fELF"


@pytest.mark.parametrize("name", SMALL)
def test_small_and_odd_shapes_compile(name: str) -> None:
    """Where loops have one turn, their names would meet those of later loops."""
    made = compiler.compile(SMALL[name](torch.float16), "hip:gfx90a", torch.float16)
    assert made.spills == 0


@pytest.mark.parametrize(
    "spec",
    [
        TTSpec((20, 10), (20, 26), (32,)),
        TTSpec.block((260, 2), (2, 100), 56),
        TTSpec.block((256, 6), (2, 260), 64),
    ],
    ids=str,
)
@pytest.mark.parametrize("contract", ["columns", "rows"])
def test_two_cores_of_odd_sizes_fit_with_what_the_gradients_need(spec, contract) -> None:
    work = Work((spec,), contract, saved=True)
    for dtype in (torch.float32, torch.bfloat16):
        made = compiler.compile(source.forward(work, tiles.default(work, dtype)), "cuda:100", dtype)
        assert made.spills == 0


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("rows", [1, 16, 512])
@pytest.mark.parametrize("rank", [64, 256, 512])
def test_what_runs_by_default_fits_for_any_number_of_rows(rank, rows, target) -> None:
    work = Work((TTSpec.low_rank(4096, 4096, rank),), epilogue=Epilogue(bias=True))
    for dtype in (torch.bfloat16, torch.float32):
        made = compiler.compile(autotune.source(work, dtype, rows, "cpu"), target, dtype)
        assert made.spills == 0
        assert made.shared_bytes <= SHARED_LIMIT[target]


MATRIX_INSTRUCTION = {
    "cuda:80": "mma.sync",
    "cuda:90": "wgmma",
    "cuda:100": "tcgen05",
    "hip:gfx90a": "mfma",
    "hip:gfx942": "mfma",
}


@pytest.mark.parametrize("target", TARGETS)
def test_dots_are_the_targets_matrix_instructions(target: str) -> None:
    made = compiler.compile(FAMILIES["pair"](torch.bfloat16), target, torch.bfloat16)
    assert MATRIX_INSTRUCTION[target] in made.asm
    assert made.target == target


@pytest.mark.parametrize("target", ["hip:gfx90a", "hip:gfx942"])
def test_every_wave_waits_for_its_own_stores_before_it_counts(target: str) -> None:
    """A barrier does not wait for stores there, and a release for those of its own wave only."""
    assembly = compiler.compile(FAMILIES["decode"](torch.bfloat16), target, torch.bfloat16).asm
    lines = [line.strip() for line in assembly.splitlines()]
    lines = [line for line in lines if line and not line.startswith((".", ";"))]
    atomic = next(k for k, line in enumerate(lines) if line.startswith("global_atomic_add"))
    assert "vmcnt(0)" in lines[atomic - 1]
    assert re.search(r"v_and_b32_e32 v\d+, 63, v\d+", assembly)  # the first thread of each wave
    before = lines[max(k for k in range(atomic) if lines[k].startswith("s_barrier")) : atomic]
    assert not any(re.match(r"v_cmp_eq_u32_e64 .*, 0, v0$", line) for line in before)
    if target == "hip:gfx942":  # where second-level caches are several
        assert lines[atomic - 2] == "buffer_wbl2 sc1"
        assert "buffer_inv sc1" in lines[atomic : atomic + 3]


def test_tf32_is_compiled_where_it_is_asked_for() -> None:
    source = FAMILIES["pair"](torch.float32)
    fast = compiler.compile(source, "cuda:80", torch.float32, precision="tf32")
    exact = compiler.compile(source, "cuda:80", torch.float32)
    assert "tf32" in fast.asm
    assert "tf32" not in exact.asm
    assert fast.spills == 0


@pytest.mark.slow
@pytest.mark.parametrize("target", [t for t in TARGETS if t.startswith("cuda")])
@pytest.mark.parametrize("name", FAMILIES)
def test_it_fits_by_tf32_too(name: str, target: str) -> None:
    source = FAMILIES[name](torch.float32)
    made = compiler.compile(source, target, torch.float32, precision="tf32")
    # Entries that are read one by one, each by its own address, leave too few registers for a rank
    # of 300: some tens of words go to local memory, whatever the tiles.
    assert made.spills <= (256 if name == "pair of odd sizes" else 0)
    assert 0 < made.shared_bytes <= SHARED_LIMIT[target]


def test_what_cannot_be_compiled_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    source = FAMILIES["pair"](torch.bfloat16)
    with pytest.raises(TensorizeError, match="target 'tpu:5' is not known"):
        compiler.compile(source, "tpu:5", torch.bfloat16)
    with pytest.raises(TensorizeError, match=r"not torch\.float64"):
        compiler.compile(source, "cuda:90", torch.float64)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(TensorizeError, match="unset TRITON_INTERPRET"):
        compiler.compile(source, "cuda:90", torch.bfloat16)
