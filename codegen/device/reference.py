"""What one launch computes, by the library's matmuls: what kernels are timed against."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch.nn.functional as F
from torch import Tensor

from tensorize.formats import low_rank
from tensorize.ir.work import Norm, Work
from tensorize.weight import products
from tensorize.weight.contractions import contractions

_ACTIVATE: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda y: y,
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
}


def run(work: Work, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The results of a work, in any dtype; ``inputs`` are in the order that ``Work`` says."""
    operands = iter(inputs)
    x = next(operands)
    if work.norm is not None:
        x = _normed(work.norm, x, operands)
    found: list[Tensor] = []
    product: Tensor | None = None
    for spec in work.specs:
        left = next(operands)
        count = len(spec.cores) - 1 + len(spec.indices)
        others = [] if product is not None else [next(operands) for _ in range(count)]
        bias = next(operands) if work.epilogue.bias else None
        if work.shared:
            product = low_rank.product(x, *others) if product is None else product
            found.append(F.linear(product, left, bias))
        else:
            cores = (left, *others)
            found.append(products.matmul(spec, contractions(spec), cores, x, work.contract, bias))
    if work.gated:
        found = [_ACTIVATE[work.epilogue.activation](found[0]) * found[1]]
    else:
        found = [_ACTIVATE[work.epilogue.activation](y) for y in found]
    if work.epilogue.scale is not None:
        found = [y * work.epilogue.scale for y in found]
    return [y + next(operands) for y in found] if work.epilogue.residual else found


def _normed(norm: Norm, x: Tensor, operands: Iterator[Tensor]) -> Tensor:
    gain = next(operands)
    if norm.kind == "rms":
        return F.rms_norm(x, x.shape[-1:], gain, norm.eps)
    return F.layer_norm(x, x.shape[-1:], gain, next(operands), norm.eps)
