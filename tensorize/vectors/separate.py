"""``tensorize.separate``: the matrices of a vector as parameters of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tensorize.base.errors import CaptureError
from tensorize.capture.forward import in_usual_modes
from tensorize.capture.inputs import check_model, needed
from tensorize.passes.rewrite.copies import copy_sharing
from tensorize.vectors.find import Vector, find_vectors
from tensorize.vectors.held import separate as hold_apart


@in_usual_modes("separate")
def separate(model: nn.Module, example_inputs: Any = None, *, inplace: bool = False) -> nn.Module:
    """The same model with the matrices that its vectors hold as parameters of their own.

    Some models keep several matrices one after the other in one vector, and cut them out of it as
    they run: e3nn's equivariant layers one for every irreducible representation. ``compile`` looks
    for matrices among the parameters, so it finds them after this. One run of the model shows where
    each of them begins. Code that cuts the vector up gets the matrices, or their factors; any other
    gets a vector made for that call. Equivariance is kept: a matrix of an e3nn layer acts on all
    components of a representation alike, and its factors do so too.

    Args:
        example_inputs: what forward takes: a tuple of positional or a dict of keyword arguments.
        inplace: the model is changed itself, and no copy of it.

    Returns:
        A model of the same class with the same outputs, to a rounding. In its state dict a vector
        ``weight`` is ``weight_matrices.from_0``, ``weight_matrices.from_480``, …, by the places
        where its matrices begin. ``load`` and ``restructure`` take a model that was separated.

    Raises:
        CaptureError: no vector holds matrices that a run of the model is seen to multiply.

    Examples:
        >>> class Flat(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.flat = torch.nn.Parameter(torch.randn(64 * 64 + 64 * 8))
        ...     def forward(self, x):
        ...         hidden = x @ self.flat[: 64 * 64].view(64, 64)
        ...         return hidden.relu() @ self.flat[64 * 64 :].view(64, 8)
        >>> apart = tensorize.separate(Flat(), (torch.randn(2, 64),))
        >>> [name for name, _ in apart.named_parameters()]
        ['flat_matrices.from_0', 'flat_matrices.from_4096']
    """
    model = check_model(model, inplace=inplace)
    batch = needed(model, example_inputs, "no inputs are known that show how its vectors are used")
    found = find_vectors(model, batch)
    names = [n for n, _ in model.named_parameters(remove_duplicate=False)]
    apart = {n: v for n, v in found.items() if v.why_not is None and _has_one_name(model, n, names)}
    if not apart:
        raise _none(model, found)
    target = model if inplace else copy_sharing(model, set(apart))
    for name, vector in apart.items():
        path, _, leaf = name.rpartition(".")
        hold_apart(target.get_submodule(path), leaf, vector.pieces())
    return target


def _has_one_name(model: nn.Module, name: str, names: list[str]) -> bool:
    """Whether one parameter of one module is what the vector is."""
    vector = model.get_parameter(name)
    return sum(model.get_parameter(other) is vector for other in names) == 1


def _none(model: nn.Module, found: dict[str, Vector]) -> CaptureError:
    name = max(found, key=lambda each: found[each].numbers, default=None)
    if name is None:
        return CaptureError("the model has no vectors", way_out="compile it as it is")
    why, way_out = found[name].why_not, "compile the model as it is"
    owner = model.get_submodule(name.rpartition(".")[0])
    if any(isinstance(module, torch.jit.ScriptModule) for module in owner.modules()):
        why = "the module runs TorchScript, which cuts it up unseen"
        way_out = (
            "build the model without TorchScript: one of e3nn after "
            'e3nn.set_optimization_defaults(jit_mode="eager")'
        )
    return CaptureError(
        "no vector holds matrices that are seen to be multiplied; of this one, the largest, "
        f"{why or 'there are several names'}",
        site=name,
        way_out=way_out,
    )
