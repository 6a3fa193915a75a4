"""The tables by which Hugging Face models know their tied weights follow the rewriting.

transformers ties weights, and leaves copies out of its files, by the names in
``_tied_weights_keys`` and ``all_tied_weights_keys``: of a parameter → of the one that it shares.
Once a weight is factorized the names are those of its cores. transformers itself is not needed.
"""

from __future__ import annotations

import re
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
        dense = _dense(module)
        for name in _TABLES:
            table = getattr(type(module), name, None) if dense[name] is None else dense[name]
            if not isinstance(table, dict):
                continue
            now = _renamed(module, table, dense[_TABLES[1]] or {}, names_now)
            if now != table:
                setattr(module, _DENSE, dense)
                setattr(module, name, now)


def add(model: nn.Module, same: Mapping[str, str]) -> None:
    """Write further ties into the tables: name of a parameter → of the one that it is."""
    if not same:
        return
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        inside = {
            target.removeprefix(prefix): source.removeprefix(prefix)
            for target, source in same.items()
            if target.startswith(prefix) and source.startswith(prefix)
        }
        if not inside or not hasattr(type(module), _TABLES[0]):
            continue
        setattr(module, _DENSE, _dense(module))
        for name in _TABLES:
            table = getattr(module, name, None)
            if table is None or isinstance(table, dict):
                setattr(module, name, {**(table or {}), **inside})


def undo(model: nn.Module) -> None:
    """The tables of the dense model again."""
    for module in model.modules():
        if _DENSE not in vars(module):
            continue
        for name, table in _dense(module).items():
            if table is not None:
                setattr(module, name, table)
            elif name in vars(module):
                delattr(module, name)
        delattr(module, _DENSE)


def _dense(module: nn.Module) -> dict[str, Any]:
    """The dense model's tables where they are not those of the class, None for the others."""
    own = vars(module)  # a wrapper answers for the module inside
    return own.get(_DENSE) or {name: own.get(name) for name in _TABLES}


def _renamed(
    module: nn.Module, table: Mapping[str, str], expanded: Mapping[str, str], names_now: NamesNow
) -> dict[str, str]:
    """The same ties between what is there now; ``expanded`` are those of the dense parameters.

    Cores are tied where they are really shared: one weight of the two may have been untied. An
    entry may be a pattern, or the name of a module: it gives way to names where one of its two
    sides was factorized by its name, and stays as it is else.
    """
    result: dict[str, str] = {}
    for target, source in table.items():
        before = _plain(target), _plain(source)
        if (*names_now(module, before[0]), *names_now(module, before[1])) == before:
            result[target] = source
            continue
        meant = [
            (one, other)
            for one, other in expanded.items()
            if re.search(f"^{target}", one) and re.search(f"^{source}", other)
        ]
        for one, other in meant or [before]:
            targets, sources = names_now(module, one), names_now(module, other)
            if len(targets) == len(sources) == 1:
                result[targets[0]] = sources[0]
                continue
            shared = {id(_parameter(module, name)): name for name in sources}
            for name in targets:
                parameter = _parameter(module, name)
                if parameter is None:  # ties are turned off, and the pattern means nothing
                    result[target] = source
                elif id(parameter) in shared:
                    result[name] = shared[id(parameter)]
    return result


def _parameter(module: nn.Module, name: str) -> nn.Parameter | None:
    try:
        return module.get_parameter(name)
    except AttributeError:
        return None


def _plain(entry: str) -> str:
    """The name that an entry is, where it is a pattern that only marks a name's ends and dots."""
    return entry.removeprefix("^").removesuffix("$").replace("\\.", ".")
