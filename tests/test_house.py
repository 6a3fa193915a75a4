"""The house: who may import whom, and that importing tensorize needs none of the extras."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Layers from the ground up; a file may import its own layer's files and the layers before it.
# passes and codegen never import each other: see NEIGHBOURS.
LAYERS = (
    ("errors", "version", "files", "printer", "graph_text", "hooks"),
    ("ir",),
    (
        *("tt", "budget", "uses", "views", "observer", "forward", "progress", "tensors"),
        *("tensorfile", "work"),
    ),
    ("interpret", "ops", "ties"),
    ("lazy",),
    ("weight", "report", "page"),
    ("passes", "codegen"),
    ("capture", "drawing", "graphs", "manifest", "analysis", "cache", "selfmade", "outcome"),
    (
        *("huggingface", "pretrained", "lora", "checkpoint", "distillation", "healing", "measures"),
        *("shards", "streaming"),
    ),
    ("runtime",),
    ("api",),
    ("training",),
    (
        "backend",
        "emitted",
        "speed",
        "tuning",
        "sources",
        "evaluation",
        "evaluation_page",
        "cli",
        "__init__",
    ),
)
NEIGHBOURS = ({"passes", "codegen"},)


def layer_of(module: str) -> int:
    for level, names in enumerate(LAYERS):
        if module in names:
            return level
    raise AssertionError(f"tensorize.{module} has no place in the house: add it to LAYERS")


def files() -> list[tuple[str, Path]]:
    found = [(path.stem, path) for path in (ROOT / "tensorize").glob("*.py")]
    for folder in ("passes", "codegen", "tensorize/training"):
        found += [(Path(folder).name, path) for path in (ROOT / folder).glob("*.py")]
    return sorted(found)


def imports_of(path: Path) -> set[str]:
    """Modules of tensorize that a file imports anywhere, by their first name."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "tensorize":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tensorize."):
            found.add((node.module or "").split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("tensorize.")}
    return found


@pytest.mark.parametrize(("module", "path"), files(), ids=lambda v: v if isinstance(v, str) else "")
def test_imports_point_downwards(module: str, path: Path) -> None:
    for other in imports_of(path):
        assert layer_of(other) <= layer_of(module), f"{path.name} imports tensorize.{other}"
        for pair in NEIGHBOURS:
            assert not ({module, other} <= pair and module != other), (
                f"{path.name} imports tensorize.{other}"
            )


def test_only_api_knows_both_passes_and_codegen() -> None:
    both = [path.name for _, path in files() if {"passes", "codegen"} <= imports_of(path)]
    assert both == ["api.py"]


def test_importing_tensorize_needs_none_of_the_extras() -> None:
    blocked = ["transformers", "tokenizers", "matplotlib", "opt_einsum", "pytest", "triton"]
    code = (
        "import sys\n"
        f"for name in {blocked!r}: sys.modules[name] = None\n"
        "import torch, tensorize\n"
        "model = tensorize.compile(torch.nn.Sequential(torch.nn.Linear(32, 32)), budget=0.5)\n"
        "print(str(tensorize.report(model))[:9])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("tensorize")


def test_links_stand_for_the_top_level_folders() -> None:
    for name in ("passes", "codegen"):
        assert (ROOT / "tensorize" / name).resolve() == (ROOT / name).resolve()
        assert not (ROOT / name).is_symlink()
