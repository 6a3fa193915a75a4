"""The house: the table in docs/house.md holds, and importing tensorize needs none of the extras."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import networkx as nx
import pytest

import tensorize
from tests.paths import ROOT

MOST_FILES = 15
MOST_OF_THE_CODE = 0.25
FRONT_DOOR = "tensorize"
EXTRA_TESTS = {"examples", "benchmarks", "golden"}


@cache
def modules() -> dict[str, Path]:
    """Every file of the product by its import name."""
    found = {}
    for folder in ("tensorize", "passes", "codegen"):
        for path in (ROOT / folder).rglob("*.py"):
            inner = path.relative_to(ROOT).parts
            if inner[:2] in (("tensorize", "passes"), ("tensorize", "codegen")):
                continue  # the links
            names = [*inner[:-1], path.stem] if path.stem != "__init__" else [*inner[:-1]]
            found[".".join(names if folder == "tensorize" else ["tensorize", *names])] = path
    return found


def folder_of(path: Path) -> str:
    """The name that the table has for a file's folder."""
    inner = path.parent.relative_to(ROOT)
    return inner.as_posix().removeprefix("tensorize/")


@cache
def table() -> dict[str, tuple[str, frozenset[str]]]:
    """Purpose and what may be imported, by folder."""
    rows = re.findall(
        r"^\| `([^`]+)` \| (.+?) \| ?(.*?) ?\|$", (ROOT / "docs/house.md").read_text(), re.M
    )
    return {name: (purpose, frozenset(allowed.split())) for name, purpose, allowed in rows}


def statements(path: Path) -> Iterator[tuple[ast.ImportFrom | ast.Import, bool]]:
    """The imports that run, and whether they do so when the file is imported."""
    tree = ast.parse(path.read_text())
    for_types: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for_types |= set(ast.walk(node))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom | ast.Import) and node not in for_types:
            yield node, node in tree.body


@cache
def imports_of(path: Path) -> frozenset[tuple[str, bool]]:
    """Modules of tensorize that a file imports, and whether at once."""
    found: set[tuple[str, bool]] = set()
    for node, at_once in statements(path):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            home = node.module or ""
            names = [
                f"{home}.{a.name}" if f"{home}.{a.name}" in modules() else home for a in node.names
            ]
        found |= {(name, at_once) for name in names if name in modules()}
    return frozenset(found)


def code_lines(folder: str) -> int:
    paths = [path for path in modules().values() if folder_of(path) == folder]
    return sum(len(path.read_text().splitlines()) for path in paths)


def test_every_folder_has_a_row_that_says_what_it_says_itself() -> None:
    homes = {folder_of(path): path.parent for path in modules().values()}
    assert set(homes) == set(table())
    for folder, home in homes.items():
        text = ast.get_docstring(ast.parse((home / "__init__.py").read_text()))
        assert text is not None, f"{folder} says nothing of itself"
        if folder != FRONT_DOOR:
            assert text.split("\n\n")[0].replace("\n", " ") == table()[folder][0]


@pytest.mark.parametrize("folder", sorted(table()))
def test_folders_import_what_the_table_allows(folder: str) -> None:
    for path in modules().values():
        if folder_of(path) != folder:
            continue
        for name, _ in imports_of(path):
            other = folder_of(modules()[name])
            free = other in (folder, FRONT_DOOR)
            assert free or other in table()[folder][1], f"{path.name} imports {name}"


def test_the_table_allows_nothing_that_is_not_used() -> None:
    used: dict[str, set[str]] = {folder: set() for folder in table()}
    for path in modules().values():
        used[folder_of(path)] |= {folder_of(modules()[name]) for name, _ in imports_of(path)}
    for folder, (_, allowed) in table().items():
        assert allowed <= used[folder], f"{folder} no longer needs {allowed - used[folder]}"


def test_nothing_imports_in_a_circle() -> None:
    rows = nx.DiGraph([(a, b) for a, (_, allowed) in table().items() for b in allowed])
    assert nx.is_directed_acyclic_graph(rows), nx.find_cycle(rows)
    edges = [
        (name, other)
        for name, path in modules().items()
        for other, at_once in imports_of(path)
        if at_once and other not in (name, FRONT_DOOR)
    ]
    files = nx.DiGraph(edges)
    assert nx.is_directed_acyclic_graph(files), nx.find_cycle(files)


def test_passes_and_codegen_never_import_each_other() -> None:
    for folder, (_, allowed) in table().items():
        other = {"passes": "codegen", "codegen": "passes"}.get(folder.split("/")[0])
        assert other not in {allow.split("/")[0] for allow in allowed}, folder


def test_one_file_asks_torchs_compiler_what_it_does_not_promise() -> None:
    rooms = "_(?:dynamo|inductor|functorch|guards|higher_order_ops)"
    words = "nn_module_stack|example_value|compile_subgraph_reason"
    private = re.compile(rf"(?:from|import) torch\.{rooms}|torch\.{rooms}\.\w|{words}")
    asking = [name for name, path in modules().items() if private.search(path.read_text())]
    assert asking == ["tensorize.base.dynamo"]


def test_no_folder_is_a_drawer() -> None:
    whole = sum(code_lines(folder) for folder in table())
    for folder in table():
        files = [path for path in modules().values() if folder_of(path) == folder]
        assert len(files) <= MOST_FILES + 1, f"{folder} has {len(files)} files"
        assert code_lines(folder) <= MOST_OF_THE_CODE * whole, f"{folder} is too much of the code"


def test_tests_lie_in_the_tree_of_what_they_test() -> None:
    known = {Path(folder) for folder in table()}
    for path in (ROOT / "tests").rglob("test_*.py"):
        home = path.parent.relative_to(ROOT / "tests")
        assert home == Path() or home in known or home.parts[0] in EXTRA_TESTS, path


def test_the_front_door_names_what_it_hands_on() -> None:
    tree = ast.parse((ROOT / "tensorize/__init__.py").read_text())
    for_types = {
        alias.asname: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.col_offset
        for alias in node.names
    }
    assert for_types == tensorize._HOMES
    assert {*for_types, "__version__"} == set(tensorize.__all__) <= set(dir(tensorize))
    assert all(getattr(tensorize, name) is not None for name in tensorize.__all__)


def test_importing_tensorize_needs_none_of_the_extras() -> None:
    blocked = ["transformers", "tokenizers", "matplotlib", "opt_einsum", "pytest", "triton"]
    code = (
        "import sys\n"
        f"for name in {blocked!r}: sys.modules[name] = None\n"
        "import torch, tensorize\n"
        "model = tensorize.compile(torch.nn.Sequential(torch.nn.Linear(32, 32)), budget=0.5)\n"
        "print(str(tensorize.report(model))[:6])\n"
    )
    assert run(code).startswith("kept:")


def test_the_words_need_no_heavy_library() -> None:
    heavy = ["torch.fx", "sympy", "networkx"]
    files = sorted(name for name, path in modules().items() if folder_of(path) == "ir")
    code = (
        f"import sys\nimport {', '.join(files)}\nprint([n for n in {heavy!r} if n in sys.modules])"
    )
    assert run(code).strip() == "[]"


def run(code: str) -> str:
    """What a program prints in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_links_stand_for_the_top_level_folders() -> None:
    for name in ("passes", "codegen"):
        assert (ROOT / "tensorize" / name).resolve() == (ROOT / name).resolve()
        assert not (ROOT / name).is_symlink()
