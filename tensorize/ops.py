"""Contractions against a factorized weight, as functions of tensors.

The callable of a contraction plan comes from a backend (``codegen``), which this layer does not
know: ``api`` registers the backends when tensorize is imported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from tensorize import hooks
from tensorize.ir import BLOCK, LOW_RANK, TTSpec
from tensorize.uses import Convolution

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

    def breakpoints(self, uses: Sequence[tuple[TTSpec, str]], device: str) -> tuple[int, ...]:
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
    if _backend is None:
        raise RuntimeError("no contraction backend is registered: import tensorize first")
    return _backend


@lru_cache(maxsize=4096)
def contractions(
    spec: TTSpec,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    breakpoints: tuple[int, ...] | None = None,
    memory_limit: int | None = None,
) -> Contractions:
    """How x meets a weight of this spec; low rank needs no plan: its two matmuls are the order.

    ``memory_limit``: the most elements that one call saves for its backward pass, where that can be
    (0: as few as possible). What is not saved is computed again. Low rank then has a plan too.
    """
    if spec.format == LOW_RANK and memory_limit is None:
        return {}
    found = {}
    for contract in ("columns", "rows"):
        asked = Asked(spec, contract, device, multiplied_in(dtype, device), breakpoints)
        found[contract] = _Differentiated(asked, memory_limit, _registered().contraction(asked))
    return found


def common_breakpoints(
    uses: Sequence[tuple[TTSpec, torch.dtype]], device: str = "cpu"
) -> tuple[int, ...]:
    """The batches at which weights of these specs and dtypes, in one model, change their order."""
    planned = [(s, multiplied_in(d, device)) for s, d in uses if s.format != LOW_RANK]
    return _registered().breakpoints(planned, device) if planned else ()


def multiplied_in(dtype: torch.dtype, device: str) -> str:
    """The dtype that cores of a dtype meet their input in, by its name."""
    slow = device == "cpu" and dtype in SLOW_ON_CPU
    return str(torch.float32 if slow else dtype).removeprefix("torch.")


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
        x, cores = _autocast(x, cores)
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


# Asked once: dynamo cannot trace the question in torch 2.11.
_AUTOCAST = frozenset(
    device for device in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(device)
)


def _autocast(x: Tensor, cores: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
    """In the dtype that autocast gives matmuls: what is saved is then of one dtype."""
    device = x.device.type
    if device not in _AUTOCAST or not torch.is_autocast_enabled(device):
        return x, cores
    dtype = torch.get_autocast_dtype(device)
    return _cast(x, dtype), [_cast(core, dtype) for core in cores]


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)


def widened(x: Tensor, weight: Tensor) -> Tensor:
    """x in the wider dtype of the weight that it meets.

    Code that keeps some weights in float32 (T5) casts their input only where the weight is a
    tensor, which a lazy one is not.
    """
    if x.dtype is weight.dtype:
        return x
    narrow = x.dtype.itemsize < weight.dtype.itemsize and x.is_floating_point()
    if not narrow or torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(weight.dtype)


def _without_instructions() -> frozenset[torch.dtype]:
    names = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    if torch.backends.mkldnn.is_available():
        ask = {
            dtype: getattr(torch.ops.mkldnn, f"_is_mkldnn_{n}_supported")
            for dtype, n in names.items()
        }
        return frozenset(dtype for dtype, supported in ask.items() if not supported())
    return frozenset(names)


SLOW_ON_CPU = _without_instructions()
"""Dtypes that torch multiplies number by number on this processor: measured on one Zen 3 core, at 1
to 10 GFLOP/s where float32 has 60."""

_CAST = 96
"""Rank for each row up to which casting two factors to float32 takes less than it saves."""


def in_float32(x: Tensor, rank: int | None = None) -> bool:
    """Whether a product of x with a weight is faster in float32, casts included.

    Of a tensor train it always is where x has such a dtype, because a core meets many entries of
    every row; in low rank (of this ``rank``) from some rows on. Not where gradients are recorded,
    which would keep both copies.
    """
    if x.dtype not in SLOW_ON_CPU or x.device.type != "cpu" or torch.is_grad_enabled():
        return False
    if torch.is_autocast_enabled("cpu"):
        return False
    if rank is None:
        return True
    # A graph is not to be compiled again for this.
    return not torch.compiler.is_compiling() and rank * x.shape[-1] < _CAST * x.numel()


def matmul(
    contractions: Contractions,
    cores: Sequence[Tensor],
    x: Tensor,
    contract: str,
    bias: Tensor | None = None,
) -> Tensor:
    """x Wᵀ + bias (``contract="columns"``) or x W + bias (``"rows"``), W never built for low rank.

    ``x`` is (..., N) or (..., M), the result (..., M) or (..., N); ``contractions`` are those of
    the weight's spec.
    """
    x = widened(x, cores[0])
    run: Any = contractions.get(contract)
    if getattr(run, "takes_bias", False):
        return run(x, cores, bias)
    if in_float32(x, cores[1].shape[0] if run is None else None):
        wide = [core.float() for core in cores]
        bias = None if bias is None else bias.float()
        return matmul(contractions, wide, x.float(), contract, bias).to(x.dtype)
    if run is not None:
        return run(x, cores, bias)
    left, right = cores
    if contract == "columns":
        return F.linear(F.linear(x, right), left, bias)
    return F.linear(F.linear(x, left.t()), right.t(), bias)


def lookup(
    spec: TTSpec,
    cores: Sequence[Tensor],
    rows: Tensor,
    padding_idx: int | None = None,
    kernel: Any = None,
) -> Tensor:
    """Rows of W by number: ``rows`` of any shape, the result (*rows.shape, N); no table is built.

    A row number is split into one digit a core (mixed radix in the row modes), each core gives the
    slice of its digit, and the slices are multiplied from left to right (Hrinchuk et al. 2020).
    ``kernel``: what looks up in one launch.
    """
    if kernel is not None and kernel.takes(cores[0]):
        result = kernel.lookup(rows, cores)
    elif spec.format == LOW_RANK:
        left, right = cores
        result = F.linear(F.embedding(rows, left), right.t())
    elif spec.format == BLOCK:
        result = _lookup_block(spec, cores, rows)
    else:
        result = _lookup_train(spec, cores, rows)
    if padding_idx is None or not result.requires_grad:
        return result
    # As nn.Embedding: what arrives at the padding row changes nothing.
    padding = rows == padding_idx % math.prod(spec.row_modes)
    return torch.where(padding.unsqueeze(-1), result.detach(), result)


def _lookup_train(spec: TTSpec, cores: Sequence[Tensor], rows: Tensor) -> Tensor:
    remaining = rows.reshape(-1)
    digits: list[Tensor] = []
    for mode in reversed(spec.row_modes[1:]):
        digits.append(remaining % mode)
        remaining = torch.div(remaining, mode, rounding_mode="floor")
    digits.append(remaining)  # not reduced: the first core refuses a row that the table lacks
    digits.reverse()
    # result: (B, columns so far, rank); a core's slice: (B, rank, columns, next rank)
    result: Tensor | None = None
    ranks = (1, *spec.ranks, 1)
    for k, core in enumerate(cores):
        mode, columns = spec.row_modes[k], spec.column_modes[k]
        table = core.reshape(ranks[k], mode, columns, ranks[k + 1]).transpose(0, 1)
        part = F.embedding(digits[k], table.reshape(mode, -1))
        part = part.reshape(-1, ranks[k], columns * ranks[k + 1])
        if result is None:
            result = part
        else:
            so_far = math.prod(spec.column_modes[:k])
            result = torch.bmm(result.reshape(-1, so_far, ranks[k]), part)
    assert result is not None
    return result.reshape(*rows.shape, math.prod(spec.column_modes))


def _lookup_block(spec: TTSpec, cores: Sequence[Tensor], rows: Tensor) -> Tensor:
    """Of every block of columns the left core's slice of a row, times the right core's block."""
    (m0, m1), (n0, n1), (rank,) = spec.row_modes, spec.column_modes, spec.ranks
    left, right = cores[0].reshape(m1, m0, n0 * rank), cores[1].reshape(n0, m1, rank * n1)
    outer = torch.div(rows, m1, rounding_mode="floor")
    inner = rows - outer * m1
    place = torch.where((outer >= 0) & (outer < m0), inner * m0 + outer, -1)  # -1 is refused
    slices = F.embedding(place, left.reshape(m1 * m0, -1))
    blocks = F.embedding(inner, right.transpose(0, 1).reshape(m1, -1))
    slices = slices.reshape(*rows.shape, n0, 1, rank)
    result = slices @ blocks.reshape(*rows.shape, n0, rank, n1)
    return result.reshape(*rows.shape, n0 * n1)


def grouped_matmul(cores: Sequence[Tensor], x: Tensor, offsets: Tensor, contract: str) -> Tensor:
    """Each expert's rows of x (S, N) against its own low-rank weight; offsets: their ends (E,)."""
    left, right = cores
    # ``grouped_mm`` wants strides of a multiple of 16 bytes, so an odd rank is padded with zeros,
    # and the first of more components are copied.
    left, right = left.contiguous(), right.contiguous()
    missing = -left.shape[-1] % (16 // left.element_size())
    if missing:
        left, right = F.pad(left, (0, missing)), F.pad(right, (0, 0, 0, missing))
    if contract == "columns":
        left, right = right.mT, left.mT
    # Compiled graphs know ``grouped_mm`` in bfloat16 only: for others it is one opaque operation.
    opaque = torch.compiler.is_compiling() and x.dtype != torch.bfloat16
    multiply = _grouped_mm if opaque else _torch_grouped_mm
    return multiply(multiply(x, left, offsets), right, offsets)


def _torch_grouped_mm(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return F.grouped_mm(x, weight, offs=offsets)


HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
"""Whether torch was built with oneDNN."""

# Inductor takes torch's own operation with weights that are constants only, so it is wrapped; by a
# library and not ``custom_op``, whose checks take as long as a small product.
_library = torch.library.Library("tensorize", "FRAGMENT")
_library.define("onednn_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


@torch.library.impl(_library, "onednn_linear", "CPU")
def _onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b by oneDNN, in float32, without gradients."""
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")


@torch.library.register_fake("tensorize::onednn_linear", lib=_library)
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


class _OneDnnLinear(torch.autograd.Function):
    """The operation with its gradients, apart: asking for them costs as much as a small product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.ops.tensorize.onednn_linear.default(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = grad_outputs
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        g_rows, x_rows = g.flatten(0, -2), x.flatten(0, -2)
        grad_weight = None
        if of_weight:
            # By oneDNN in 5 to 8 % less time for a wide weight, up to 65 % more for others.
            wide = weight.shape[1] >= weight.shape[0]
            product = onednn_linear if wide else F.linear
            grad_weight = product(g_rows.t(), x_rows.t(), None)
        grad_x = onednn_linear(g, weight.t(), None) if of_x else None
        return grad_x, grad_weight, g_rows.sum(0) if of_bias else None


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b by oneDNN, in float32, with gradients."""
    return cast(Tensor, _OneDnnLinear.apply(x, weight, bias))


@torch.library.custom_op("tensorize::grouped_mm", mutates_args=())
def _grouped_mm(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Rows of x (S, K) between two offsets times their expert's weight (E, K, N)."""
    return F.grouped_mm(x, weight, offs=offsets)


@_grouped_mm.register_fake
def _(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2])


@torch.library.custom_op("tensorize::grouped_outer", mutates_args=())
def _grouped_outer(x: Tensor, y: Tensor, offsets: Tensor) -> Tensor:
    """Xᵀ Y of every expert's rows: (E, K, N)."""
    result = x.new_zeros(offsets.shape[0], x.shape[1], y.shape[1])
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        torch.mm(x[start:end].t(), y[start:end], out=result[expert])
        start = end
    return result


@_grouped_outer.register_fake
def _(x: Tensor, y: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(offsets.shape[0], x.shape[1], y.shape[1])


def _save_grouped(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _grouped_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
    x, weight, offsets = ctx.saved_tensors
    gradient = gradient.contiguous()
    of_x = _grouped_mm(gradient, weight.mT, offsets)
    return of_x, _grouped_outer(x, gradient, offsets), None


_grouped_mm.register_autograd(_grouped_backward, setup_context=_save_grouped)


def stacked_matmul(
    cores: Sequence[Tensor], x: Tensor, contract: str, bias: Tensor | None = None
) -> Tensor:
    """A stack of low-rank weights against x (..., E, B, N): as ``torch.matmul`` broadcasts."""
    left, right = cores
    if contract == "columns":
        left, right = right.mT, left.mT
    y = torch.matmul(torch.matmul(x, left), right)
    return y if bias is None else y + bias


def bag_lookup(cores: Sequence[Tensor], rows: Tensor, bag: Mapping[str, Any]) -> Tensor:
    """Sums or means of rows of a low-rank table: of the narrow rows first, then widened once."""
    left, right = cores
    return F.linear(F.embedding_bag(rows, left, **bag), right.t())


_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def convolution(
    cores: Sequence[Tensor],
    x: Tensor,
    shape: Sequence[int],
    call: Convolution,
    bias: Tensor | None,
) -> Tensor:
    """A convolution of rank r: the kernel's own with r outputs (a group), then one of size 1.

    ``shape`` is the dense weight's: (out, in / groups, *kernel), or (in, out, *kernel) where the
    convolution is transposed; then the one of size 1 comes first.
    """
    dims = len(shape) - 2
    convolve, ones = _CONVOLVE[dims], (1,) * dims
    left, right = cores
    rank = right.shape[-2]
    if call.output_padding is not None:
        narrow = convolve(x, left.t().reshape(rank, shape[0], *ones))
        kernel = right.reshape(rank, *shape[1:])
        sizes = (call.stride, call.padding, call.output_padding, 1, call.dilation)
        return _TRANSPOSED[dims](narrow, kernel, bias, *sizes)
    groups = call.groups
    kernel = right.reshape(groups * rank, *shape[1:])
    narrow = convolve(x, kernel, None, call.stride, call.padding, call.dilation, groups)
    widen = left.reshape(shape[0], rank, *ones)
    return convolve(narrow, widen, bias, groups=groups)
