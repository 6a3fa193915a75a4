"""Objects that others hold, in attributes, containers, closures, methods: put others there.

Nothing that is held is changed: what holds an object that gives way is made anew, with the other in
its place, and all else stays the very object that it is.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

from tensorize.base.dynamo import compiled_again, what_was_compiled

_PLAIN = (str, bytes, int, float, complex, bool, type(None), type, ModuleType, BuiltinFunctionType)
_REGISTERED = ("_parameters", "_buffers", "_modules")


def replace_held(model: nn.Module, other: Callable[[Any], Any]) -> None:
    """Let a model's modules hold other objects than now, wherever they are not registered.

    Args:
        model: attributes and hooks of its modules are looked into, containers, functions with what
            they close over, bound methods and objects of any class inside; not other modules.
        other: an object → what is to be held in its place, itself where it stays.
    """
    held = _Held(other)
    for module in model.modules():
        own = vars(module)
        for name, value in list(own.items()):
            if name in _REGISTERED:
                continue
            if name.endswith("_hooks") and isinstance(value, dict):  # handles know the dict
                for key, hook in value.items():
                    value[key] = held.instead(hook)
            elif (new := held.instead(value)) is not value:
                own[name] = new


class _Held:
    """One look through what is held: each object is looked at once, cycles included."""

    def __init__(self, other: Callable[[Any], Any]) -> None:
        self._other = other
        self._known: dict[int, tuple[Any, Any]] = {}  # by id: the object, so that it stays, and new

    def instead(self, value: Any) -> Any:
        """What is to be held in the place of a value."""
        if isinstance(value, _PLAIN):
            return value
        if id(value) in self._known:
            return self._known[id(value)][1]
        new = self._other(value)
        self._known[id(value)] = value, new
        if new is value and not isinstance(value, Tensor | nn.Module):
            new = self._made_anew(value)
            self._known[id(value)] = value, new
        return new

    def _made_anew(self, value: Any) -> Any:
        if isinstance(value, FunctionType):
            return self._function(value)
        if isinstance(value, CellType):
            return self._cell(value)
        if isinstance(value, MethodType):
            owner, function = self.instead(value.__self__), self.instead(value.__func__)
            same = owner is value.__self__ and function is value.__func__
            return value if same else MethodType(function, owner)
        if isinstance(value, functools.partial):
            parts = value.func, value.args, value.keywords
            new = tuple(map(self.instead, parts))
            if _same(parts, new):
                return value
            twin = functools.partial(new[0], *new[1], **new[2])
            vars(twin).update(vars(value))
            return twin
        if isinstance(value, dict):
            new = {key: self.instead(each) for key, each in value.items()}
            return value if _same(value.values(), new.values()) else _filled(value, new)
        if isinstance(value, list | tuple):
            new = [self.instead(each) for each in value]
            if _same(value, new):
                return value
            if isinstance(value, list):
                return _filled(value, new)
            return type(value)(*new) if hasattr(value, "_fields") else type(value)(new)
        return self._object(value)

    def _object(self, value: Any) -> Any:
        try:
            own = object.__getattribute__(value, "__dict__")
        except AttributeError:
            return value
        new = {name: self.instead(each) for name, each in own.items()}
        if _same(own.values(), new.values()):
            return value
        twin = copy.copy(value)
        vars(twin).update(new)
        return twin

    def _function(self, value: Any) -> Any:
        inner = what_was_compiled(value)
        if inner is not None:
            new = self.instead(inner)
            return value if new is inner else compiled_again(value, new)
        parts = value.__closure__, value.__defaults__, value.__kwdefaults__, vars(value)
        new = tuple(map(self.instead, parts))
        if _same(parts, new):
            return value
        itself = CellType()  # for a function that names itself
        cells = tuple(itself if _holds(cell, value) else cell for cell in new[0] or ())
        twin = FunctionType(value.__code__, value.__globals__, value.__name__, new[1], cells)
        itself.cell_contents = twin
        twin.__kwdefaults__, twin.__qualname__ = new[2], value.__qualname__
        twin.__doc__, twin.__module__ = value.__doc__, value.__module__
        vars(twin).update(new[3])
        return twin

    def _cell(self, cell: CellType) -> CellType:
        if _is_empty(cell):
            return cell
        new = self.instead(cell.cell_contents)
        return cell if new is cell.cell_contents else CellType(new)


def _is_empty(cell: CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return True
    return False


def _holds(cell: CellType, value: Any) -> bool:
    return not _is_empty(cell) and cell.cell_contents is value


def _same(one: Any, other: Any) -> bool:
    return all(a is b for a, b in zip(one, other, strict=True))


def _filled(value: Any, items: Any) -> Any:
    """A container of the same class, with other items."""
    twin = copy.copy(value)
    if isinstance(twin, list):
        twin[:] = items
    else:
        twin.update(items)
    return twin
