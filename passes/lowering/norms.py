"""Find layer norms and RMS norms in a graph, as one function or written out."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from tensorize.base.dynamo import value_of
from tensorize.ir.work import Norm

TIMES, PLUS = {operator.mul, torch.mul, "mul"}, {operator.add, torch.add, "add"}


_Found = tuple[Norm, fx.Node, Sequence[fx.Node], Sequence[fx.Node]]
"""A norm, what it is of, its gain and shift, and the nodes between."""


def one_function(node: fx.Node) -> _Found | None:
    """A norm that is one function."""
    names = _ONE_FUNCTION.get(node.target)  # type: ignore[arg-type]
    if names is None:
        return None
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    value, kind = value_of(given["input"]), "rms" if len(names) == 4 else "layer"
    scales = [given.get(name) for name in names[2:-1]]
    if (
        value is None
        or tuple(given["normalized_shape"]) != tuple(value.shape[-1:])
        or None in scales
    ):
        return None
    eps = given.get("eps", 1e-5 if kind == "layer" else None)
    if eps is None:  # that of the dtype that torch computes norms in
        eps = torch.finfo(torch.promote_types(value.dtype, torch.float32)).eps
    return Norm(kind, eps), given["input"], scales, ()


_LAYER, _RMS = ("weight", "bias", "eps"), ("weight", "eps")
_ONE_FUNCTION: dict[Any, tuple[str, ...]] = {
    function: ("input", "normalized_shape", *names)
    for names, functions in (
        (_LAYER, (F.layer_norm, torch.layer_norm)),
        (_RMS, (F.rms_norm, torch.rms_norm)),
    )
    for function in functions
}


def written_out(node: fx.Node) -> _Found | None:
    """An RMS norm as Hugging Face writes it: gain · (x · rsqrt(mean(x²) + eps)), with casts."""
    for gain, cast in _factors(node):
        normed, casts = _uncast(cast)
        for wide, root in _factors(normed):
            found = _root_of_mean_square(root)
            if found is None:
                continue
            squared, eps, inner = found
            (x, before), (same, too) = _uncast(wide), _uncast(squared)
            if x is same and isinstance(x, fx.Node):
                between = dict.fromkeys((*casts, normed, *before, *too, root, *inner))
                return Norm("rms", eps), x, (gain,), tuple(between)
    return None


def _factors(value: Any) -> Sequence[tuple[Any, Any]]:
    """The two factors of a product, both ways round."""
    if isinstance(value, fx.Node) and value.target in TIMES and len(value.args) == 2:
        return (value.args, value.args[::-1])  # type: ignore[return-value]
    return ()


def _uncast(value: Any) -> tuple[Any, tuple[fx.Node, ...]]:
    """What was cast, and the node that did."""
    if isinstance(value, fx.Node) and value.target in ("to", "float", "type_as"):
        return value.args[0], (value,)
    return value, ()


def _root_of_mean_square(root: Any) -> tuple[Any, float, tuple[fx.Node, ...]] | None:
    """Of rsqrt(mean(v²) + eps): v, eps, and the nodes."""
    if not _is_call(root, torch.rsqrt, "rsqrt") or not _is_call(root.args[0], *PLUS):
        return None
    if len(root.args[0].args) != 2:
        return None  # an argument by name
    mean, eps = root.args[0].args
    if not _is_call(mean, torch.mean, "mean") or type(eps) not in (int, float):
        return None
    given = {**dict(zip(("input", "dim", "keepdim"), mean.args, strict=False)), **mean.kwargs}
    square = given["input"]
    if given.get("dim") not in (-1, (-1,), [-1]) or given.get("keepdim") is not True:
        return None
    power = _is_call(square, torch.pow, operator.pow, "pow") and square.args[1:] == (2,)
    if not power and not _is_call(square, torch.square, "square"):
        return None
    return square.args[0], float(eps), (root.args[0], mean, square)


def _is_call(value: Any, *targets: Any) -> bool:
    return isinstance(value, fx.Node) and value.target in targets
