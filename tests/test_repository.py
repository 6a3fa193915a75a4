"""The files around the code say what is so: versions, paths, commands."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import tensorize
from tests.paths import ROOT


def test_the_citation_has_the_version_and_the_licence_of_the_package() -> None:
    said = dict(re.findall(r"^([\w-]+): (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert said["version"] == tensorize.__version__
    assert said["license"] == project["license"]
    assert said["cff-version"] == "1.2.0"
    assert project["authors"] == [{"name": "The tensorize developers"}]


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "SECURITY.md"])
def test_paths_and_targets_that_a_page_names_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    named = re.findall(r"`((?:[\w.-]+/)+[\w.-]*)`", text)
    assert named
    for path in named:
        places = (ROOT / path, ROOT / "tensorize" / path)
        assert path == "benchmarks/results/" or any(place.exists() for place in places), path
    targets = set(re.findall(r"^make ([\w-]+)", text, re.MULTILINE))
    assert all(re.search(rf"^{name}:", (ROOT / "Makefile").read_text(), re.M) for name in targets)


@pytest.mark.slow
def test_the_wheel_holds_the_package_with_its_templates_and_nothing_else(tmp_path: Path) -> None:
    tree, out = tmp_path / "tree", tmp_path / "dist"
    tree.mkdir()
    for name in ("tensorize", "passes", "codegen", "examples"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(out), str(tree)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = out.iterdir()
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"tensorize", f"tensorize-{tensorize.__version__}.dist-info"}
    kept = {str(path.relative_to(ROOT)) for path in (ROOT / "tensorize").rglob("*.j2")}
    assert kept < set(names)
    assert "tensorize/passes/pipeline.py" in names  # a real file, where the tree has a link
