"""Every family, compiled ahead of time for every target: no spills, and shared memory that fits."""

from __future__ import annotations

import pytest
import torch

from tensorize.codegen import launch
from tensorize.errors import TensorizeError
from tests.kernels import FAMILIES

pytest.importorskip("triton", reason="triton is not installed")

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# One dtype is enough for the default run; float16 compiles as bfloat16 does.
CASES = [
    pytest.param(
        name, target, dtype, id=f"{name}-{target}-{dtype}", marks=() if quick else pytest.mark.slow
    )
    for name in FAMILIES
    for target in launch.TARGETS
    for dtype in DTYPES
    for quick in [dtype == "bfloat16" and name in ("pair", "decode", "three cores", "gradients")]
]


@pytest.fixture(autouse=True)
def _not_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize(("name", "target", "dtype"), CASES)
def test_it_fits(name: str, target: str, dtype: str) -> None:
    made = launch.compile(FAMILIES[name](DTYPES[dtype]), target, DTYPES[dtype])
    assert made.spills == 0
    assert 0 < made.registers <= (256 if target.startswith("cuda") else 512)
    assert 0 < made.shared_bytes <= launch.SHARED_LIMIT[target]
    assert made.binary[:4] == b"\x7fELF"


MATRIX_INSTRUCTION = {
    "cuda:80": "mma.sync",
    "cuda:90": "wgmma",
    "cuda:100": "tcgen05",
    "hip:gfx90a": "mfma",
    "hip:gfx942": "mfma",
}


@pytest.mark.parametrize("target", launch.TARGETS)
def test_dots_are_the_targets_matrix_instructions(target: str) -> None:
    made = launch.compile(FAMILIES["pair"](torch.bfloat16), target, torch.bfloat16)
    assert MATRIX_INSTRUCTION[target] in made.asm
    assert made.target == target


@pytest.mark.parametrize("target", ["hip:gfx90a", "hip:gfx942"])
def test_shares_have_arrived_before_a_program_says_so(target: str) -> None:
    """What threads of one program wrote is waited for before the barrier that precedes the count.

    The atomic's own release waits for the memory operations of its own wave only.
    """
    assembly = launch.compile(FAMILIES["decode"](torch.bfloat16), target, torch.bfloat16).asm
    lines = [line.strip() for line in assembly.splitlines() if line.strip()]
    atomic = next(k for k, line in enumerate(lines) if "atomic_add" in line)
    barrier = max(k for k in range(atomic) if lines[k].startswith("s_barrier"))
    last_store = max(
        k for k in range(barrier) if lines[k].startswith(("global_store", "buffer_store"))
    )
    waits = [line for line in lines[last_store:barrier] if line.startswith("s_waitcnt")]
    assert any("vmcnt(0)" in line for line in waits), lines[last_store : barrier + 1]


def test_tf32_is_compiled_where_it_is_asked_for() -> None:
    source = FAMILIES["pair"](torch.float32)
    fast = launch.compile(source, "cuda:80", torch.float32, precision="tf32")
    exact = launch.compile(source, "cuda:80", torch.float32)
    assert "tf32" in fast.asm
    assert "tf32" not in exact.asm
    assert fast.spills == 0


def test_what_cannot_be_compiled_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    source = FAMILIES["pair"](torch.bfloat16)
    with pytest.raises(TensorizeError, match="target 'tpu:5' is not known"):
        launch.compile(source, "tpu:5", torch.bfloat16)
    with pytest.raises(TensorizeError, match=r"not torch\.float64"):
        launch.compile(source, "cuda:90", torch.float64)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(TensorizeError, match="unset TRITON_INTERPRET"):
        launch.compile(source, "cuda:90", torch.bfloat16)
