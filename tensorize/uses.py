"""How torch functions use a weight: each call is read as one matmul against a matrix.

Two readers stand on this one table. The observer (``Observer``) watches a dense model run and
learns which parameters are used by matmuls, on which inputs; the lazy weight (``weight.py``)
stands in for a parameter and answers the same calls with a contraction. So whatever is found can
also be run, and whatever is run was found in the same way.

In this file W is the parameter's own matrix (rows M, columns N). ``contract`` says which side of W
meets the input: ``"columns"`` for y = x Wᵀ, ``"rows"`` for y = x W, ``"lookup"`` for rows of W.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

Layout = Callable[[Tensor], Tensor]


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _swap(tensor: Tensor) -> Tensor:
    return tensor.transpose(-1, -2)


@dataclass(frozen=True)
class Matmul:
    """A call read as ``from_rows(x · W) + bias``.

    ``x`` has the contracted index last (or holds row numbers, for a lookup). ``from_rows`` turns
    the product, whose last index is the output's, into the layout that the call returns, and
    ``to_rows`` turns it back. ``offsets`` are the ends of each expert's rows in a grouped matmul;
    ``convolution`` holds (stride, padding, dilation), and then x is the image and its patches are
    the rows.
    """

    kind: str
    contract: str
    x: Tensor
    bias: Tensor | None = None
    from_rows: Layout = _same
    to_rows: Layout = _same
    offsets: Tensor | None = None
    padding_idx: int | None = None
    convolution: tuple[Any, Any, Any] | None = None


@dataclass(frozen=True)
class Frame:
    """How a tensor that the model holds derives from a matrix.

    It may be transposed, of one expert in a stack, or (a convolution's) in another ``shape``.
    """

    transposed: bool = False
    expert: Any = None
    shape: tuple[int, ...] | None = None

    def allows(self, matmul: Matmul) -> bool:
        """Whether a call on what this frame shows can be told in terms of the parameter itself."""
        if matmul.contract == "lookup":
            return not self.transposed
        return matmul.convolution is None or (not self.transposed and self.expert is None)

    def turn(self, matmul: Matmul) -> Matmul:
        """The same call, told in terms of the parameter itself."""
        if not self.transposed or matmul.contract == "lookup":
            return matmul
        flipped = "rows" if matmul.contract == "columns" else "columns"
        return replace(matmul, contract=flipped)


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


def _matmul(args: tuple, kwargs: dict, weight: Any) -> Matmul | None:
    call = _MATMUL.bind(args, kwargs)
    if call is None or call["out"] is not None or call["input"] is call["other"]:
        return None
    if call["other"] is weight:
        return Matmul("matmul", "rows", call["input"])
    x = call["other"]
    if x.dim() == 1:
        return Matmul("matmul", "columns", x)
    return Matmul("matmul", "columns", _swap(x), from_rows=_swap, to_rows=_swap)


def _einsum(args: tuple, kwargs: dict, weight: Any) -> Matmul | None:
    if kwargs or len(args) < 2 or not isinstance(args[0], str):
        return None
    operands = args[1:] if len(args) > 2 else args[1]
    if not isinstance(operands, list | tuple) or len(operands) != 2:
        return None
    equation = args[0].replace(" ", "")
    if "->" not in equation or "." in equation:
        return None
    inputs, output = equation.split("->")
    terms = inputs.split(",")
    position = 1 if operands[1] is weight else 0
    x, w_axes, x_axes = operands[1 - position], terms[position], terms[1 - position]
    if x is weight or len(w_axes) != 2 or any(len(set(t)) != len(t) for t in (*terms, output)):
        return None
    summed = [axis for axis in w_axes if axis in x_axes and axis not in output]
    kept = [axis for axis in w_axes if axis not in x_axes and axis in output]
    if len(summed) != 1 or len(kept) != 1:
        return None
    if x.shape[x_axes.index(summed[0])] != weight.shape[w_axes.index(summed[0])]:
        return None  # einsum repeats an axis of size 1
    free = [axis for axis in x_axes if axis != summed[0]]
    if set(free) | set(kept) != set(output):
        return None
    rows = "".join(free) + kept[0]
    to_output = [rows.index(axis) for axis in output]
    to_rows = [output.index(axis) for axis in rows]
    x = x.permute([x_axes.index(axis) for axis in (*free, summed[0])])
    contract = "rows" if w_axes[0] == summed[0] else "columns"
    return Matmul(
        "einsum",
        contract,
        x,
        from_rows=lambda y: y.permute(to_output),
        to_rows=lambda y: y.permute(to_rows),
    )


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


def _convolution(args: tuple, kwargs: dict, weight: Any) -> Matmul | None:
    call = _CONVOLUTION.bind(args, kwargs)
    if call is None or call["weight"] is not weight or call["groups"] != 1:
        return None
    x, dims = call["input"], weight.dim() - 2
    if x.dim() != weight.dim():
        return None
    return Matmul(
        f"conv{dims}d",
        "columns",
        x,
        bias=call["bias"],
        from_rows=lambda y: y.movedim(-1, 1),
        to_rows=lambda y: y.movedim(1, -1),
        convolution=(call["stride"], call["padding"], call["dilation"]),
    )


def patches(matmul: Matmul, kernel: tuple[int, ...]) -> Tensor | None:
    """The rows (B·L, in·kernel) that a 1- or 2-dimensional convolution multiplies its weight by.

    None where they cannot be told: three dimensions, or padding given as a word.
    """
    assert matmul.convolution is not None
    stride, padding, dilation = matmul.convolution
    x, dims = matmul.x, len(kernel)
    if dims > 2 or isinstance(padding, str):
        return None

    def both(value: Any, absent: int) -> tuple[int, ...]:
        values = (value,) if isinstance(value, int) else tuple(value)
        return (absent, *values) if dims == 1 else values * (2 // len(values))

    if dims == 1:
        x, kernel = x.unsqueeze(-2), (1, *kernel)
    columns = F.unfold(x, kernel, both(dilation, 1), both(padding, 0), both(stride, 1))
    return columns.transpose(1, 2).reshape(-1, columns.shape[1])


_READERS: dict[Any, Reader] = {
    F.linear: _linear,
    F.embedding: _embedding,
    torch.addmm: _addmm,
    torch.Tensor.addmm: _addmm,
    torch.einsum: _einsum,
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _convolution),
    **dict.fromkeys(
        (
            torch.mm,
            torch.Tensor.mm,
            torch.matmul,
            torch.Tensor.matmul,
            torch.Tensor.__matmul__,
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
    if reader is None and "grouped_mm_fallback" in str(func):
        reader = _grouped_fallback
    matmul = None if reader is None else reader(args, kwargs, weight)
    return matmul if matmul is not None and looked_at.allows(matmul) else None


# ------------------------------------------------------------------- calls that are views

_TRANSPOSES = (torch.t, torch.Tensor.t, torch.transpose, torch.Tensor.transpose)
_TRANSPOSED_PROPERTIES = {2: ("T", "mT"), 3: ("mT",)}
_IDENTITIES = (torch.Tensor.contiguous, torch.Tensor.detach, torch.detach)
_CASTS = (torch.Tensor.to, torch.Tensor.type_as, torch.Tensor.float, torch.Tensor.type)


def view(func: Any, args: tuple, kwargs: dict, frame: Frame, weight: Any) -> Frame | None:
    """The frame of the result if the call only looks at ``weight`` in another way, else None."""
    if not args or args[0] is not weight:
        return None
    dims = weight.dim()
    name = getattr(func, "__name__", "")
    owner = getattr(func, "__self__", None)
    if func in _IDENTITIES or (func in _CASTS and _keeps_dtype(func, args, kwargs, weight)):
        return frame
    if func is torch.Tensor.view_as and len(args) == 2 and args[1].shape == weight.shape:
        return frame
    if dims not in (2, 3) or frame.shape is not None:
        return None  # a convolution's weight
    if name == "__get__" and getattr(owner, "__name__", "") in _TRANSPOSED_PROPERTIES[dims]:
        return replace(frame, transposed=not frame.transposed)
    if func in _TRANSPOSES:
        axes = sorted(a % dims for a in args[1:3] if isinstance(a, int)) or [0, 1]
        axes = sorted(a % dims for a in kwargs.values()) or axes
        if axes == [dims - 2, dims - 1] and (dims == 2 or len(args) + len(kwargs) == 3):
            return replace(frame, transposed=not frame.transposed)
        return None
    if func is torch.Tensor.__getitem__ and dims == 3 and _is_one(args[1]):
        return replace(frame, expert=args[1])
    return None


def _is_one(index: Any) -> bool:
    if isinstance(index, bool):
        return False
    return isinstance(index, int) or (
        isinstance(index, Tensor)
        and index.dim() == 0
        and not index.is_floating_point()
        and index.dtype != torch.bool  # a mask: it adds an axis
    )


def _keeps_dtype(func: Any, args: tuple, kwargs: dict, weight: Any) -> bool:
    if func is torch.Tensor.float:
        return weight.dtype == torch.float32
    wanted = [a for a in (*args[1:], *kwargs.values()) if a is not None]
    for value in wanted:
        dtype = value.dtype if isinstance(value, Tensor) else value
        device = value.device if isinstance(value, Tensor) else value
        if isinstance(dtype, torch.dtype) and dtype != weight.dtype:
            return False
        if isinstance(device, torch.device | str) and torch.device(device) != weight.device:
            return False
    return bool(wanted) and func in (torch.Tensor.to, torch.Tensor.type_as)


# ------------------------------------------------------------------------------- the observer


class Observer(TorchFunctionMode):
    """Watches a model run and tells of every use of its parameters.

    Args:
        parameters: the parameters to watch, by qualified name.
        on_matmul: called with (name, frame, matmul, output) for each matmul against a parameter;
            what it returns is what the model goes on with.
        on_other: called with (name, function name) for every other use that gives a tensor.
        frozen: hand the functions detached parameters, so that no gradient of a weight is computed.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        on_matmul: Callable[[str, Frame, Matmul, Tensor], Tensor],
        on_other: Callable[[str, str], None] | None = None,
        *,
        frozen: bool = False,
    ) -> None:
        super().__init__()
        self._names = {id(p): (name, Frame()) for name, p in parameters}
        self._alive: list[Tensor] = []  # a freed view's id may be given to another tensor
        self._on_matmul, self._on_other, self._frozen = on_matmul, on_other, frozen

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        watched = [t for t in _tensors(args, kwargs) if id(t) in self._names]
        if not self._frozen:
            result = func(*args, **kwargs)
        else:
            free_args, free_kwargs = pytree.tree_map(_detach, (args, kwargs))
            result = func(*free_args, **free_kwargs)
        names = [self._names[id(weight)][0] for weight in watched]
        for weight, name in zip(watched, names, strict=True):
            result = self._tell(func, args, kwargs, weight, names.count(name) == 1, result)
        return result

    def _tell(
        self, func: Any, args: tuple, kwargs: dict, weight: Tensor, once: bool, result: Any
    ) -> Any:
        name, frame = self._names[id(weight)]
        matmul = read(func, args, kwargs, weight, frame)
        if matmul is not None and once:  # W Wᵀ is no matmul against a constant
            return self._on_matmul(name, frame, frame.turn(matmul), result)
        if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(result)):
            return result  # asked for a shape, a dtype, a flag
        derived = view(func, args, kwargs, frame, weight)
        if derived is not None:
            self._names[id(result)] = (name, derived)
            self._alive.append(result)
        elif self._on_other is not None:
            self._on_other(name, getattr(func, "__name__", str(func)))
        return result


def _tensors(args: tuple, kwargs: dict) -> list[Tensor]:
    leaves = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            leaves.append(value)
        elif isinstance(value, list | tuple):
            leaves.extend(v for v in value if isinstance(v, Tensor))
    return leaves


def _detach(value: Any) -> Any:
    return value.detach() if isinstance(value, nn.Parameter) else value
