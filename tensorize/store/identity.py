"""A hash of all that something computes with, by content: code, constants, attributes, data.

Nothing is told by ``repr``, which abbreviates, or by where it lies in memory: equal models have
equal hashes in two processes. Libraries go by their version; what is the caller's own, by its code
and by all that this names: closures, defaults, globals. What cannot be looked into (a generator, an
object of C) raises ``Opaque``.
"""

from __future__ import annotations

import contextlib
import copyreg
import dis
import functools
import hashlib
import logging
import sys
import threading
import types
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tensorize.base.tensors import plain_parts, raw_bytes
from tensorize.ir.sites import Batch

_ATOMS = (type(None), bool, int, float, complex, str, bytes, type(...), type(NotImplemented))
_BY_NAME = (torch.dtype, torch.device, torch.layout, torch.memory_format, np.dtype)
_BY_NAME += (types.GenericAlias, types.UnionType)
_EMPTY = (type(threading.Lock()), type(threading.RLock()))
_DESCRIPTORS = (
    types.WrapperDescriptorType,
    types.MethodDescriptorType,
    types.ClassMethodDescriptorType,
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
)
# What a class has beside its own code and constants; some of it in no certain order.
_OF_CLASSES = {"__dict__", "__weakref__", "__doc__", "__module__", "__annotations__"}
_OF_CLASSES |= {"__firstlineno__", "__static_attributes__", "_abc_impl", "__orig_bases__"}
_OF_CLASSES |= {"__annotate__", "__annotate_func__", "__annotations_cache__", "__parameters__"}
_OF_CLASSES |= {"__slotnames__"}
# What a module has beside what it computes with: modes, ours, and what is told by itself.
_OF_MODULES = {"training", "_tensorize", "_parameters", "_buffers", "_modules"}
_OF_MODULES |= {"_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks"}
_OF_MODULES |= {"_load_state_dict_post_hooks", "_is_full_backward_hook", "_compiled_call_impl"}
# Where a configuration of transformers comes from.
_OF_CONFIGURATIONS = {"_name_or_path", "_commit_hash", "transformers_version"}
_OF_CONFIGURATIONS |= {"_original_object_hash"}
_OWN_OPERATIONS = ("aten", "prim", "prims")
_LOADS = ("LOAD_GLOBAL", "LOAD_NAME")


class Opaque(Exception):
    """What something holds cannot be told: ``args`` is one sentence that says of what."""


def content(*values: Any) -> str:
    """A hash of values, models and batches among them.

    A model's parameters count by their names, ties and hooks: ``fingerprint`` is of their values.

    Raises:
        Opaque: what one of them holds cannot be told.
    """
    walk = _Walk()
    for value in values:
        if isinstance(value, nn.Module):
            walk.take_parameters(value)
    try:
        return _hash("all", *(walk.digest(value) for value in values)).hex()
    except RecursionError:
        raise Opaque(f"{walk.place} is nested too deeply") from None


def _hash(kind: str, *parts: str | bytes | memoryview) -> bytes:
    digest = hashlib.sha256(kind.encode())
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.digest()


