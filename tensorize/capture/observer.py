"""Watch a model run, and learn of every use of its parameters."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import MethodDescriptorType, WrapperDescriptorType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from tensorize.base.tensors import untransformed
from tensorize.capture.forward import ours
from tensorize.capture.inner_gradients import DERIVATIVES, is_transformed
from tensorize.capture.matmul import Frame, Matmul
from tensorize.capture.uses import read
from tensorize.capture.views import COMPOSITES, view

TRANSFORMED = "torch.vmap or another transformation of torch.func"
"""What is said to use a parameter that such a transformation takes as its argument."""

CUSTOM = "autograd.Function "
"""How a custom function's name begins, where a weight is told to be given to one."""


class Observer(TorchFunctionMode):
    """Watches a model run and tells of every use of its parameters.

    Args:
        parameters: the parameters to watch, by qualified name.
        on_matmul: called with (name, frame, matmul, output) for each matmul against a parameter;
            what it returns is what the model goes on with.
        on_other: called with (name, function name) for every other use that gives a tensor, and
            where a custom autograd function has the weight (``CUSTOM``).
            What either raises leaves the model as ``forward.ours``: run it in ``of_the_model``.
        frozen: hand the functions detached parameters, so that no gradient of a weight is computed.
        stand_ins: what to hand them instead, by the parameter's id.
        instead: called with (name, frame, matmul, dense) in place of the function of each matmul,
            which ``dense()`` runs; there is no ``on_matmul`` then. What it raises is the model's
            own, but for what is raised in ``forward.ours``.

    ``differentiates`` says afterwards whether the model asked autograd for gradients.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        on_matmul: Callable[[str, Frame, Matmul, Tensor], Tensor] | None = None,
        on_other: Callable[[str, str], None] | None = None,
        *,
        frozen: bool = False,
        stand_ins: Mapping[int, Tensor] | None = None,
        instead: Callable[[str, Frame, Matmul, Callable[[], Tensor]], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self._names = {id(p): (name, Frame()) for name, p in parameters}
        self._alive: list[Tensor] = []  # a freed view's id may be given to another tensor
        self._on_matmul, self._on_other, self._frozen = on_matmul, on_other, frozen
        self._stand_ins, self._instead = stand_ins or {}, instead
        self.differentiates = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self.differentiates |= func in DERIVATIVES
        tensors = _tensors(args, kwargs)
        watched = [tensor for tensor in tensors if id(tensor) in self._names]
        if watched and func in COMPOSITES:
            with self:
                return COMPOSITES[func](*args, **kwargs)
        names = [self._names[id(weight)][0] for weight in watched]
        if self._instead is not None:
            for weight, name in zip(watched, names, strict=True):
                matmul = self._matmul(func, args, kwargs, weight, names.count(name) == 1)
                if matmul is not None:
                    frame = self._names[id(weight)][1]
                    return self._instead(name, frame, matmul, partial(func, *args, **kwargs))
        if self._frozen and any(map(_is_frozen, tensors)):
            free_args, free_kwargs = pytree.tree_map(self._detach, (args, kwargs))
            result = func(*free_args, **free_kwargs)
        else:
            result = func(*args, **kwargs)
        if is_transformed():
            self._tell_of_wrapped(args, kwargs)
        for weight, name in zip(watched, names, strict=True):
            with ours():
                result = self._tell(func, args, kwargs, weight, names.count(name) == 1, result)
        return result

    def _detach(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or not _is_frozen(value):
            return value
        if not isinstance(value, nn.Parameter):
            return value.clone()
        return self._stand_ins[id(value)] if id(value) in self._stand_ins else value.detach()

    def _tell_of_wrapped(self, args: tuple, kwargs: dict) -> None:
        """Tell of parameters that a transformation of ``torch.func`` has wrapped."""
        for tensor in _tensors(args, kwargs):
            inside = untransformed(tensor)
            if inside is tensor or id(inside) not in self._names:
                continue
            if self._on_other is not None:
                with ours():
                    self._on_other(self._names[id(inside)][0], TRANSFORMED)

    def _tell(
        self, func: Any, args: tuple, kwargs: dict, weight: Tensor, once: bool, result: Any
    ) -> Any:
        name, frame = self._names[id(weight)]
        if self._on_other is not None and (custom := self._custom_function(name)) is not None:
            self._on_other(name, custom)
            return result
        matmul = self._matmul(func, args, kwargs, weight, once)
        if matmul is not None and self._on_matmul is not None:
            return self._on_matmul(name, frame, matmul, result)
        if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(result)):
            return result  # asked for a shape, a dtype, a flag
        derived = view(func, args, kwargs, frame, weight)
        if derived is not None:
            frames = derived if isinstance(derived, tuple) else (derived,)
            for part, seen in zip(pytree.tree_leaves(result), frames, strict=True):
                self._names[id(part)] = (name, seen)
                self._alive.append(part)
        elif self._on_other is not None:
            self._on_other(name, getattr(func, "__name__", str(func)))
        return result

    def _matmul(
        self, func: Any, args: tuple, kwargs: dict, weight: Tensor, once: bool
    ) -> Matmul | None:
        """The call as one matmul against the parameter; W Wᵀ is none against a constant."""
        frame = self._names[id(weight)][1]
        matmul = read(func, args, kwargs, weight, frame) if once else None
        return None if matmul is None else frame.turn(matmul)

    def _custom_function(self, name: str) -> str | None:
        """The custom autograd function that runs, where it was given the weight of this name."""
        frame = sys._getframe(1)
        while frame is not None:
            if frame.f_code is _APPLY:
                given = pytree.tree_leaves(frame.f_locals["args"])
                if any(self._names.get(id(each), ("",))[0] == name for each in given):
                    return f"{CUSTOM}{frame.f_locals['cls'].__name__}"
            frame = frame.f_back
        return None


def _is_frozen(tensor: Tensor) -> bool:
    """Whether functions get another tensor: a parameter, or what no gradient can pass."""
    return isinstance(tensor, nn.Parameter) or tensor.is_inference()


_APPLY = torch.autograd.Function.apply.__func__.__code__  # type: ignore[attr-defined]


class StandIns(TorchFunctionMode):
    """Hands functions other tensors than parameters, by the parameter's id.

    The model is not touched: other threads that run it meanwhile see its own.
    """

    def __init__(self, tensors: Mapping[int, Tensor]) -> None:
        super().__init__()
        self._tensors = tensors

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        named: dict[str, Any] = kwargs or {}
        if any(id(tensor) in self._tensors for tensor in _tensors(args, named)):
            args, named = pytree.tree_map(self._instead, (args, named))
            if args and not isinstance(args[0], Tensor):
                return _asked(args[0], func, args[1:], named)
        return func(*args, **named)

    def _instead(self, value: Any) -> Any:
        return self._tensors.get(id(value), value)


def _asked(lazy: Any, func: Any, args: tuple, kwargs: dict) -> Any:
    """A call for what stands for a tensor and is none: methods of tensors are not for it."""
    if func.__name__ == "__get__":
        return getattr(lazy, func.__self__.__name__)
    if isinstance(func, MethodDescriptorType | WrapperDescriptorType):
        return getattr(lazy, func.__name__)(*args, **kwargs)
    return func(lazy, *args, **kwargs)


def _tensors(args: tuple, kwargs: dict) -> list[Tensor]:
    leaves = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            leaves.append(value)
        elif isinstance(value, list | tuple):
            leaves.extend(v for v in value if isinstance(v, Tensor))
    return leaves
