"""A backward pass that leaves the model as it was."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tensorize.base.errors import ModelError
from tensorize.capture.forward import of_the_model, ours, untouched
from tensorize.capture.inner_gradients import differentiates, is_transformed
from tensorize.capture.matmul import Frame, Matmul
from tensorize.capture.observer import Observer
from tensorize.ir.sites import Batch
from tensorize.passes.observe.loss import PreservedLoss
from tensorize.passes.observe.outputs import call, samples_of

_NO_GRADIENTS = 'metric="input" needs no gradients'


@dataclass(frozen=True)
class Peculiar:
    """Weights whose gradients are not to be had row by row.

    ``changed``: the model changes their input in place later on, before the gradients are there.
    ``whole``: they are used where the model differentiates, so that more than what arrives at their
    rows depends on them, or under a transform of ``torch.func``, where rows are not to be seen.
    """

    changed: frozenset[str] = frozenset()
    whole: frozenset[str] = frozenset()


def peculiar(
    model: nn.Module, batch: Batch, wanted: Sequence[tuple[str, nn.Parameter]]
) -> Peculiar:
    """Which weights are, in a run of the model on a batch."""
    used: list[tuple[str, Tensor, int]] = []
    whole = {name for name, _ in wanted} if differentiates(model) else set[str]()

    def on_matmul(name: str, frame: Frame, matmul: Matmul, output: Tensor) -> Tensor:
        if is_transformed():
            whole.add(name)
        elif not matmul.x.is_inference():
            used.append((name, matmul.x, matmul.x._version))
        return output

    with untouched(model), Observer(wanted, on_matmul):
        call(model, batch)
    changed = frozenset(name for name, x, version in used if x._version != version)
    return Peculiar(changed - whole, frozenset(whole))


@dataclass(frozen=True)
class Probed:
    """A scalar whose gradients are taken, of how many output rows it is, and of how many samples
    where the outputs have one row for each."""

    scalar: Tensor
    rows: int
    samples: int | None


def probing(
    loss: PreservedLoss, batch: Batch, model: nn.Module, generator: torch.Generator
) -> Callable[[Any], Probed]:
    """What probes the loss of a model's outputs for a batch."""

    def probe(result: Any) -> Probed:
        return Probed(*loss.probe(result, batch, model, generator), samples_of(result, model))

    return probe


def backward(
    model: nn.Module,
    batch: Batch,
    wanted: Sequence[tuple[str, nn.Parameter]],
    on_rows: Callable[[str, Frame, Matmul, Tensor, int, int | None], None],
    probe: Callable[[Any], Probed],
    changed: Collection[str] = (),
    whole: Mapping[str, Callable[[Tensor], None]] | None = None,
) -> int:
    """One backward pass of a probe of the outputs; the number of output rows that count.

    ``on_rows(name, frame, matmul, gradient, call, samples)`` is called for each matmul against a
    wanted weight with what arrives at its rows, the number of the call among the weight's own, and
    the number of samples where the outputs have one row for each; ``whole`` names the weights that
    are used as a whole, and what takes the gradient of each. ``changed`` are weights whose input
    the model changes later on.

    Raises:
        ModelError: the model does not run, forward or backward, or no gradient arrives anywhere.
    """
    made: Probed | None = None

    def arrives(name: str, frame: Frame, matmul: Matmul, call: int, gradient: Tensor) -> None:
        assert made is not None
        on_rows(name, frame, matmul, matmul.to_rows(gradient), call, made.samples)

    def scalar(result: Any) -> Tensor:
        nonlocal made
        made = probe(result)
        return made.scalar

    pass_back(model, batch, wanted, scalar, arrives, changed, whole)
    assert made is not None
    return made.rows


def pass_back(
    model: nn.Module,
    batch: Batch,
    wanted: Sequence[tuple[str, nn.Parameter]],
    probe: Callable[[Any], Tensor],
    arrives: Callable[[str, Frame, Matmul, int, Tensor], Tensor | None],
    changed: Collection[str] = (),
    whole: Mapping[str, Callable[[Tensor], None]] | None = None,
) -> None:
    """One backward pass of what ``probe`` makes of the outputs.

    ``arrives(name, frame, matmul, call, gradient)`` takes the gradient of what each matmul against
    a wanted weight returned; what it gives goes on in its place.

    Raises:
        ModelError: the model does not run, forward or backward, or no gradient arrives anywhere.
    """
    whole = whole or {}
    seen = bool(whole) or not wanted
    roots: list[Tensor] = []
    # A graph holds its hooks, and they, by what the caller makes of gradients, may hold the graph:
    # a circle that no collector sees, with all activations in it.
    hooks = ExitStack()
    calls: Counter[str] = Counter()
    # Inputs may carry gradients of the caller's own: backward passes end at the weights.
    args, kwargs = pytree.tree_map(_detached, (batch.args, dict(batch.kwargs)))
    batch = replace(batch, args=args, kwargs=kwargs)

    def on_matmul(name: str, frame: Frame, matmul: Matmul, output: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return output
        number = calls[name]
        calls[name] += 1
        if name in whole or is_transformed():
            return output
        if name in changed:
            matmul = replace(matmul, x=matmul.x.detach().clone())
        if not output.requires_grad:
            # No weight asks for a gradient here: a zero that does is where backward passes end.
            roots.append(torch.zeros_like(output[..., :1]).requires_grad_())
            output = output + roots[-1]

        def on_gradient(gradient: Tensor) -> Tensor | None:
            with torch.no_grad(), ours():
                return arrives(name, frame, matmul, number, gradient)

        hooks.callback(output.register_hook(on_gradient).remove)
        nonlocal seen
        seen = True
        return output

    wholes = {
        name: parameter.detach().requires_grad_() for name, parameter in wanted if name in whole
    }
    leaves = {id(parameter): wholes[name] for name, parameter in wanted if name in wholes}
    if differentiates(model):  # it may do so with respect to any of its parameters
        for parameter in model.parameters():
            own = parameter.detach().requires_grad_(parameter.requires_grad)
            leaves.setdefault(id(parameter), own)
    with untouched(model), torch.enable_grad(), hooks:
        with Observer(wanted, on_matmul, frozen=True, stand_ins=leaves):
            result = call(model, batch)
        scalar = probe(result)
        # A matmul whose input carries a gradient has no root of its own: it is on the way to where
        # that gradient ends, which may be a tensor that the model made.
        ends = list(dict.fromkeys((*wholes.values(), *roots, *_leaves(scalar))))
        if not seen or not scalar.requires_grad:
            raise ModelError(
                "the outputs do not depend on any weight in a differentiable way",
                way_out=_NO_GRADIENTS,
            )
        with of_the_model(f"batch {batch.number} has no gradients", _NO_GRADIENTS):
            # No tensor's .grad is touched.
            arrived = torch.autograd.grad(scalar, ends, allow_unused=True)
    for name, gradient in zip(wholes, arrived, strict=False):
        if gradient is not None and gradient.any():
            whole[name](gradient)


def _leaves(scalar: Tensor) -> list[Tensor]:
    """The tensors at which the gradients of a scalar end."""
    found: list[Tensor] = []
    known, todo = set[Any](), [scalar.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in known:
            known.add(node)
            todo += (following for following, _ in node.next_functions)
            if (leaf := getattr(node, "variable", None)) is not None:
                found.append(leaf)
    return found


def not_wanted(gradient: Tensor) -> None:
    """Takes the gradient of a weight whose moments are not collected in this pass."""


def _detached(value: object) -> object:
    return value.detach() if isinstance(value, Tensor) else value