class _Walk:
    """One walk through values. Objects are looked at once; ``alive`` keeps their ids their own."""

    def __init__(self) -> None:
        self.done: dict[int, bytes] = {}
        self.above: dict[int, int] = {}
        self.alive: list[Any] = []
        self.names: list[str] = []

    def take_parameters(self, model: nn.Module) -> None:
        """Know the parameters of a model by their names."""
        for name, parameter in model.named_parameters():
            hooks = list((getattr(parameter, "_backward_hooks", None) or {}).values())
            self.done[id(parameter)] = _hash("parameter", name, self.digest(hooks))
            self.alive.append(parameter)

    @property
    def place(self) -> str:
        return ".".join(self.names) or "it"

    @contextlib.contextmanager
    def inside(self, name: object) -> Iterator[None]:
        self.names.append(str(name))
        yield
        self.names.pop()

    def digest(self, value: Any) -> bytes:
        kind = type(value)
        if kind in _ATOMS:
            return _hash(kind.__name__, repr(value))
        if kind in (list, tuple) and all(type(item) in _ATOMS for item in value):
            return _hash(kind.__name__, repr(value))
        if kind is tuple:
            return self._many("tuple", value)
        known = self.done.get(id(value))
        if known is not None:
            return known
        if id(value) in self.above:
            return _hash("above", str(len(self.above) - self.above[id(value)]))
        self.above[id(value)] = len(self.above)
        self.alive.append(value)
        found = self._object(value)
        del self.above[id(value)]
        self.done[id(value)] = found
        return found

    def _many(self, kind: str, values: Any) -> bytes:
        return _hash(kind, *(self.digest(value) for value in values))

    def _named(self, kind: str, values: Mapping[Any, Any]) -> bytes:
        parts = []
        for key, value in values.items():
            with self.inside(key):
                parts += [self.digest(key), self.digest(value)]
        return _hash(kind, *parts)

    def _object(self, value: Any) -> bytes:
        kind = type(value)
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, np.ndarray | np.generic):
            return self._array(value)
        if isinstance(value, nn.Module):
            return self._module(value)
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, Batch):
            arguments = dict(sorted(value.kwargs.items()))
            return _hash("batch", self.digest(value.args), self.digest(arguments))
        if kind in (list, dict, types.MappingProxyType):
            return self._many("list", value) if kind is list else self._named("dict", value)
        if kind in (set, frozenset):
            return _hash(kind.__name__, *sorted(self.digest(item) for item in value))
        if isinstance(value, _BY_NAME) or kind.__module__ == "typing":
            return _hash(kind.__name__, str(value))
        if kind in _EMPTY or isinstance(value, logging.Logger):
            return _hash(kind.__name__)
        if isinstance(value, torch.Generator):
            return _hash("generator", str(value.device), raw_bytes(value.get_state()))
        if isinstance(value, weakref.ref):
            return _hash("reference", self.digest(value()))
        return self._callable(value) or self._instance(value)

    # --------------------------------------------------------------------------------- numbers

    def _tensor(self, tensor: Tensor) -> bytes:
        if tensor.layout in (torch.sparse_coo,):
            whole = tensor.detach().coalesce()
            return self._many("sparse", [tuple(whole.shape), whole.indices(), whole.values()])
        if tensor.layout != torch.strided:
            raise Opaque(f"{self.place} is a tensor laid out as {tensor.layout}")
        about = f"{type(tensor).__name__} {tensor.dtype} {tuple(tensor.shape)}"
        if tensor.is_meta:
            return _hash("tensor", about)
        plain = (part.detach().resolve_conj().resolve_neg() for part in plain_parts(tensor))
        return _hash("tensor", about, *(raw_bytes(part) for part in plain))

    def _array(self, array: Any) -> bytes:
        about = f"{array.dtype.descr} {array.shape}"
        if array.dtype.hasobject:
            return _hash("array", about, self._many("entries", np.asarray(array).ravel().tolist()))
        mask = b""
        if isinstance(array, np.ma.MaskedArray):
            mask = np.ma.getmaskarray(array).tobytes()
        return _hash("array", about, mask, np.asarray(array).tobytes())

    # --------------------------------------------------------------------------------- modules

    def _module(self, module: nn.Module) -> bytes:
        parts = [self._class(type(module))]
        for name, value in (*module._parameters.items(), *module._buffers.items()):
            with self.inside(name):
                parts += [self.digest(name), self.digest(value)]
        parts.append(self._named("modules", module._modules))
        state = {k: v for k, v in vars(module).items() if k not in _OF_MODULES}
        for name, value in sorted(state.items()):
            # Hooks are numbered by a counter of the process.
            hooks = name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called"))
            with self.inside(name):
                held = list(value.values()) if hooks else value
                parts += [self.digest(name), self.digest(held)]
        return _hash("module", *parts)

    # ------------------------------------------------------------------------------------ code

    def _callable(self, value: Any) -> bytes | None:
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, types.MethodType):
            return self._many("method", [value.__func__, value.__self__])
        if isinstance(value, staticmethod | classmethod):
            return self._many(type(value).__name__, [value.__func__])
        if isinstance(value, property):
            return self._many("property", [value.fget, value.fset, value.fdel])
        if isinstance(value, functools.cached_property):
            return self._many("property", [value.func])
        if isinstance(value, types.ModuleType):
            return _hash("package", value.__name__, str(_version(value.__name__)))
        if isinstance(value, _DESCRIPTORS):
            return _hash("descriptor", value.__objclass__.__qualname__, value.__name__)
        if isinstance(value, types.BuiltinFunctionType):
            owner = value.__self__
            module = owner is None or isinstance(owner, types.ModuleType)
            own = _hash("none") if module else self.digest(owner)
            return _hash("builtin", str(value.__module__), value.__qualname__, own)
        if isinstance(value, types.CodeType):
            return self._code(value)
        return None

    def _function(self, function: types.FunctionType) -> bytes:
        version = _version(function.__module__)
        if version is not None and _found_by_name(function) is function:
            return _hash("function", function.__module__, function.__qualname__, version)
        cells = [_in_cell(cell) for cell in function.__closure__ or ()]
        parts = [self._code(function.__code__)]
        with self.inside(function.__qualname__):
            for own in (function.__defaults__, function.__kwdefaults__, cells, vars(function)):
                parts.append(self.digest(own))
            if version is None:
                loaded, taken = _names_in(function.__code__)
                for name in sorted(loaded & function.__globals__.keys()):
                    with self.inside(name):
                        value = function.__globals__[name]
                        parts += [self.digest(name), self._global(value, sorted(taken))]
        return _hash("function", *parts)

    def _global(self, value: Any, names: list[str]) -> bytes:
        """What a name stands for; of a package, also what code takes out of it by these names."""
        if not isinstance(value, types.ModuleType):
            return self.digest(value)
        own = vars(value)
        taken = {name: own[name] for name in names if name in own}
        if _version(value.__name__) is not None:
            taken = {name: each for name, each in taken.items() if _is_own_code(each)}
        return _hash("package", self.digest(value), self._named("taken", taken))

    def _code(self, code: types.CodeType) -> bytes:
        words = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
        counts = (code.co_argcount, code.co_kwonlyargcount, code.co_posonlyargcount, code.co_flags)
        consts = self._many("constants", code.co_consts)
        return _hash("code", code.co_code, code.co_exceptiontable, repr((words, counts)), consts)

    def _class(self, kind: type) -> bytes:
        known = self.done.get(id(kind))
        if known is not None:
            return known
        name, version = f"{kind.__module__}.{kind.__qualname__}", _version(kind.__module__)
        members = {n: each for n, each in vars(kind).items() if n not in _OF_CLASSES}
        if version is not None:  # but for methods that were put in place of its own
            members = {n: each for n, each in members.items() if _is_own_code(each)}
        self.done[id(kind)] = _hash("class", name)  # where it names itself
        self.alive.append(kind)
        with self.inside(name):
            bases = [self._class(base) for base in kind.__bases__ if base is not object]
            found = _hash("class", name, str(version), *bases, self._named("members", members))
        self.done[id(kind)] = found
        return found

    # ----------------------------------------------------------------------------------- others

    def _instance(self, value: Any) -> bytes:
        """Any other object: its class, and its state as it is pickled and as it is held."""
        kind = type(value)
        if hasattr(value, "_qualified_op_name") or kind.__module__ == "torch._ops":
            name = str(value)
            if name.partition(".")[0].partition("::")[0] in _OWN_OPERATIONS:
                return _hash("operation", name)
            raise Opaque(f"{self.place} is the operation {name}")
        try:
            reducer = copyreg.dispatch_table.get(kind)
            reduced: Any = value.__reduce_ex__(2) if reducer is None else reducer(value)
        except Exception as error:  # pickling raises whatever an object says that cannot be
            raise Opaque(f"{self.place} is a {kind.__module__}.{kind.__qualname__}") from error
        if isinstance(reduced, str):  # a name, and no content
            wrapped = getattr(value, "__wrapped__", None)
            if wrapped is None and _version(kind.__module__) is None:
                raise Opaque(f"{self.place} is a {kind.__module__}.{kind.__qualname__}")
            return _hash("name", reduced, self.digest(wrapped))
        filled: tuple[Any, ...] = (*reduced, None, None, None)
        make, arguments, state, items, pairs = filled[:5]
        held: Any = object.__getstate__(value)
        if kind.__module__.partition(".")[0] == "transformers" and isinstance(held, dict):
            drop = _OF_CONFIGURATIONS
            held = {k: v for k, v in held.items() if k not in drop}
            state = {k: v for k, v in state.items() if k not in drop} if state else state
        parts = [self._class(kind), self.digest(make), self.digest(arguments)]
        for each in (state, held, list(items or ()), list(pairs or ())):
            parts.append(self._named("state", each) if type(each) is dict else self.digest(each))
        return _hash("object", *parts)


