"""Every kernel is right: in triton's interpreter, which needs no GPU."""

from __future__ import annotations

import pytest

from tests.kernels import holds_under_the_interpreter
from tests.paths import ROOT


def test_what_runs_on_a_gpu_holds_under_the_interpreter() -> None:
    """In one process: to start one takes as long as most of these files."""
    pytest.importorskip("triton", reason="triton is not installed")
    files = sorted((ROOT / "tests/codegen").rglob("test_*.py"))
    holds_under_the_interpreter(*(f for f in files if "@each_device" in f.read_text()))
