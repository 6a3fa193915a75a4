"""One part, run in one tree: ``python -m same.probe PART FOUND.json OLD``.

FOUND.json gets what came out, by name. OLD is the folder in which the older tree ran ``write``, and
from which ``read`` starts. The working directory is scratch space; its siblings are those of
other runs of the comparison.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from . import compressed, interface, older, running
from .put import FOUND, TOLD, put, said, tree

PARTS: dict[str, Callable[[], None]] = {
    "interface": interface.names_and_errors,
    "command": interface.command_line,
    "gpt": compressed.gpt,
    "llama": compressed.llama,
    "minilm": compressed.minilm,
    "kinds": compressed.kinds,
    "others": compressed.others,
    "trains": running.trains,
    "compiled": running.compiled,
    "inductor": running.inductor,
    "interpreted": running.interpreted,
    "write": older.write,
}


@contextlib.contextmanager
def heard() -> Iterator[None]:
    """Put down what was logged and warned of on the way."""
    lines: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(said(f"{record.levelname} {record.getMessage()}"))

    logger = logging.getLogger("tensorize")
    logger.addHandler(Listener())
    logger.setLevel(logging.INFO)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    put("logged", "\n".join(lines))
    said_of = [f"{w.category.__name__}: {w.message}" for w in caught]
    put("warned", "\n".join(dict.fromkeys(said_of)))


def main() -> None:
    part, out, old = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    if str(tree()) != sys.path[0]:
        raise SystemExit(f"tensorize comes from {tree()}, not from {sys.path[0]}")
    torch.manual_seed(0)
    with heard():
        if part == "read":
            older.read(old)
        else:
            PARTS[part]()
    out.write_text(json.dumps({"same": FOUND, "told": TOLD}))


if __name__ == "__main__":
    main()
