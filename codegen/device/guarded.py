"""What a guarded launch is given for its check: sums of the weights over each program's outputs.

They are made of the weights when they are first asked for, in float64, and compared with what is
known of each weight as a whole since it was guarded: a weight that was damaged before is told.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor

from tensorize.base.tensors import is_index
from tensorize.codegen.triton.guard import Outputs
from tensorize.ir.spec import TTSpec
from tensorize.ir.work import Work
from tensorize.weight import products
from tensorize.weight.contractions import contractions
from tensorize.weight.made import made_of

_SAME = 1e-6
"""Of the largest sum: so far from what is known the sums of a whole weight are by rounding."""

_OTHER = {"columns": "rows", "rows": "columns"}


@dataclass(frozen=True)
class Known:
    """What a guard knows of a weight: the ``signs`` of its outputs, its ``sums`` Wᵀ signs, and what
    a row may be off by: ``relative`` times the length of x, and any by ``floor``."""

    signs: Tensor
    sums: Tensor
    relative: float
    floor: float


def operands(
    work: Work,
    outputs: Sequence[Outputs],
    cores: Sequence[Sequence[Tensor]],
    known: Sequence[Known],
) -> tuple[list[Tensor], Tensor]:
    """What the launch of a guarded work is given beside its own inputs, in its order; the last one
    is the counter, in which weights that are not what they were count already.

    ``cores``: those of every weight. ``outputs``: of every weight, as ``Source.checked`` says.
    """
    device = known[0].signs.device
    wrong = torch.zeros(len(known), dtype=torch.int32, device=device)
    found: list[Tensor] = []
    for k, spec in enumerate(work.specs):
        made = partial(_sums, spec, work.contract, outputs[k])
        key = "sums for a launch", spec, work.contract, outputs[k]
        signs, sums, whole = made_of(made, [*cores[k], known[k].signs, known[k].sums], key)
        found += [signs, sums]
        if not whole:
            wrong[k] += 1
    limits = tuple(number for each in known for number in (each.relative, each.floor))
    return [*found, _limits(limits, str(device))], wrong


def _sums(
    spec: TTSpec, contract: str, outputs: Outputs, tensors: Sequence[Tensor]
) -> tuple[Tensor, Tensor, bool]:
    """The signs and the sums (programs, N) in float32; whether it is the weight that is known."""
    *cores, signs, known = tensors
    wide = [core if is_index(core) else core.double() for core in cores]
    signs = signs.double()
    owners = torch.tensor(outputs.owners(), device=signs.device)
    some = signs.new_zeros(outputs.programs, len(signs)).scatter_(0, owners[None], signs[None])
    planned = contractions(spec, str(signs.device), torch.float64)
    sums = products.matmul(spec, planned, wide, some, _OTHER[contract])
    off = (sums.sum(0) - known.double()).abs().max()
    whole = bool(off <= _SAME * known.double().abs().max())
    return signs.float(), sums.float().contiguous(), whole


@lru_cache(maxsize=4096)
def _limits(numbers: tuple[float, ...], device: str) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32, device=device)
