"""Real text that every machine has: the sources and docstrings of the Python standard library.

The examples, the tests and the benchmarks need text that people wrote, without a download. The
running interpreter's own library is about 8 MB of it: code, comments and English documentation.
The files are only read and parsed, never imported, and always in the same order.

Every file belongs to exactly one split, chosen by a hash of its name, so that the split of a file
neither depends on which other files are there nor changes with the version of Python.
"""

from __future__ import annotations

import ast
import hashlib
import os
import random
import re
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

Split = Literal["train", "validation", "held_out"]
SPLITS: tuple[Split, ...] = ("train", "validation", "held_out")

# Folders that distributions ship separately, that newer Pythons dropped, or that are not written
# by people (character tables).
_SKIPPED_FOLDERS = frozenset(
    {
        "__phello__",
        "__pycache__",
        "dist-packages",
        "distutils",
        "encodings",
        "ensurepip",
        "idle_test",
        "idlelib",
        "lib2to3",
        "site-packages",
        "test",
        "tests",
        "tkinter",
        "turtledemo",
    }
)
# Prefixes of generated names: they hold the paths and compiler flags of one machine.
_SKIPPED_PREFIXES = ("_sysconfigdata", "config-", "plat-")
# A table of documentation pages, stored as one dictionary of strings: only the strings are text.
_DOCUMENTATION_TABLE = "pydoc_data/topics.py"
# The two largest files. Their pages and functions repeat each other, and either alone would make up
# a large part of a small split: they always train.
_ALWAYS_TRAIN = frozenset({_DOCUMENTATION_TABLE, "_pydecimal.py"})
# Of ten equal shares of the names, one is for validation and one is held out.
_SHARES = 10


@dataclass(frozen=True)
class Document:
    """One file of the standard library: its name relative to the library, and its text."""

    name: str
    text: str

    @property
    def split(self) -> Split:
        """The split that the file belongs to; depends on the name alone."""
        return split_of(self.name)


def split_of(name: str) -> Split:
    """The split of the file with this name: of ten, eight train, one validates, one is held out."""
    if name in _ALWAYS_TRAIN:
        return "train"
    share = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % _SHARES
    if share == 0:
        return "validation"
    return "held_out" if share == 1 else "train"


@cache
def documents(split: Split | None = None) -> tuple[Document, ...]:
    """All files of the standard library, or those of one split, sorted by name.

    Raises:
        FileNotFoundError: the interpreter has no sources (a zipped or stripped library).
    """
    if split is not None:
        return tuple(document for document in documents() if document.split == split)
    library = Path(sysconfig.get_path("stdlib"))
    found = tuple(
        Document(name, text) for name in _names(library) if (text := _read(library / name, name))
    )
    if not found:
        raise FileNotFoundError(f"no Python sources under {library}")
    return found


def sources(split: Split | None = None) -> str:
    """The text of all files, or of one split, in one string."""
    return "\n".join(document.text for document in documents(split))


def docstrings(split: Split | None = None) -> Iterator[str]:
    """Every docstring, cleaned of its indentation, and every page of the documentation table."""
    for document in documents(split):
        yield from _docstrings_of(document)


def pages(seed: int = 0) -> list[str]:
    """The pages of the documentation table, parts of Python's reference manual, in an order."""
    (table,) = (document for document in documents() if document.name == _DOCUMENTATION_TABLE)
    found = list(_docstrings_of(table))
    random.Random(seed).shuffle(found)
    return found


def sentences(limit: int | None = None, seed: int = 0, split: Split | None = None) -> list[str]:
    """Clean English sentences out of the docstrings, without repetition, in a random order.

    Meant for calibrating and comparing sentence encoders. The order depends on `seed` only, and
    a smaller `limit` gives the first sentences of a larger one.

    Args:
        limit: how many sentences at most; None gives all.
        seed: of the order.
        split: the files to take them from; None takes all.
    """
    chosen = list(_sentences(split))
    random.Random(seed).shuffle(chosen)
    return chosen[:limit]


@cache
def _docstrings_of(document: Document) -> tuple[str, ...]:
    if document.name == _DOCUMENTATION_TABLE:
        return tuple(document.text.split("\n\f\n"))
    found = [
        ast.get_docstring(node)
        for node in ast.walk(_parse(document.text))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    return tuple(docstring for docstring in found if docstring)


@cache
def _sentences(split: Split | None) -> tuple[str, ...]:
    unique: dict[str, None] = {}
    for docstring in docstrings(split):
        for paragraph in re.split(r"\n\s*\n", docstring):
            # The break of a line inside a paragraph is layout; a full stop before a capital ends
            # a sentence.
            flat = " ".join(paragraph.split())
            for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", flat):
                if _is_sentence(sentence):
                    unique[sentence] = None
    return tuple(unique)


# Letters, digits and the punctuation of prose. Code, mark-up and signatures have other characters.
_PROSE = re.compile(r"[A-Z][A-Za-z0-9 ,;:'\"()-]+[.!?]")


def _is_sentence(text: str) -> bool:
    words = text.split()
    return (
        6 <= len(words) <= 48
        and _PROSE.fullmatch(text) is not None
        and "  " not in text
        and "::" not in text
        and "()" not in text
        and text.count("(") == text.count(")")
        and text.count('"') % 2 == 0
        # Prose has mostly small words of letters; a table or a list of names does not.
        and sum(word.strip(",;:'\"().!?-").islower() for word in words) >= 0.6 * len(words)
    )


def _names(library: Path) -> list[str]:
    names: list[str] = []
    for folder, subfolders, files in os.walk(library):
        # Pruned here, so that the walk does not enter site-packages.
        subfolders[:] = [name for name in subfolders if _is_wanted(name)]
        relative = Path(folder).relative_to(library)
        names += [
            (relative / name).as_posix()
            for name in files
            if name.endswith(".py") and _is_wanted(name)
        ]
    return sorted(names)


def _is_wanted(name: str) -> bool:
    return name not in _SKIPPED_FOLDERS and not name.startswith(_SKIPPED_PREFIXES)


def _read(path: Path, name: str) -> str:
    """The text of a file; of the documentation table its pages, parted by form feeds."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:  # a few old files declare another encoding
        return ""
    if name != _DOCUMENTATION_TABLE:
        return text
    strings = [
        value.value
        for node in ast.walk(_parse(text))
        if isinstance(node, ast.Dict)
        for value in node.values
        if isinstance(value, ast.Constant) and isinstance(value.value, str)
    ]
    return "\n\f\n".join(strings)


def _parse(text: str) -> ast.Module:
    with warnings.catch_warnings():  # old escapes in the library's own strings
        warnings.simplefilter("ignore")
        return ast.parse(text)


def main() -> None:
    """Prints how much text there is."""
    for split in SPLITS:
        found = documents(split)
        characters = sum(len(document.text) for document in found)
        print(
            f"{split:>10}: {len(found):4d} files, {characters / 1e6:5.2f} M characters, "
            f"{len(_sentences(split)):5d} sentences"
        )
    print("\nSome sentences:")
    for sentence in sentences(limit=8):
        print(f"  {sentence}")


if __name__ == "__main__":
    main()
