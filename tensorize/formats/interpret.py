"""The oracle: what a factorized weight does to an input, in float64 and without any cleverness.

Every contraction order, emitted source and kernel is tested against this.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tensorize.base.tensors import doubled, is_index
from tensorize.formats.registry import format_of
from tensorize.ir.spec import Spec


def apply(spec: Spec, cores: Sequence[Tensor], x: Tensor, contract: str = "columns") -> Tensor:
    """Multiply x by the reconstructed weight.

    Args:
        spec: the factorization of a weight of (m, n), or (experts, m, n).
        cores: its cores.
        x: (..., n) for ``"columns"``, (..., m) for ``"rows"``; with experts the first axis is the
            expert's: (experts, ..., n). Any number of rows, zero included.
        contract: ``"columns"`` for y = x Wᵀ (a linear layer), ``"rows"`` for y = x W.

    Returns:
        (..., m) for ``"columns"``, (..., n) for ``"rows"``, in float64.

    Raises:
        ValueError: ``contract`` is neither, or cores or x do not fit the spec.
    """
    if contract not in ("columns", "rows"):
        raise ValueError(f"contract is 'columns' or 'rows', got {contract!r}")
    exact = [core if is_index(core) else doubled(core) for core in cores]
    weight = format_of(spec).reconstruct(spec, exact)
    matrix = weight.mT if contract == "columns" else weight
    lead = tuple(spec.shape[:-2])
    if x.shape[-1] != matrix.shape[-2] or x.shape[: len(lead)] != lead or x.ndim <= len(lead):
        raise ValueError(f"x of {tuple(x.shape)} does not meet the {contract} of {spec}")
    rows = doubled(x).reshape(*lead, -1, x.shape[-1])
    return (rows @ matrix).reshape(*x.shape[:-1], matrix.shape[-1])
