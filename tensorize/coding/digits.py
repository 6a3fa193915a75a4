"""Numbers with fewer digits: no entry is further from what it was than a share of itself."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tensorize.coding.planes import as_integers

_DIGITS = {torch.float64: 52, torch.float32: 23, torch.bfloat16: 7, torch.float16: 10}
"""Binary ones, behind the first."""


def rounded(tensor: Tensor, share: float) -> Tensor:
    """Entries of so few digits that each is within a share of itself; zeros stay zero.

    What the exponent cannot tell so (subnormals), and what is not finite, stays as it is.
    """
    digits = _DIGITS.get(tensor.dtype)
    if digits is None or not 0 < share < 1:
        return tensor
    dropped = digits - max(math.ceil(-math.log2(share)) - 1, 0)
    if dropped < 1:
        return tensor
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    bits = as_integers(flat)
    made = ((bits + (1 << (dropped - 1))) >> dropped << dropped).view(tensor.dtype)
    usual = made.isfinite() & (flat.abs() >= torch.finfo(tensor.dtype).tiny)
    return torch.where(usual, made, flat).reshape(tensor.shape)
