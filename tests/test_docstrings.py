"""Every public name has a docstring, and an example in it that runs."""

from __future__ import annotations

import copy
import doctest
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tensorize
from tests.paths import ROOT

NAMES = [name for name in tensorize.__all__ if name != "__version__"]
ELSEWHERE = {
    "compile_checkpoint": "needs a checkpoint of Hugging Face: tests/api/test_stream.py",
    "draft": "needs a decoder: tests/api/test_draft.py",
    "tune_kernels": "needs a GPU: tests/running/test_tuning.py",
}
"""Names whose example would not run everywhere, and the test that is one."""


def dense() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 32)).eval()
    with torch.no_grad():  # spectra that fall, as those of trained weights
        for layer in (model[0], model[2]):
            u, s, v = torch.linalg.svd(layer.weight, full_matrices=False)
            layer.weight.copy_((u * s * torch.logspace(0, -2, len(s))) @ v)
    return model


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    model = dense()
    batches = [torch.randn(8, 16) for _ in range(6)]
    small = tensorize.compile(model, 0.5, calibration=batches)
    return {
        "tensorize": tensorize,
        "torch": torch,
        "copy": copy,
        "dense": model,
        "dense_again": dense(),
        "small": small,
        "batches": batches,
        "inputs": (batches[0],),
    }


@pytest.mark.parametrize("name", NAMES)
def test_its_docstring_says_what_it_is_and_its_example_runs(
    name: str, names: dict[str, Any], tmp_path: Path
) -> None:
    text = inspect.getdoc(getattr(tensorize, name)) or ""
    assert len(text.split("\n\n")[0]) > 20, name
    if inspect.isfunction(getattr(tensorize, name)):
        assert "Raises:" in text, name
    if name in ELSEWHERE:
        assert (ROOT / ELSEWHERE[name].rpartition(" ")[2]).exists()
        return
    given = {**names, "folder": tmp_path / "small"}
    example = doctest.DocTestParser().get_doctest(text, given, name, None, None)
    assert example.examples, f"{name} has no example"
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    runner.run(example, out=said.append)
    assert runner.failures == 0, "".join(said)
