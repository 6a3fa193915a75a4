"""A newcomer pastes the README, and gets from a clone to a served, evaluated language model."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.paths import ROOT

TEXT = (ROOT / "README.md").read_text()
COPIED = ("README.md", "docs", "examples", "tensorize", "passes", "codegen", "pyproject.toml")


def test_it_is_two_screens() -> None:
    assert len(TEXT.splitlines()) <= 110


def test_every_link_and_path_is_there() -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[\w-]+)?\)", TEXT)
    assert len(links) > 10
    for link in links:
        assert (ROOT / link).exists(), link


@pytest.mark.slow
def test_what_is_pasted_ends_in_an_answer_of_the_server(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    _, after = TEXT.split("## From a clone to a served language model")
    pasted = re.search(r"```console\n(.*?)```", after, re.DOTALL)
    assert pasted is not None
    for name in COPIED:  # a clone after `make demo`
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, symlinks=True)
        else:
            shutil.copy(source, tmp_path / name)
    (tmp_path / ".venv").symlink_to(ROOT / ".venv")
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        ["bash", "-m", "-c", pasted.group(1)], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    answer = json.loads(done.stdout.strip().splitlines()[-1])
    assert answer["choices"][0]["text"], done.stderr
    assert (tmp_path / "evaluation.html").exists()
    assert "perplexity" in done.stdout
