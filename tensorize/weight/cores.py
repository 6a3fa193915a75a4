"""Cores that stand for a parameter of an owner that keeps its own forward."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.module import _has_any_global_hook

from tensorize.base.errors import TensorizeError
from tensorize.capture.matmul import Frame
from tensorize.formats.registry import format_of
from tensorize.ir.spec import Spec
from tensorize.weight.become import become, subclass
from tensorize.weight.contractions import Contractions, contractions
from tensorize.weight.lazy import FactoredWeight, cannot_be_assigned


def refuse_to_be_scripted(module: nn.Module) -> nn.Module:
    """What ``torch.jit.script`` asks of every module, before it changes anything.

    Raises:
        TensorizeError: always.
    """
    raise TensorizeError(
        f"torch.jit.script reads Python's text, and a {type(module).__name__} chooses what to run "
        "while it runs",
        way_out="torch.jit.trace(model, inputs) and torch.export.export(model, inputs) work; so "
        "does torch.jit.script(tensorize.densify(model)), with dense weights",
    )


class Cores(nn.Module):
    """The cores of one weight, as parameters ``core_0``, ``core_1``, … in the stored shapes.

    Indices that its spec has are buffers, by their names.

    ``frame`` says how the owner sees the matrix (a convolution in its own shape); ``breakpoints``
    are the batches at which another order of contraction begins, in this and in all weights of the
    model (None: nothing is known of the others). ``memory_limit``: see ``limit_saved``.
    """

    spec: Any  # of the class that its format has
    frame: Frame
    contractions: Contractions
    kernels: Mapping[str, Any] | None = None
    breakpoints: tuple[int, ...] | None = None
    memory_limit: int | None = None
    order: Tensor
    _names: tuple[tuple[str, ...], tuple[str, ...]]

    def __init__(self, spec: Spec, cores: Sequence[Tensor], frame: Frame | None = None) -> None:
        super().__init__()
        self.frame = frame or Frame()
        self.resize(spec, cores)

    def forward(self) -> FactoredWeight:
        cores = tuple(getattr(self, f"core_{k}") for k in range(len(self.spec.core_shapes)))
        if isinstance(cores[0], fx.Proxy):  # a graph calls this module, and hands on what it gives
            tracer: Any = cores[0].tracer
            return tracer.create_proxy("call_module", tracer.path_of_module(self), (), {})
        indices = tuple(getattr(self, index.name) for index in self.spec.indices)
        return FactoredWeight(self.spec, cores, self.frame, self.contractions, indices=indices)

    __prepare_scriptable__ = refuse_to_be_scripted

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """x Wᵀ + bias by products of integers, where these are what is to be done."""
        spec, parameters, buffers = self.spec, self._parameters, self._buffers
        if spec.precision is None or torch.is_autocast_enabled("cpu"):
            return None
        cores: list[Any] = [parameters.get(name) for name in self._names[0]]
        form: Any = format_of(spec)
        held = cores + [buffers.get(name) for name in self._names[1]]
        plain = type(cores[0]) is nn.Parameter and cores[0].dtype is x.dtype
        if not plain or not form.in_integers(spec, held, x, "columns"):
            return None
        return form.multiply(spec, held, x, "columns", bias)

    def resize(self, spec: Spec, cores: Sequence[Tensor]) -> None:
        """Take other cores, and the indices that may come after them."""
        self.spec, count = spec, len(spec.core_shapes)
        for k, core in enumerate(cores[:count]):
            self.register_parameter(f"core_{k}", core)  # type: ignore[arg-type]
        keep_indices(self, spec, cores[count:])
        names = tuple(f"core_{k}" for k in range(count))
        self._names = names, tuple(index.name for index in spec.indices)
        self._choose_orders()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Cores:
        super()._apply(fn, recurse)
        if "core_0" in self._parameters:
            self._choose_orders()  # for another device or dtype they may be others
        return self

    def __getstate__(self) -> dict[str, Any]:
        # The contractions are compiled functions: they are found again by the spec.
        return {k: v for k, v in vars(self).items() if k != "contractions"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._choose_orders()

    def _choose_orders(self) -> None:
        core = self.get_parameter("core_0")
        how = str(core.device), core.dtype, self.breakpoints, self.memory_limit
        planned = contractions(self.spec, *how)
        kernels = self.kernels if self.memory_limit is None else None
        self.contractions = (
            {k: v.beside(planned) for k, v in kernels.items()} if kernels else planned
        )

    def extra_repr(self) -> str:
        return repr(self.spec)


_INDEX = re.compile(r"order|(codes|zeros|kept)_\d+")


def keep_indices(module: nn.Module, spec: Spec, indices: Sequence[Tensor]) -> None:
    """Let a module hold the indices of a spec as its buffers, and no others.

    Copies: tools know of parameters that several modules hold, and not of buffers.
    """
    for name in [name for name in module._buffers if _INDEX.fullmatch(name)]:
        del module._buffers[name]
    for index, values in zip(spec.indices, indices, strict=True):
        module.register_buffer(index.name, values.clone())


def _is_bare(holder: Any) -> TypeGuard[Cores]:
    """Whether a call of what holds cores is nothing but its own: no hooks, no other forward."""
    own = holder.__dict__
    hooked = own["_forward_hooks"] or own["_forward_pre_hooks"] or _has_any_global_hook()
    return type(holder) is Cores and "forward" not in own and not hooked


class FactoredLinear(nn.Module):
    """A linear layer y = x Wᵀ + b with a lazy weight.

    It is no ``nn.Linear``: tools that look for those want to read and replace a dense weight.
    """

    in_features: int
    out_features: int
    weight: FactoredWeight
    bias: nn.Parameter | None

    def forward(self, x: Tensor) -> Tensor:
        holder, held = self._modules["weight_cores"], self._parameters
        if not torch.compiler.is_compiling() and type(x) is Tensor and _is_bare(holder):
            # Without the lazy weight, which takes as long as a product of one row.
            y = holder.linear(x, held.get("bias"))
            if y is not None:
                return y
        return F.linear(x, self.weight, self.bias)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


# --------------------------------------------------------------- owners with their own forward


def cores_name(parameter: str) -> str:
    return f"{parameter}_cores"


def _lazy_weight(parameter: str) -> property:
    holder = cores_name(parameter)

    def get(owner: nn.Module) -> FactoredWeight:
        # It is called, so that hooks which fetch offloaded parameters do so.
        return owner._modules[holder]()  # type: ignore[misc]

    return property(get)


def weight_of(owner: nn.Module, parameter: str) -> FactoredWeight:
    """The lazy weight of the very parameters, whatever hooks there are."""
    holder: Cores = owner._modules[cores_name(parameter)]  # type: ignore[assignment]
    return holder.forward()


def check_tie(own: FactoredWeight, value: Any, what: str) -> None:
    """Code that ties weights assigns one module's to another; here the tie must be there already.

    Raises:
        TypeError: it is any other value.
    """
    cores = value.cores if isinstance(value, FactoredWeight) else ()
    if [id(core) for core in cores] != [id(core) for core in own.cores]:
        raise cannot_be_assigned(what)


@cache
def factored_class(parameters: tuple[str, ...], base: type[nn.Module]) -> type[nn.Module]:
    """``base`` with lazy weights in place of the ``parameters``."""

    def assign(owner: nn.Module, name: str, value: Any) -> None:
        if name in parameters:
            check_tie(weight_of(owner, name), value, f"{name} of {base.__name__}")
        else:
            base.__setattr__(owner, name, value)

    body: dict[str, Any] = {name: _lazy_weight(name) for name in parameters}
    body |= {"__setattr__": assign, "_factored_parameters": parameters}
    if issubclass(base, nn.RNNBase):
        body["_flat_weights"] = property(_flat_weights, _drop)
    return subclass(base, body, factored_class, parameters, base)


def _flat_weights(owner: nn.RNNBase) -> list[Any]:
    """All weights in the order of a recurrent layer's kernel, which keeps a list of them."""
    return [getattr(owner, name, None) for name in owner._flat_weights_names]


def _drop(owner: nn.Module, value: Any) -> None:
    """Nothing is kept: the list is made from what is there."""


def _blank(dense: type[nn.Module], parameters: tuple[str, ...], base: type[nn.Module]) -> nn.Module:
    """An empty module for old pickles, which fill it: the dense class is not in their state."""
    owner = dense.__new__(dense)
    become(owner, factored_class(parameters, base))
    return owner


def lazy_parameters(owner: nn.Module) -> tuple[str, ...]:
    return getattr(type(owner), "_factored_parameters", ())
