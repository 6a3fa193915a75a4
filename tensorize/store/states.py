"""What training goes on from, coded: weights within a bound, second moments in fewer digits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import safetensors.torch
from torch import Tensor

from tensorize.base.files import replacing
from tensorize.coding.digits import rounded
from tensorize.coding.tensors import Coding, encode, range_of
from tensorize.ir.budget import entry_bound
from tensorize.store.coded import METADATA, CodedTensors, Coder


def within(error: float | str) -> Coder:
    """No entry is further from what it was than ``Budget(entry_error=)`` says.

    Where none is negative (second moments, variances), each is within the same share of itself as
    the largest: what is divided by its root may be small, and must not become zero. Single numbers
    (counts of steps) are kept bit for bit.
    """
    value, relative = entry_bound(error)

    def coded(tensor: Tensor) -> tuple[Coding, bytes]:
        if tensor.numel() < 2 or not (tensor.is_floating_point() or tensor.is_complex()):
            return encode(tensor)
        bound = value * range_of(tensor) if relative else value
        if tensor.is_complex() or bool((tensor < 0).any()):
            return encode(tensor, bound)
        largest = float(tensor[tensor.isfinite()].double().amax()) if _any(tensor) else 0.0
        if not largest:
            return encode(tensor)
        made = rounded(tensor, bound / largest)
        off = (made.double() - tensor.detach().cpu().double()).nan_to_num_(0.0)
        coding, data = encode(made)
        return replace(coding, bound=bound, found=float(off.abs().max())), data

    return lambda stored: CodedTensors(
        {key: coded(tensor) for key, tensor in stored.items()}, known={"entry_error": error}
    )


def _any(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().any())


def write(path: Path, made: CodedTensors, about: Mapping[str, str]) -> None:
    """A coded file, written at once: a reader sees the old or the new one.

    Raises:
        OSError, SafetensorError: it cannot be written.
    """
    with replacing(path) as draft:
        safetensors.torch.save_file(made.as_bytes(), draft, {**METADATA, **about})