def _in_cell(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return NotImplemented


def _names_in(code: types.CodeType) -> tuple[set[str], set[str]]:
    """The names that code looks up, and all those that it takes out of something."""
    loads = (i.argval for i in dis.get_instructions(code) if i.opname in _LOADS)
    loaded, taken = {*loads}, {*code.co_names}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            inner = _names_in(constant)
            loaded, taken = loaded | inner[0], taken | inner[1]
    return loaded, taken


def _found_by_name(function: types.FunctionType) -> Any:
    """What a function's module has under its name."""
    found: Any = sys.modules.get(function.__module__)
    for name in function.__qualname__.split("."):
        found = getattr(found, name, None)
    return found


def _is_own_code(value: Any) -> bool:
    """Whether it is a function of the caller's, such as was put into a library."""
    value = getattr(value, "__func__", value)
    return isinstance(value, types.FunctionType) and _version(value.__module__) is None


def _version(module: str | None) -> str | None:
    """The version of the library that a module is of; None for the caller's own code."""
    return None if module is None else _version_of(module.partition(".")[0])


@functools.cache
def _version_of(package: str) -> str | None:
    if package in sys.stdlib_module_names:
        return None if package == "__main__" else sys.version
    home = sys.modules.get(package)
    version = getattr(home, "__version__", None)
    file = getattr(home, "__file__", None)
    installed = file is not None and {"site-packages", "dist-packages"} & {*Path(file).parts}
    return str(version) if version is not None and (installed or package == "tensorize") else None
