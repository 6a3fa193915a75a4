"""Weights in codes as operations of torch: one launch for each of their matrices.

A dense weight is one, low rank two; what V's identity adds to the first product is added there. No
kernel gives gradients: with them, weights are numbers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from torch import Tensor

from tensorize.codegen.device import autotune, launch
from tensorize.codegen.device.triton_env import DTYPES, check_device
from tensorize.codegen.triton import coded
from tensorize.codegen.triton.coded import CodedProduct
from tensorize.codegen.triton.module import Source
from tensorize.codegen.triton.roles import NotCovered
from tensorize.formats.low_rank import ordered, together
from tensorize.formats.quantized import Coded
from tensorize.formats.registry import format_of
from tensorize.ir.coded import DenseSpec, QuantizedSpec
from tensorize.ir.precision import FLOAT
from tensorize.ir.spec import Spec
from tensorize.weight import products
from tensorize.weight.contractions import Contractions
from tensorize.weight.precision import autocast

SIDES = ("columns", "rows")


def product_of(spec: QuantizedSpec, k: int, contract: str, **more: bool) -> CodedProduct:
    """The launch of the k-th core of a weight in codes."""
    dense = DenseSpec(tuple(spec.inner.core_shapes[k]))
    return CodedProduct(QuantizedSpec(dense, spec.precision, FLOAT), contract, **more)


@lru_cache(maxsize=4096)
def source_of(product: CodedProduct, dtype: torch.dtype, most: int) -> Source:
    """The kernel for up to so many rows.

    Raises:
        NotCovered: there is none.
    """
    return coded.forward(product, coded.default_tiles(product, dtype.itemsize, most))


@lru_cache(maxsize=4096)
def why_not(spec: QuantizedSpec) -> str | None:
    """The reason why a weight of this spec has no kernels, None where it has."""
    if spec.batch:
        return f"{spec} is a stack of experts"
    if len(spec.inner.core_shapes) > 1 and not format_of(spec.inner).pair:
        return f"kernels know no codes of a {format_of(spec.inner).title}"
    try:
        for k in range(len(spec.inner.core_shapes)):
            source_of(product_of(spec, k, "columns"), torch.bfloat16, 1)
    except NotCovered as reason:
        return str(reason)
    return None


# ------------------------------------------------------------------------------- the operation


@torch.library.custom_op("tensorize::triton_coded", mutates_args=())
def _multiply(
    x: Tensor,
    held: Sequence[Tensor],
    bias: Tensor | None,
    added: Tensor | None,
    spec: str,
    contract: str,
) -> Tensor:
    """x Wᵀ or x W, + bias + added, of a matrix as it is held: scales, codes, zero points."""
    product = _product(spec, contract, bias is not None, added is not None)
    check_device(x)
    rows = launch.rows_of(x)
    y = x.new_empty(*x.shape[:-1], _width(product))
    source = source_of(product, x.dtype, autotune.bucket(max(len(rows), 1)))
    more = [t for t in (bias, None if added is None else launch.rows_of(added)) if t is not None]
    launch.run(source, rows, *(t.contiguous() for t in held), *more, y.view(-1, y.shape[-1]))
    return y


@_multiply.register_fake
def _(
    x: Tensor,
    held: Sequence[Tensor],
    bias: Tensor | None,
    added: Tensor | None,
    spec: str,
    contract: str,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], _width(_product(spec, contract, False, False)))


@lru_cache(maxsize=4096)
def _product(spec: str, contract: str, bias: bool, added: bool) -> CodedProduct:
    return CodedProduct(QuantizedSpec.from_dict(json.loads(spec)), contract, bias, added)


def _width(product: CodedProduct) -> int:
    return product.spec.shape[0 if product.contract == "columns" else 1]


# ----------------------------------------------------------------------- what weights call


@dataclass(frozen=True)
class CodedContraction:
    """y = x Wᵀ + bias or y = x W + bias, W in codes, by kernels where no gradient is asked for.

    ``planned`` is what runs instead: the contractions by torch operations.
    """

    spec: QuantizedSpec
    contract: str
    planned: Contractions = field(default_factory=dict, repr=False, compare=False)

    takes_bias = True

    def __call__(self, x: Tensor, cores: Sequence[Tensor], bias: Tensor | None = None) -> Tensor:
        recorded = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *cores))
        x, cores = autocast(x, cores)
        if recorded or x.dtype not in DTYPES or cores[0].dtype != x.dtype:
            return products.matmul(self.spec, self.planned, cores, x, self.contract, bias)
        bias = None if bias is None else bias.to(x.dtype)
        matrices = format_of(self.spec).coded(self.spec, cores)
        if len(matrices) == 1:
            return self._product(x, matrices, 0, bias)
        order = cores[len(matrices)] if self.spec.inner.pivoted else None
        if self.contract == "columns":
            kept, rest = (None, x) if order is None else ordered(x, order, self.spec.ranks[0])
            return self._product(self._product(rest, matrices, 1, None, kept), matrices, 0, bias)
        t = self._product(x, matrices, 0, None)
        if order is None:
            return self._product(t, matrices, 1, bias)
        y = together(t, self._product(t, matrices, 1, None), order)
        return y if bias is None else y + bias

    def _product(
        self,
        x: Tensor,
        matrices: Sequence[Coded],
        k: int,
        bias: Tensor | None,
        added: Tensor | None = None,
    ) -> Tensor:
        held = matrices[k]
        tensors = [t for t in (held.scale, held.codes, held.zeros) if t is not None]
        text = product_of(self.spec, k, self.contract).spec.text
        return _multiply(x, tensors, bias, added, text, self.contract)

    def beside(self, planned: Contractions) -> CodedContraction:
        """The same, with what the weight's own plan is."""
        return replace(self, planned=planned)


def contractions(spec: Spec) -> dict[str, CodedContraction]:
    """What kernels a weight in codes has, by what they contract; none where one is not covered."""
    assert isinstance(spec, QuantizedSpec)
    if why_not(spec) is not None:
        return {}
    return {side: CodedContraction(spec, side) for side in SIDES}
