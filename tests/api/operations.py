"""The operations that a call runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


def operations(run: Callable[[], object]) -> list[str]:
    """The names of the operators that a call dispatches, in order."""
    names: list[str] = []

    class Listens(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
        ) -> Any:
            names.append(func._schema.name.partition("::")[2])
            return func(*args, **(kwargs or {}))

    with Listens():
        run()
    return names
