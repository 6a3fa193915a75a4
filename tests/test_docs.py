"""The documentation: public names are there, its Python runs, it builds without a warning."""

from __future__ import annotations

import os
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import tensorize
from docs import pages, pictures
from tensorize.cli import COMMANDS
from tests.paths import ROOT

DOCS = ROOT / "docs"
BUILDER = ROOT / ".venv-docs/bin/python"
# What needs several processes, an engine or a model of the reader's is ```py, and is not run.
PAGES = sorted(path for path in DOCS.rglob("*.md") if "```python" in path.read_text())


def test_the_reference_has_every_public_name() -> None:
    named = [name for names in pages.GROUPS.values() for name in names]
    assert sorted([*named, "__version__"]) == tensorize.__all__
    assert pages.homes() == tensorize._HOMES


def test_the_page_of_the_command_line_has_every_command() -> None:
    assert [name for name, _, _ in pages.commands()] == list(COMMANDS)
    page = pages.on_page_markdown((DOCS / "command-line.md").read_text())
    assert all(each.example in page for each in COMMANDS.values())


def test_every_kind_of_error_has_its_exit_code() -> None:
    from tensorize.cli import telling

    told = dict(
        re.findall(r"^\| `(\w+Error)` \|.*\| (\d) \|$", (DOCS / "errors.md").read_text(), re.M)
    )
    kinds = [name for name in tensorize.__all__ if name.endswith("Error")]
    assert sorted(told) == kinds
    for name in kinds:
        assert telling._exit_code(getattr(tensorize, name)("something", way_out="")) == int(
            told[name]
        )


def test_the_pictures_are_what_their_script_makes() -> None:
    kept = {path.stem: path.read_text() for path in (DOCS / "pictures").glob("*.svg")}
    assert kept == pictures.pictures()
    for page, drawn in pictures.PAGES.items():
        shown = re.findall(r"\]\(pictures/(\w+)\.svg\)", (DOCS / f"{page}.md").read_text())
        assert shown == [draw.__name__ for draw in drawn]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*`torch_dtype` is deprecated")
@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_every_snippet_of_a_page_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    for snippet in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(compile(snippet, str(page), "exec"), names)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not BUILDER.exists():
        pytest.skip("the documentation's environment is not there: make docs")
    out = tmp_path_factory.mktemp("site")
    command = [str(BUILDER), "-m", "mkdocs", "build", "--strict", "-d", str(out)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr, done.stderr
    return out


class Links(HTMLParser):
    """The links of a page, and its anchors."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.anchors |= {value for value in (found.get("id"), found.get("name")) if value}
        if tag == "a" and (link := found.get("href")):
            self.links.append(link)


@pytest.mark.slow
def test_the_site_builds_and_all_of_its_links_lead_somewhere(site: Path) -> None:
    built = {
        path: Links(path.read_text()) for path in site.rglob("*.html") if path.name != "404.html"
    }
    assert len(built) > 20
    for path, page in built.items():
        for link in page.links:
            place, _, anchor = link.partition("#")
            if re.match(r"https?:|mailto:", link):
                continue
            target = (path.parent / place).resolve() if place else path
            target = target / "index.html" if target.is_dir() else target
            assert target.exists(), f"{path}: {link}"
            if anchor and target in built:
                assert anchor in built[target].anchors, f"{path}: {link}"


@pytest.mark.slow
def test_the_reference_shows_examples_and_no_name_is_empty(site: Path) -> None:
    text = (site / "reference.html").read_text()
    for name in tensorize.__all__:
        if name != "__version__":
            assert f'.{name}"' in text, name
