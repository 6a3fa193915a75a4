"""The tables by which Hugging Face models know their tied weights follow the rewriting.

transformers ties weights, and leaves copies out of its files, by the names in
``_tied_weights_keys`` and ``all_tied_weights_keys``: of a parameter → of the one that it shares.
Once a weight is factorized the names are those of its cores. transformers itself is not needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

NamesNow = Callable[[nn.Module, str], tuple[str, ...]]

_TABLES = ("_tied_weights_keys", "all_tied_weights_keys")
_DENSE = "_dense_ties"


def follow(model: nn.Module, names_now: NamesNow) -> None:
    """Write the tables anew; ``names_now(module, name)`` are the parameters behind a dense name."""
    for module in model.modules():
        if not hasattr(type(module), _TABLES[0]):
            continue
        own: dict[str, Any] = module.__dict__
        dense = own.get(_DENSE) or {name: own.get(name) for name in _TABLES}
        for name in _TABLES:
            table = getattr(type(module), name, None) if dense[name] is None else dense[name]
            if not isinstance(table, dict):
                continue
            now = _renamed(module, table, names_now)
            if now != table:
                own[_DENSE], own[name] = dense, now


def undo(model: nn.Module) -> None:
    """The tables of the dense model again."""
    for module in model.modules():
        for name, table in module.__dict__.pop(_DENSE, {}).items():
            if table is None:
                module.__dict__.pop(name, None)
            else:
                module.__dict__[name] = table


def _renamed(module: nn.Module, table: Mapping[str, str], names_now: NamesNow) -> dict[str, str]:
    """The same ties between what is there now; patterns stay as they are.

    Cores are tied where they are really shared: one weight of the two may have been untied.
    """
    result: dict[str, str] = {}
    for target, source in table.items():
        # An entry may be a pattern; one that only marks the end of a name is that name.
        targets = names_now(module, target.removesuffix("$"))
        sources = names_now(module, source.removesuffix("$"))
        if (*targets, *sources) == (target.removesuffix("$"), source.removesuffix("$")):
            result[target] = source
            continue
        if len(targets) == len(sources) == 1:
            result[targets[0]] = sources[0]
            continue
        shared = {id(module.get_parameter(name)): name for name in sources}
        for name in targets:
            if id(module.get_parameter(name)) in shared:
                result[name] = shared[id(module.get_parameter(name))]
    return result
