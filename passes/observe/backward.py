"""A backward pass that leaves the model as it was."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

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
    on_rows: Callable[[str, Frame, Matmul, Tensor, int | None], None],
    loss: PreservedLoss,
    generator: torch.Generator,
    changed: Collection[str] = (),
    whole: Mapping[str, Callable[[Tensor], None]] | None = None,
) -> int:
    """One backward pass of a probe of the loss; the number of output rows that count.

    ``on_rows(name, frame, matmul, gradient, samples)`` is called for each matmul against a wanted
    weight with what arrives at its rows, and the number of samples where the outputs have one row
    for each; ``whole`` names the weights that are used as a whole, and what takes the gradient of
    each. ``changed`` are weights whose input the model changes later on.

    Raises:
        ModelError: the model does not run, forward or backward, or no gradient arrives anywhere.
    """
    whole = whole or {}
    samples: int | None = None
    roots: list[Tensor] = []
    # Inputs may carry gradients of the caller's own: backward passes end at the weights.
    args, kwargs = pytree.tree_map(_detached, (batch.args, dict(batch.kwargs)))
    batch = replace(batch, args=args, kwargs=kwargs)

    def on_matmul(name: str, frame: Frame, matmul: Matmul, output: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return output
        if name in changed:
            matmul = replace(matmul, x=matmul.x.detach().clone())
        # A zero that asks for a gradient: backward passes end there, and so come by here, whatever
        # else asks for one (positions, a parameter that no matmul uses, a function of the user's).
        roots.append(torch.zeros_like(output[..., :1]).requires_grad_())
        output = output + roots[-1]

        def on_gradient(gradient: Tensor) -> None:
            with torch.no_grad(), ours():
                on_rows(name, frame, matmul, matmul.to_rows(gradient), samples)

        output.register_hook(on_gradient)
        return output

    wholes = {
        name: parameter.detach().requires_grad_() for name, parameter in wanted if name in whole
    }
    leaves = {id(parameter): wholes[name] for name, parameter in wanted if name in wholes}
    with untouched(model), torch.enable_grad():
        with Observer(wanted, on_matmul, frozen=True, stand_ins=leaves):
            result = call(model, batch)
        scalar, rows = loss.probe(result, batch, model, generator)
        samples = samples_of(result, model)
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
    return rows


def not_wanted(gradient: Tensor) -> None:
    """Takes the gradient of a weight whose moments are not collected in this pass."""


def _detached(value: object) -> object:
    return value.detach() if isinstance(value, Tensor) else value
