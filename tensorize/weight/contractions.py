"""The callables that contract an input with a weight, both passes, by what they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tensorize.base import hooks
from tensorize.formats.registry import format_of
from tensorize.ir.spec import Spec, TTSpec
from tensorize.weight.precision import autocast, multiplied_in

Contraction = Callable[..., Tensor]
"""``contract(x, cores, bias=None)``."""

Contractions = Mapping[str, Contraction]
"""The callables of one spec by what they contract: ``"columns"`` and ``"rows"``."""

Trained = tuple[Callable[..., Any], Callable[..., Any]]
"""``forward(x, cores)`` to y, x or None, and what is saved; ``backward(g, x, cores, saved)``."""


@dataclass(frozen=True)
class Asked:
    """What a contraction is asked for by: a spec, which of its sides x meets, and where it runs.

    ``dtype`` is the one that is multiplied in; ``breakpoints`` are the batches at which the order
    is chosen anew (None: not known).
    """

    spec: TTSpec
    contract: str
    device: str
    dtype: str
    breakpoints: tuple[int, ...] | None


class Backend(Protocol):
    """What makes the callables of contractions."""

    def contraction(self, asked: Asked) -> Contraction:
        """How x meets a weight."""
        ...

    def training(
        self, asked: Asked, gradients: tuple[int | str, ...], memory_limit: int | None
    ) -> Trained:
        """Both passes of a contraction that is differentiated by some of x and the cores."""
        ...

    def breakpoints(self, uses: Sequence[tuple[Any, str]], device: str) -> tuple[int, ...]:
        """At most two batches at which the orders of all weights of a model change: specs, and the
        dtypes that they are multiplied in."""
        ...


_backend: Backend | None = None


def register_backend(backend: Backend) -> None:
    """Say what makes the callables."""
    global _backend
    _backend = backend
    contractions.cache_clear()


def _registered() -> Backend:
    if _backend is None:  # the file where passes and codegen meet registers one
        import_module("tensorize.api.wiring")
    assert _backend is not None
    return _backend


@lru_cache(maxsize=4096)
def contractions(
    spec: Spec,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    breakpoints: tuple[int, ...] | None = None,
    memory_limit: int | None = None,
) -> Contractions:
    """How x meets a weight of this spec; low rank needs no plan: its two matmuls are the order.

    ``memory_limit``: the most elements that one call saves for its backward pass, where that can be
    (0: as few as possible). What is not saved is computed again. Low rank then has a plan too.
    """
    form = format_of(spec)
    if not (form.planned or (form.indexed and memory_limit is not None)):
        return {}
    assert isinstance(spec, TTSpec)
    found = {}
    for contract in ("columns", "rows"):
        asked = Asked(spec, contract, device, multiplied_in(dtype, device), breakpoints)
        found[contract] = _Differentiated(asked, memory_limit, _registered().contraction(asked))
    return found


def common_breakpoints(
    uses: Sequence[tuple[Spec, torch.dtype]], device: str = "cpu"
) -> tuple[int, ...]:
    """The batches at which weights of these specs and dtypes, in one model, change their order."""
    planned = [(s, multiplied_in(d, device)) for s, d in uses if format_of(s).planned]
    return _registered().breakpoints(planned, device) if planned else ()


@dataclass(frozen=True, eq=False)
class _Differentiated:
    """A contraction whose backward pass is planned together with its forward pass.

    ``built`` are both passes for every choice of operands that get a gradient, made when it comes.
    """

    asked: Asked
    memory_limit: int | None
    plain: Contraction
    built: dict[tuple[bool, ...], Trained] = field(default_factory=dict)

    def __call__(self, x: Tensor, cores: Sequence[Tensor], bias: Tensor | None = None) -> Tensor:
        if not torch.is_grad_enabled():
            return self.plain(x, cores, bias)
        wanted = (x.requires_grad, *[core.requires_grad for core in cores])
        if not any(wanted) or _transformed() or x.is_complex() or cores[0].is_complex():
            return self.plain(x, cores, bias)
        x, cores = autocast(x, cores)
        y: Tensor = _Planned.apply(self, wanted, x, *cores)
        return y if bias is None else y + bias.to(y.dtype)

    def passes(self, wanted: tuple[bool, ...]) -> Trained:
        self._build(wanted)
        return self.built[wanted]

    def _build(self, wanted: tuple[bool, ...]) -> bool:
        if wanted not in self.built:
            operands = ("x", *range(len(self.asked.spec.cores)))
            gradients = tuple(o for o, w in zip(operands, wanted, strict=True) if w)
            self.built[wanted] = _registered().training(self.asked, gradients, self.memory_limit)
        return True

    def __reduce__(self) -> tuple[Any, ...]:
        # What is built is compiled from text: a copy finds it again by the spec.
        return _again, (self.asked, self.memory_limit)


def _again(asked: Asked, memory_limit: int | None) -> Contraction:
    how = asked.device, getattr(torch, asked.dtype), asked.breakpoints, memory_limit
    return contractions(asked.spec, *how)[asked.contract]


def _teach_dynamo() -> None:
    """Dynamo is to call what builds both passes while it traces, and to find what it made."""
    from torch._dynamo.decorators import assume_constant_result

    assume_constant_result(_Differentiated._build)


hooks.when_imported("torch._dynamo.convert_frame", _teach_dynamo)


class _Planned(torch.autograd.Function):
    """Both passes of a training plan. Higher derivatives go through the plain contraction."""

    @staticmethod
    def forward(
        ctx: Any, how: _Differentiated, wanted: tuple[bool, ...], x: Tensor, *cores: Tensor
    ) -> Tensor:
        y, given, saved = how.passes(wanted)[0](x, cores)
        ctx.how, ctx.wanted = how, wanted
        ctx.save_for_backward(given, *cores, *saved)
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        (g,) = grad_outputs
        x, *others = ctx.saved_tensors
        count = len(ctx.wanted) - 1
        cores, saved = others[:count], others[count:]
        again = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if again and sum(ctx.wanted) > 1:
            # What is saved was computed without a graph: its own derivatives need one. A single
            # gradient depends on nothing else that is differentiated, as y is linear in each.
            return None, None, *_twice_differentiable(ctx.how, ctx.wanted, g, x, cores)
        return None, None, *ctx.how.passes(ctx.wanted)[1](g, x, cores, saved)


def _twice_differentiable(
    how: _Differentiated, wanted: tuple[bool, ...], g: Tensor, x: Tensor | None, cores: list[Tensor]
) -> list[Tensor | None]:
    """The gradients as functions of g, x and the cores, by autograd."""
    if x is None:
        raise RuntimeError(
            f"no second derivatives here: the input of {how.asked.spec} was not kept, as the "
            f"gradients of {_trained(wanted)} need less; let all cores require gradients, or use "
            "torch.func"
        )
    # Leaves of their own, so that no gradient goes on to what they were computed from.
    operands = [t.view_as(t) for t in (x, *cores)]
    operands = [t if t.requires_grad else t.requires_grad_() for t in operands]
    y = how.plain(operands[0], operands[1:])
    asked = [t for t, w in zip(operands, wanted, strict=True) if w]
    found = iter(torch.autograd.grad(y, asked, g, create_graph=True))
    return [next(found) if w else None for w in wanted]


def _trained(wanted: Sequence[bool]) -> str:
    names = ("x", *(f"core {k}" for k in range(len(wanted) - 1)))
    return " and ".join(name for name, asked in zip(names, wanted, strict=True) if asked)


def _transformed() -> bool:
    """Whether ``torch.func`` or forward mode is at work: they see through torch operations only."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
