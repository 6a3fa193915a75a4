"""How torch functions use a weight: each call is read as one matmul against a matrix.

Two readers stand on this one table. The observer (``observer.py``) watches a dense model run and
learns which parameters are used by matmuls, on which inputs; the lazy weight (``weight.py``)
stands in for a parameter and answers the same calls with a contraction. So whatever is found can
also be run, and whatever is run was found in the same way.

In this file W is the parameter's own matrix (rows M, columns N). ``contract`` says which side of W
meets the input: ``"columns"`` for y = x Wᵀ, ``"rows"`` for y = x W, ``"lookup"`` for rows of W.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from string import ascii_letters
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Layout = Callable[[Tensor], Tensor]


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _swap(tensor: Tensor) -> Tensor:
    return tensor.transpose(-1, -2)


@dataclass(frozen=True)
class Convolution:
    """The arguments of a convolution; ``output_padding`` is not None where it is transposed."""

    stride: Any
    padding: Any
    dilation: Any
    groups: int = 1
    output_padding: Any = None


@dataclass(frozen=True)
class Matmul:
    """A call read as ``from_rows(x · W) + bias``.

    ``x`` has the contracted index last (or holds row numbers, for a lookup). ``from_rows`` turns
    the product, whose last index is the output's, into the layout that the call returns, and
    ``to_rows`` turns it back. ``split`` is the number of leading axes of the weight that make up
    its rows, 0 where its last two axes are the matrix; then a third axis in front stacks several,
    and x meets each of them: ``stacked``, or by the ends of each one's rows, ``offsets``.
    ``convolution``: x is the image, and its patches are the rows. ``bag``: the other arguments of
    an ``embedding_bag``.
    """

    kind: str
    contract: str
    x: Tensor
    bias: Tensor | None = None
    from_rows: Layout = _same
    to_rows: Layout = _same
    offsets: Tensor | None = None
    padding_idx: int | None = None
    split: int = 0
    stacked: bool = False
    convolution: Convolution | None = None
    bag: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Frame:
    """How a tensor that the model holds derives from a parameter's matrix.

    It may be transposed, of one ``expert`` in a stack or of several (a tensor of their numbers),
    some of the ``rows`` (first, end), or in another ``shape`` than the matrix (a convolution's, a
    projection of several heads).
    """

    transposed: bool = False
    expert: Any = None
    shape: tuple[int, ...] | None = None
    rows: tuple[int, int] | None = None

    def allows(self, matmul: Matmul) -> bool:
        """Whether a call on what this frame shows can be told in terms of the parameter itself."""
        if matmul.contract == "lookup":
            return not self.transposed and self.rows is None
        if matmul.split:
            return not self.transposed and self.expert is None and self.rows is None
        return True

    def turn(self, matmul: Matmul) -> Matmul:
        """The same call, told in terms of the parameter itself."""
        if not self.transposed or matmul.contract == "lookup":
            return matmul
        flipped = "rows" if matmul.contract == "columns" else "columns"
        return replace(matmul, contract=flipped)

    def slice_rows(self, first: int, end: int) -> Frame:
        """Rows first … end of what this frame shows."""
        start = 0 if self.rows is None else self.rows[0]
        return replace(self, rows=(start + first, start + end))


# ------------------------------------------------------------------- calls that are matmuls

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
    return Matmul("matmul", "columns", _swap(x), None, _swap, _swap, stacked=stacked)


def _einsum(args: tuple, kwargs: dict, weight: Any) -> Matmul | None:
    """The weight's axes split into summed and kept ones, which stand together, so that it is a
    matrix without a copy; one more axis in front stacks several.
    """
    if kwargs or len(args) < 2 or not isinstance(args[0], str):
        return None
    operands = args[1:] if len(args) > 2 else args[1]
    if not isinstance(operands, list | tuple):
        return None
    axes = _axes(args[0], operands)
    if axes is None or any(len(set(term)) != len(term) for term in axes):
        return None
    *terms, output = axes
    found = _others(terms, operands, weight)
    if found is None:
        return None
    w_axes, x_axes, x = found
    shared = [axis for axis in w_axes if axis in x_axes and axis in output]
    summed = [axis for axis in w_axes if axis in x_axes and axis not in output]
    kept = [axis for axis in w_axes if axis not in x_axes and axis in output]
    for axis in (*summed, *shared):
        if x.shape[x_axes.index(axis)] != weight.shape[w_axes.index(axis)]:
            return None  # einsum repeats an axis of size 1
    # Matrices for rows of their own each, or all for the same rows, as the heads of a projection.
    alike = [w_axes[0], *summed, w_axes[-1]] == list(w_axes) and kept == [w_axes[0], w_axes[-1]]
    stack = kept[:1] if alike else shared
    kept = kept[1:] if alike else kept
    matrix = w_axes[len(stack) :]
    if not summed or not kept or len(stack) > 1 or w_axes[: len(stack)] != "".join(stack):
        return None
    if stack and (len(summed), len(kept)) != (1, 1):
        return None
    if matrix not in ("".join(summed + kept), "".join(kept + summed)):
        return None
    lead = [axis for axis in x_axes if axis not in summed and axis not in stack]
    if stack and not lead:
        return None  # a row for each matrix, or one for all of them
    if stack:  # right before the rows: (..., E, rows, width)
        lead.insert(-1, stack[0])
    if {*lead, *kept} != set(output):
        return None
    sizes = [weight.shape[w_axes.index(axis)] for axis in kept]
    order = [*lead, *kept]
    to_output, to_rows = [order.index(a) for a in output], [output.index(a) for a in order]
    x = x.permute([x_axes.index(axis) for axis in (*lead, *summed) if axis in x_axes])
    if alike:
        x = x.unsqueeze(-3)
    if len(summed) > 1:
        x = x.flatten(-len(summed))
    return Matmul(
        "einsum",
        "rows" if matrix[0] == summed[0] else "columns",
        x,
        from_rows=lambda y: y.unflatten(-1, sizes).permute(to_output),
        to_rows=lambda y: y.permute(to_rows).flatten(-len(kept)),
        split=0 if len(matrix) == 2 else len(summed if matrix[0] == summed[0] else kept),
        stacked=bool(stack),
    )


def _axes(equation: str, operands: Sequence[Any]) -> list[str] | None:
    """An einsum's axes, a letter each: of every operand, then of the output.

    Dots stand for letters that the equation does not use, counted from the right; an output that is
    not given holds the axes that come once, in the order of the alphabet.
    """
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    if inputs.count(",") + 1 != len(operands):
        return None
    if not arrow:
        once = [axis for axis in inputs if axis.isalpha() and inputs.count(axis) == 1]
        output = "..." * ("..." in inputs) + "".join(sorted(once))
    unused = "".join(axis for axis in ascii_letters if axis not in equation)
    terms, longest = [], 0
    for term, operand in zip(inputs.split(","), operands, strict=True):
        dots = operand.dim() - len(term.replace("...", ""))
        if dots < 0 or dots > len(unused) or (dots and "..." not in term):
            return None
        terms.append(term.replace("...", unused[len(unused) - dots :]))
        longest = max(longest, dots)
    return [*terms, output.replace("...", unused[len(unused) - longest :])]


def _others(
    terms: Sequence[str], operands: Sequence[Any], weight: Any
) -> tuple[str, str, Tensor] | None:
    """The weight's axes, and all other operands as one: its axes and its values.

    Several others are multiplied first, where that is no larger than one of them.
    """
    own = [term for term, value in zip(terms, operands, strict=True) if value is weight]
    rest = [(t, v) for t, v in zip(terms, operands, strict=True) if v is not weight]
    if len(own) != 1 or not rest:
        return None
    x_axes, x = rest[0]
    for axes, value in rest[1:]:  # dynamo knows no max() with a key
        if len(axes) > len(x_axes):
            x_axes, x = axes, value
    if len(rest) > 1:
        if any(set(t) - set(x_axes) or not isinstance(v, Tensor) for t, v in rest):
            return None
        x = torch.einsum(f"{','.join(t for t, _ in rest)}->{x_axes}", *(v for _, v in rest))
    return own[0], x_axes, x


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


def patches(matmul: Matmul, kernel: tuple[int, ...]) -> Tensor | None:
    """The rows that a convolution multiplies its matrix by: (B·L·groups, in / groups · kernel).

    For a transposed one its input's pixels, (B·L, in). None in three dimensions.
    """
    call, x, dims = matmul.convolution, matmul.x, len(kernel)
    assert call is not None
    if call.output_padding is not None:
        return x.movedim(1, -1).reshape(-1, x.shape[1])
    if dims > 2:
        return None

    def both(value: Any, absent: int) -> tuple[int, ...]:
        values = (value,) if isinstance(value, int) else tuple(value)
        return (absent, *values) if dims == 1 else values * (2 // len(values))

    if dims == 1:
        x, kernel = x.unsqueeze(-2), (1, *kernel)
    padding, dilation = call.padding, both(call.dilation, 1)
    if isinstance(padding, str):
        missing = [
            d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, kernel, strict=True)
        ]
        sides = [(both_sides // 2, both_sides - both_sides // 2) for both_sides in missing]
        x, padding = F.pad(x, (*sides[1], *sides[0])), 0
    columns = F.unfold(x, kernel, dilation, both(padding, 0), both(call.stride, 1))
    return columns.transpose(1, 2).reshape(-1, columns.shape[1] // call.groups)


_READERS: dict[Any, Reader] = {
    F.linear: _linear,
    F.embedding: _embedding,
    F.embedding_bag: _bag,
    torch.addmm: _addmm,
    torch.Tensor.addmm: _addmm,
    torch.einsum: _einsum,
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
