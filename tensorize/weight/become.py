"""A module becomes one of another class, and stays the object that it is.

Hooks, references and the name in the model belong to the object, so a module that takes cores in
place of its weight is not replaced by a new one. The class of a module is changed here only.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from abc import ABCMeta
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn


def become(owner: nn.Module, kind: type[nn.Module], **state: Any) -> None:
    """Let a module be one of class ``kind``, with these attributes.

    The class that it has in the dense model stays known, as ``_dense_class``, until it is that
    class again.
    """
    dense = dense_class(owner)
    vars(owner).pop("_dense_class", None)
    owner.__class__ = kind
    if kind is not dense:  # a class may have a ``__setattr__`` that knows its own names only
        object.__setattr__(owner, "_dense_class", dense)
    for name, value in state.items():
        setattr(owner, name, value)


def redefine(owner: nn.Module, kind: type[nn.Module]) -> None:
    """Let a module be one of class ``kind`` in the dense model, too."""
    owner.__class__ = kind


def dense_class(owner: nn.Module) -> type[nn.Module]:
    """The class that a module has in the dense model."""
    return getattr(owner, "_dense_class", unsharded_class(type(owner)))


def unsharded_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The class that ``fully_shard`` derived another one from, or that class itself."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # else nothing is sharded by it
    if fsdp is None or not issubclass(kind, fsdp.FSDPModule):
        return kind
    return kind.__mro__[2]  # after the derived one, and FSDPModule


def become_dense(owner: nn.Module) -> None:
    """Undo ``become``: what the class of now declares goes, where the dense class does not."""
    dense = dense_class(owner)
    for name in _declared(type(owner)) - _declared(dense):
        vars(owner).pop(name, None)
        owner._modules.pop(name, None)
        owner._buffers.pop(name, None)
    become(owner, dense)


def _declared(kind: type) -> set[str]:
    return {name for base in kind.__mro__ for name in inspect.get_annotations(base)}


@contextlib.contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Undo every change of modules, their classes and their state if the body fails."""
    before = [
        (module, type(module), dict(vars(module)), [_shallow(v) for v in vars(module).values()])
        for module in model.modules()
    ]
    try:
        yield
    except BaseException:
        for module, kind, state, containers in before:
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(state)
            for live, items in containers:
                if items is not None:
                    live.clear()
                    live.extend(items) if isinstance(live, list) else live.update(items)
        raise


def _shallow(value: Any) -> tuple[Any, Any]:
    """A container of a module's state and a copy of it, None for everything else."""
    kind = type(value)
    return value, kind(value) if kind in (dict, OrderedDict, list, set) else None


# ------------------------------------------------------------------- classes made while running


@dataclass(frozen=True)
class _Made:
    """What pickle is to write for a class that is made while the program runs: the call."""

    make: Callable[..., type[nn.Module]]
    arguments: tuple[Any, ...]

    def __reduce__(self) -> tuple[Any, ...]:
        return self.make, self.arguments


def subclass(
    base: type[nn.Module], body: dict[str, Any], make: Callable[..., Any], *arguments: Any
) -> type[nn.Module]:
    """A class that shows itself as ``base``; modules of it can be pickled.

    A call of it makes a ``base``: what a module makes of its own class (``self.__class__(…)``) is
    nothing of ours.

    Args:
        base: what it is derived from.
        body: its own methods and attributes.
        make, arguments: the call that makes the class, of a function that pickle finds by name.
    """
    written = (vars(a).get("_made", a) if isinstance(a, type) else a for a in arguments)
    shown = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
    own = {"_made": _Made(make, tuple(written)), "__reduce_ex__": _reduce, "__new__": _anew}
    kind = type(base)
    own["_base"] = base
    create: Any = ABCMeta.__new__ if issubclass(kind, ABCMeta) else type.__new__
    bases = (base,) if issubclass(base, _Unregistered) else (_Unregistered, base)
    return create(kind, base.__name__, bases, {**shown, **own, **body})


class _Unregistered(nn.Module):
    """Stands before a class of the caller's, so that no ``__init_subclass__`` of theirs is run.

    Nor is a metaclass of theirs: a registry of their classes is to know none of ours.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        """Nothing to do."""


def _anew(kind: Any, *args: Any, **kwargs: Any) -> nn.Module:
    return kind._base(*args, **kwargs)


def _reduce(owner: Any, protocol: int) -> tuple[Any, ...]:
    return _empty, (owner._made,), owner.__getstate__()


def _empty(kind: type[nn.Module]) -> nn.Module:
    """For pickle and deepcopy, which fill it."""
    return object.__new__(kind)
