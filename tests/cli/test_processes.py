"""The command line in a process of its own: streams, interrupts, exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tensorize
from tensorize.cli import INTERRUPTED
from tensorize.cli.telling import BUDGET, CHECKPOINT
from tensorize.store.manifest import read_report
from tests.cli.commands import TEXT, invoke, tiny_llama
from tests.paths import ROOT


def execute(*arguments: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "tensorize.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
    )


def test_help_in_a_process() -> None:
    for command in ((), ("compile",), ("analyze",), ("report",)):
        result = invoke(*command, "--help")
        assert result.exit_code == 0
        assert not command or f"Example: tensorize {command[0]}" in result.stdout
    done = execute("--version")
    assert (done.returncode, done.stdout.strip()) == (0, tensorize.__version__)


@pytest.mark.slow
def test_any_encoding_of_standard_output() -> None:
    """A pipe on Windows, a shell without a locale: names have letters that those have not."""
    Path("größer.py").write_text(Path("clinet.py").read_text(encoding="utf-8"), encoding="utf-8")
    for encoding in ("ascii", "cp1252"):
        kept = {"PYTHONIOENCODING": encoding}
        done = execute("compile", "größer:make", "--budget", "0.5", "--out", "kleinß", **kept)
        assert done.returncode == 0, done.stderr
        assert "low rank" in done.stdout
        done = execute("report", "kleinß", "--json", **kept)
        assert json.loads(done.stdout)
        assert execute("analyze", "größer:make", **kept).returncode == 0
        done = execute("report", "größer", **kept)
        assert "Traceback" not in done.stderr
        assert done.returncode == CHECKPOINT


def test_only_json_on_standard_output() -> None:
    done = execute("compile", "clinet:make", "--budget", "0.5", "--out", "small", "--json")
    assert done.returncode == 0, done.stderr
    report = tensorize.Report.from_dict(json.loads(done.stdout)["report"])
    assert report == read_report("small")
    assert "a module that talks" in done.stderr
    assert "\r" not in done.stderr  # no bar where there is no terminal


@pytest.mark.slow
def test_interrupt_and_errors_in_a_process() -> None:
    done = execute("compile", "clinet:interrupted", "--out", "small")
    assert done.returncode == INTERRUPTED, done.stderr
    assert "interrupted" in done.stderr
    assert "Traceback" not in done.stderr
    done = execute("compile", "clinet:make", "--budget", "0.001", "--out", "small")
    assert done.returncode == BUDGET
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert not Path("small").exists()


def test_a_language_model_in_a_process(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "llama", eos="<s>")
    Path("text.txt").write_text(TEXT)
    done = execute(
        "compile", "llama", "--budget", "0.6", "--out", "small", "--calibration", "text.txt"
    )
    assert done.returncode == 0, done.stderr
    assert "mlp.down_proj" in done.stdout
    assert sorted(p.suffix for p in Path("small").iterdir()).count(".safetensors") == 1
    assert Path("small/tokenizer.json").is_file()
