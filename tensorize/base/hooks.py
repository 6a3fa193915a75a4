"""Run something once another module is imported, without importing it ourselves."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import logging
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

log = logging.getLogger("tensorize")


def when_imported(name: str, ours: str | Callable[[], None]) -> None:
    """Import our module ``ours``, or call it: now if ``name`` is there already, else once it is."""
    if name in sys.modules:
        _import(ours)
    else:
        sys.meta_path.insert(0, _Finder(name, ours))


def _import(ours: str | Callable[[], None]) -> None:
    try:
        if isinstance(ours, str):
            importlib.import_module(ours)
        else:
            ours()
    except (ImportError, AttributeError) as error:  # a version of it that we do not know
        log.warning("%s is not available: %s", ours, error)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one module as ever, and imports ours once it has run."""

    def __init__(self, name: str, ours: str | Callable[[], None]) -> None:
        self._name, self._ours, self._asking = name, ours, False

    def find_spec(
        self, fullname: str, path: Any, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._name or self._asking:
            return None
        self._asking = True  # the finders behind this one
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._asking = False
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_follow(module: ModuleType) -> None:
            run(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            _import(self._ours)

        spec.loader.exec_module = run_and_follow  # type: ignore[method-assign]
        return spec
