"""A backward pass that leaves the model as it was."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tensorize.base.errors import ModelError
from tensorize.capture.forward import of_the_model, ours, untouched
from tensorize.capture.matmul import Frame, Matmul
from tensorize.capture.observer import Observer
from tensorize.ir.sites import Batch
from tensorize.passes.observe.loss import PreservedLoss
from tensorize.passes.observe.outputs import call, samples_of

_NO_GRADIENTS = 'metric="input" needs no gradients'


def changed_after_use(
    model: nn.Module, batch: Batch, wanted: Sequence[tuple[str, nn.Parameter]]
) -> set[str]:
    """Weights whose input the model changes in place later on, before the gradients are there."""
    used: list[tuple[str, Tensor, int]] = []

    def on_matmul(name: str, frame: Frame, matmul: Matmul, output: Tensor) -> Tensor:
        if not matmul.x.is_inference():
            used.append((name, matmul.x, matmul.x._version))
        return output

    with untouched(model), Observer(wanted, on_matmul):
        call(model, batch)
    return {name for name, x, version in used if x._version != version}


def backward(
    model: nn.Module,
    batch: Batch,
    wanted: Sequence[tuple[str, nn.Parameter]],
    on_rows: Callable[[str, Frame, Matmul, Tensor, int, int | None], None],
    loss: PreservedLoss,
    generator: torch.Generator,
    changed: Collection[str] = (),
    whole: Mapping[str, Callable[[Tensor], None]] | None = None,
) -> int:
    """One backward pass of a probe of the loss; the number of output rows that count.

    ``on_rows(name, frame, matmul, gradient, call, samples)`` is called for each matmul against a
    wanted weight with what arrives at its rows, the number of the call among the weight's own, and
    the number of samples where the outputs have one row for each; ``whole`` names the weights that
    are used as a whole, and what takes the gradient of each. ``changed`` are weights whose input
    the model changes later on.

    Raises:
        ModelError: the model does not run, forward or backward, or no gradient arrives anywhere.
    """
    samples: int | None = None
    rows = 0

    def arrives(name: str, frame: Frame, matmul: Matmul, call: int, gradient: Tensor) -> None:
        on_rows(name, frame, matmul, matmul.to_rows(gradient), call, samples)

    def probe(result: Any) -> Tensor:
        nonlocal samples, rows
        scalar, rows = loss.probe(result, batch, model, generator)
        samples = samples_of(result, model)
        return scalar

    pass_back(model, batch, wanted, probe, arrives, changed, whole)
    return rows


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
    roots: list[Tensor] = []
    calls: Counter[str] = Counter()
    # Inputs may carry gradients of the caller's own: backward passes end at the weights.
    args, kwargs = pytree.tree_map(_detached, (batch.args, dict(batch.kwargs)))
    batch = replace(batch, args=args, kwargs=kwargs)

    def on_matmul(name: str, frame: Frame, matmul: Matmul, output: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return output
        number = calls[name]
        calls[name] += 1
        if name in changed:
            matmul = replace(matmul, x=matmul.x.detach().clone())
        if not output.requires_grad:
            # No weight asks for a gradient here: a zero that does is where backward passes end.
            roots.append(torch.zeros_like(output[..., :1]).requires_grad_())
            output = output + roots[-1]

        def on_gradient(gradient: Tensor) -> Tensor | None:
            with torch.no_grad(), ours():
                return arrives(name, frame, matmul, number, gradient)

        output.register_hook(on_gradient)
        return output

    wholes = {
        name: parameter.detach().requires_grad_() for name, parameter in wanted if name in whole
    }
    leaves = {id(parameter): wholes[name] for name, parameter in wanted if name in wholes}
    with untouched(model), torch.enable_grad():
        with Observer(wanted, on_matmul, frozen=True, stand_ins=leaves):
            result = call(model, batch)
        scalar = probe(result)
        roots += wholes.values()
        if not roots or not scalar.requires_grad:
            raise ModelError(
                "the outputs do not depend on any weight in a differentiable way",
                way_out=_NO_GRADIENTS,
            )
        with of_the_model(f"batch {batch.number} has no gradients", _NO_GRADIENTS):
            torch.autograd.backward(scalar, inputs=roots)  # no parameter's .grad is touched
    for name, weight in wholes.items():
        if weight.grad is not None and weight.grad.any():
            whole[name](weight.grad)


def not_wanted(gradient: Tensor) -> None:
    """Takes the gradient of a weight whose moments are not collected in this pass."""


def _detached(value: object) -> object:
    return value.detach() if isinstance(value, Tensor) else value
