"""How torch functions use a weight: each call is read as one matmul against a matrix.

Two readers stand on this one table. The observer (``observer.py``) watches a dense model run and
learns which parameters are used by matmuls, on which inputs; the lazy weight (``weight.py``)
stands in for a parameter and answers the same calls with a contraction. So whatever is found can
also be run, and whatever is run was found in the same way.

In this file W is the parameter's own matrix (rows M, columns N). ``contract`` says which side of W
meets the input: ``"columns"`` for y = x Wᵀ, ``"rows"`` for y = x W, ``"lookup"`` for rows of W.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tensorize.capture.einsum import read_einsum, read_tensordot
from tensorize.capture.matmul import Convolution, Frame, Matmul, swapped

Reader = Callable[[tuple, dict, Any], "Matmul | None"]


@dataclass(frozen=True)
class _Signature:
    """Names of a function's arguments in order, and what the optional ones default to.

    Not ``inspect.Signature``: this is read at every call, and traced by dynamo.
    """

    names: tuple[str, ...]
    defaults: tuple[tuple[str, Any], ...] = ()

    def bind(self, args: tuple, kwargs: dict) -> dict[str, Any] | None:
        """Arguments by name; None where they do not fit."""
        if len(args) > len(self.names):
            return None
        call = dict(self.defaults)
        for name, value in zip(self.names, args, strict=False):
            call[name] = value
        for name, value in kwargs.items():
            if name not in self.names and name not in call:
                return None
            call[name] = value
        return call if all(name in call for name in self.names) else None


_LINEAR = _Signature(("input", "weight", "bias"), (("bias", None),))
_ADDMM = _Signature(("input", "mat1", "mat2"), (("beta", 1), ("alpha", 1), ("out", None)))
_MATMUL = _Signature(("input", "other"), (("out", None),))
_EMBEDDING = _Signature(
    (
        "input",
        "weight",
        "padding_idx",
        "max_norm",
        "norm_type",
        "scale_grad_by_freq",
        "sparse",
    ),
    (
        ("padding_idx", None),
        ("max_norm", None),
        ("norm_type", 2.0),
        ("scale_grad_by_freq", False),
        ("sparse", False),
    ),
)
_GROUPED = _Signature(
    ("mat_a", "mat_b", "offs", "bias", "out_dtype"),
    (("offs", None), ("bias", None), ("out_dtype", None)),
)
_CONVOLUTION = _Signature(
    ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    (("bias", None), ("stride", 1), ("padding", 0), ("dilation", 1), ("groups", 1)),
)
_CONVOLUTION_TRANSPOSE = _Signature(
    ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"),
    (
        ("bias", None),
        ("stride", 1),
        ("padding", 0),
        ("output_padding", 0),
        ("groups", 1),
        ("dilation", 1),
    ),
)
_BAG_DEFAULTS = (
    ("offsets", None),
    ("max_norm", None),
    ("norm_type", 2),
    ("scale_grad_by_freq", False),
    ("mode", "mean"),
    ("sparse", False),
    ("per_sample_weights", None),
    ("include_last_offset", False),
    ("padding_idx", None),
)
_BAG = _Signature(("input", "weight", *(name for name, _ in _BAG_DEFAULTS)), _BAG_DEFAULTS)
_BAGGED = ("offsets", "mode", "per_sample_weights", "include_last_offset", "padding_idx")
_GROUPED_FALLBACK = _Signature(("input", "weight", "offs"))


def _linear(args: tuple, kwargs: dict, weight: Any) -> Matmul | None:
    call = _LINEAR.bind(args, kwargs)
    if call is None or call["weight"] is not weight or call["input"] is weight:
        return None
    return Matmul("linear", "columns", call["input"], bias=call["bias"])


def _addmm(args: tuple, kwargs: dict, weight: Any) -> Matmul | None:
    call = _ADDMM.bind(args, kwargs)
    if call is None or call["mat2"] is not weight or call["out"] is not None:
        return None
    if call["mat1"] is weight or call["input"] is weight or (call["beta"], call["alpha"]) != (1, 1):
        return None
    return Matmul("addmm", "rows", call["mat1"], bias=call["input"])


def _reversed_matmul(args: tuple, kwargs: dict, weight: Any) -> Matmul | None:
    return _matmul(args[::-1], kwargs, weight)


def _matmul(args: tuple, kwargs: dict, weight: Any) -> Matmul | None:
    call = _MATMUL.bind(args, kwargs)
    if call is None or call["out"] is not None or call["input"] is call["other"]:
        return None
    stacked = weight.dim() == 3
    if call["other"] is weight:
        x = call["input"]
        if stacked and x.dim() < 3:
            return None  # one x for all matrices: no row of it belongs to one
        return Matmul("matmul", "rows", x, stacked=stacked)
    x = call["other"]
    if x.dim() < weight.dim():
        return Matmul("matmul", "columns", x) if x.dim() == 1 and not stacked else None
    return Matmul("matmul", "columns", swapped(x), None, swapped, swapped, stacked=stacked)


def _embedding(args: tuple, kwargs: dict, weight: Any) -> Matmul | None:
    call = _EMBEDDING.bind(args, kwargs)
    if call is None or call["weight"] is not weight or call["max_norm"] is not None:
        return None
    if call["sparse"] or call["scale_grad_by_freq"]:
        return None
    return Matmul("embedding", "lookup", call["input"], padding_idx=call["padding_idx"])


def _grouped(args: tuple, kwargs: dict, weight: Any) -> Matmul | None:
    call = _GROUPED.bind(args, kwargs)
    if call is None or call["mat_b"] is not weight or call["offs"] is None:
        return None
    if call["bias"] is not None or call["out_dtype"] is not None:
        return None
    if call["mat_a"].dim() != 2 or weight.dim() != 3:
        return None  # a sum cut at the offsets, not one matrix for each part of the rows
    return Matmul("grouped_mm", "rows", call["mat_a"], offsets=call["offs"])


def _grouped_fallback(args: tuple, kwargs: dict, weight: Any) -> Matmul | None:
    call = _GROUPED_FALLBACK.bind(args, kwargs)
    if call is None or call["weight"] is not weight:
        return None
    return Matmul("grouped_mm", "rows", call["input"], offsets=call["offs"])


def _bag(args: tuple, kwargs: dict, weight: Any) -> Matmul | None:
    call = _BAG.bind(args, kwargs)
    if call is None or call["weight"] is not weight or call["max_norm"] is not None:
        return None
    if call["sparse"] or call["scale_grad_by_freq"] or call["mode"] == "max":
        return None  # the largest of several rows is not linear in them
    bag = {name: call[name] for name in _BAGGED}
    return Matmul("embedding_bag", "lookup", call["input"], bag=bag)


def _convolution(args: tuple, kwargs: dict, weight: Any) -> Matmul | None:
    call = _CONVOLUTION.bind(args, kwargs)
    if call is None or call["weight"] is not weight or call["input"].dim() != weight.dim():
        return None
    return Matmul(
        f"conv{weight.dim() - 2}d",
        "columns",
        call["input"],
        bias=call["bias"],
        from_rows=lambda y: y.movedim(-1, 1),
        to_rows=lambda y: y.movedim(1, -1),
        split=1,
        convolution=Convolution(call["stride"], call["padding"], call["dilation"], call["groups"]),
    )


def _convolution_transpose(args: tuple, kwargs: dict, weight: Any) -> Matmul | None:
    call = _CONVOLUTION_TRANSPOSE.bind(args, kwargs)
    if call is None or call["weight"] is not weight or call["input"].dim() != weight.dim():
        return None
    if call["groups"] != 1:
        return None
    return Matmul(
        f"conv_transpose{weight.dim() - 2}d",
        "rows",
        call["input"],
        bias=call["bias"],
        split=1,
        convolution=Convolution(
            call["stride"],
            call["padding"],
            call["dilation"],
            output_padding=call["output_padding"],
        ),
    )


def patches(matmul: Matmul, kernel: tuple[int, ...]) -> Tensor:
    """The rows that a convolution multiplies its matrix by: (B·L·groups, in / groups · kernel).

    For a transposed one its input's pixels, (B·L, in).
    """
    call, x, dims = matmul.convolution, matmul.x, len(kernel)
    assert call is not None
    if call.output_padding is not None:
        return x.movedim(1, -1).reshape(-1, x.shape[1])

    def each(value: Any) -> tuple[int, ...]:
        values = (value,) if isinstance(value, int) else tuple(value)
        return values * (dims // len(values))

    stride, dilation, padding = each(call.stride), each(call.dilation), call.padding
    if isinstance(padding, str):
        missing = [
            d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, kernel, strict=True)
        ]
        sides = [(both_sides // 2, both_sides - both_sides // 2) for both_sides in missing]
    else:
        sides = [(side, side) for side in each(padding)]
    x = F.pad(x, [side for axis in reversed(sides) for side in axis])
    for k in range(dims):  # (B, in, places, kernel)
        x = x.unfold(2 + k, dilation[k] * (kernel[k] - 1) + 1, stride[k])[..., :: dilation[k]]
    return x.movedim(1, dims + 1).reshape(-1, x.shape[1] // call.groups * math.prod(kernel))


_READERS: dict[Any, Reader] = {
    F.linear: _linear,
    F.embedding: _embedding,
    F.embedding_bag: _bag,
    torch.addmm: _addmm,
    torch.Tensor.addmm: _addmm,
    torch.einsum: read_einsum,
    torch.tensordot: read_tensordot,
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _convolution),
    **dict.fromkeys(
        (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), _convolution_transpose
    ),
    **dict.fromkeys(
        (
            torch.mm,
            torch.Tensor.mm,
            torch.bmm,
            torch.Tensor.bmm,
            torch.matmul,
            torch.Tensor.matmul,
            torch.Tensor.__matmul__,
            operator.matmul,
        ),
        _matmul,
    ),
    **{
        getattr(module, name): _grouped
        for module, name in ((F, "grouped_mm"), (torch, "_grouped_mm"))
        if hasattr(module, name)
    },
}


def read(
    func: Any, args: tuple, kwargs: dict, weight: Any, frame: Frame | None = None
) -> Matmul | None:
    """The call as a matmul against ``weight`` (compared by identity), or None if it is not one.

    ``frame`` says how ``weight`` looks at its parameter; a lazy weight brings its own.
    """
    if isinstance(weight, Tensor) and weight.dim() < 2:
        return None  # a bias, a scale: no matrix
    looked_at = frame or getattr(weight, "frame", None) or Frame()
    try:
        reader = _READERS.get(func)
    except TypeError:  # an unhashable callable is none of ours
        return None
    if func is torch.Tensor.__rmatmul__:  # dynamo finds no function of Python's in a dict
        reader = _reversed_matmul
    if reader is None and "grouped_mm_fallback" in str(func):
        reader = _grouped_fallback
    matmul = None if reader is None else reader(args, kwargs, weight)
    return matmul if matmul is not None and looked_at.allows(matmul) else None
