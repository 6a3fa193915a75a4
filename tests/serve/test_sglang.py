"""SGLang serves what was compressed: with the tokens of transformers, or a weight is named.

It was run on a CPU, in float32, where its CUDA packages and torchvision were stand-ins.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.serve import damaged, models

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("sglang") is None, reason="SGLang is not installed"
    ),
]

SERVED = [name for name in models.CASES if "experts" not in name]
CLOSE = 1e-4
"""Of log-probabilities in float32, through another attention."""


def served(directory: Path) -> dict[str, Any]:
    """What SGLang writes, or all that it says."""
    command = [sys.executable, "-m", "tests.serve.in_sglang", str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    found = [line for line in done.stdout.splitlines() if line.startswith('{"tokens"')]
    return json.loads(found[0]) if found else {"error": done.stdout + done.stderr}


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: models.saved(models.CASES[name], tmp_path / name)


@pytest.mark.parametrize("name", SERVED)
def test_tokens_are_those_of_transformers(name: str, folder: Callable[[str], Path]) -> None:
    directory = folder(name)
    found = served(directory)
    assert "error" not in found, found["error"]
    tokens, probabilities = models.expected(directory)
    assert found["tokens"] == tokens
    for ours, theirs in zip(found["log_probabilities"], probabilities, strict=True):
        assert ours == pytest.approx(theirs, abs=CLOSE)


def test_experts_in_factors_are_refused(folder: Callable[[str], Path]) -> None:
    said = served(folder("experts"))["error"]
    assert "SGLang runs no experts in factors" in said
    assert "exclude=" in said


@pytest.mark.parametrize(
    "key", ["model.layers.1.self_attn.q_proj.second.weight", "model.norm.weight"]
)
@pytest.mark.parametrize("manifest", [True, False])
def test_a_missing_tensor_is_named(
    key: str, manifest: bool, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    target = damaged.without(folder("mixed"), key, tmp_path / "damaged", manifest=manifest)
    assert key in served(target)["error"]


def test_a_weight_that_has_no_place_is_named(folder: Callable[[str], Path], tmp_path: Path) -> None:
    target = damaged.with_site(folder("mixed"), tmp_path / "damaged", damaged.renamed)
    said = served(target)["error"]
    assert "model.layers.0.mlp.dawn_proj.weight" in said
    assert "has no weight" in said
