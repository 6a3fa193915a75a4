"""Contractions against a factorized weight, as functions of tensors.

The callable of a contraction plan comes from a backend (``codegen``), which this layer does not
know: ``api`` registers the backends when tensorize is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tensorize.base.tensors import is_index
from tensorize.capture.matmul import Convolution
from tensorize.formats.low_rank import widen
from tensorize.formats.order import columns
from tensorize.formats.registry import format_of
from tensorize.ir.spec import Spec
from tensorize.weight.contractions import Contractions
from tensorize.weight.onednn import library
from tensorize.weight.precision import autocast, in_float32, widened


def matmul(
    spec: Spec,
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
    form = format_of(spec)
    if form.in_integers(spec, cores, x, contract):
        x, _ = autocast(x, ())
        return form.multiply(spec, cores, x, contract, bias)
    if in_float32(x, form.width(cores) if run is None else None):
        wide = [core if is_index(core) else core.float() for core in cores]
        bias = None if bias is None else bias.float()
        return matmul(spec, contractions, wide, x.float(), contract, bias).to(x.dtype)
    if run is not None:
        return run(x, cores, bias)
    if spec.precision is not None:  # what makes the numbers knows of no autocast
        x, cores = autocast(x, cores)
    return form.multiply(spec, cores, x, contract, bias)


def lookup(
    spec: Spec,
    cores: Sequence[Tensor],
    rows: Tensor,
    padding_idx: int | None = None,
    kernel: Any = None,
) -> Tensor:
    """Rows of W by number: ``rows`` of any shape, the result (*rows.shape, N); no table is built.

    ``kernel``: what looks up in one launch.
    """
    if kernel is not None and kernel.takes(cores[0]):
        result = kernel.lookup(rows, cores)
    else:
        result = format_of(spec).lookup(spec, cores, rows)
    traced = torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    if padding_idx is None or not (result.requires_grad or traced):
        return result
    # As nn.Embedding: what arrives at the padding row changes nothing.
    padding = rows == padding_idx % spec.shape[-2]
    return torch.where(padding.unsqueeze(-1), result.detach(), result)


def grouped_matmul(cores: Sequence[Tensor], x: Tensor, offsets: Tensor, contract: str) -> Tensor:
    """Each expert's rows of x (S, N) against its own low-rank weight; offsets: their ends (E,)."""

    def multiply(x: Tensor, weight: Tensor) -> Tensor:
        return grouped(x, weight, offsets)

    left, right, *order = cores
    if not order:
        return _through(left, right, x, contract, multiply)
    # A row's columns are in the order of its expert; behind the last one's rows it is any.
    rows = torch.arange(x.shape[0], dtype=offsets.dtype, device=x.device)
    experts = torch.bucketize(rows, offsets, right=True).clamp(max=left.shape[0] - 1)
    every = columns(order[0], sum(right.shape[-2:]))
    return _in_order(left, right, every[experts].long(), x, contract, multiply)


def grouped(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Rows of x (S, K) between two offsets times their expert's weight (E, K, N)."""
    # ``grouped_mm`` wants strides of a multiple of 16 bytes, so odd sizes are padded with zeros,
    # and the first of more components are copied.
    inner, outer = (-size % (16 // x.element_size()) for size in weight.shape[1:])
    if inner or outer:
        x, weight = F.pad(x, (0, inner)), F.pad(weight, (0, outer, 0, inner))
    elif not weight.mT.is_contiguous():
        weight = weight.contiguous()
    # Compiled graphs know ``grouped_mm`` in bfloat16 only: for others it is one opaque operation.
    opaque = torch.compiler.is_compiling() and x.dtype != torch.bfloat16
    y = _grouped_mm(x, weight, offsets) if opaque else F.grouped_mm(x, weight, offs=offsets)
    return y[:, : y.shape[1] - outer]


Multiply = Callable[[Tensor, Tensor], Tensor]


def _through(left: Tensor, right: Tensor, x: Tensor, contract: str, multiply: Multiply) -> Tensor:
    """x times both factors of each matrix of a stack."""
    first, second = (right.mT, left.mT) if contract == "columns" else (left, right)
    return multiply(multiply(x, first), second)


def _in_order(
    left: Tensor, rest: Tensor, columns: Tensor, x: Tensor, contract: str, multiply: Multiply
) -> Tensor:
    """The same without an identity in the second factor; ``columns``: the order of each row's."""
    if contract == "columns":
        kept, others = x.gather(-1, columns).tensor_split([rest.shape[-2]], dim=-1)
        return multiply(kept + multiply(others, rest.mT), left.mT)
    narrow = multiply(x, left)
    together = torch.cat([narrow, multiply(narrow, rest)], dim=-1)
    return torch.empty_like(together).scatter(-1, columns.expand_as(together), together)


@torch.library.register_fake("tensorize::onednn_linear", lib=library)
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


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
    left, right, *order = cores
    if not order:
        y = _through(left, right, x, contract, torch.matmul)
    else:
        every = columns(order[0], sum(right.shape[-2:])).long().unsqueeze(-2)
        if contract == "columns":  # one x for all of the matrices has as many orders
            shape = torch.broadcast_shapes(x.shape, every.shape)
            x, every = x.expand(shape), every.expand(shape)
        y = _in_order(left, right, every, x, contract, torch.matmul)
    return y if bias is None else y + bias


def bag_lookup(cores: Sequence[Tensor], rows: Tensor, bag: Mapping[str, Any]) -> Tensor:
    """Sums or means of rows of a low-rank table: of the narrow rows first, then widened once."""
    left, right, *order = cores
    narrow = F.embedding_bag(rows, left, **bag)
    return widen(narrow, right, *order) if order else F.linear(narrow, right.t())


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
