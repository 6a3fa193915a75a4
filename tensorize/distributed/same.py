"""That all processes hold the same numbers before each of them keeps its part."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tensorize.base.errors import CaptureError
from tensorize.weight.install import factored


@torch.no_grad()
def check_same(model: nn.Module) -> None:
    """Compare one sum of every parameter, and of factors' integers, between all processes.

    Raises:
        CaptureError: one of them differs, or models have different parameters.
    """
    known = dict(model.named_parameters())
    known |= {
        f"{name} ({index.name})": values
        for name, weight in factored(model)
        for index, values in zip(weight.spec.indices, weight.indices, strict=True)
    }
    sums = [(name, tuple(p.shape), _sum(p)) for name, p in known.items() if not p.is_meta]
    everywhere: list[list] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everywhere, sums)
    for rank, other in enumerate(everywhere):
        odd = [a for a, b in zip(everywhere[0], other, strict=False) if a != b]
        if odd or len(other) != len(everywhere[0]):
            raise CaptureError(
                f"rank {rank} holds other numbers than rank 0",
                site=odd[0][0] if odd else None,
                way_out="torch.manual_seed(0) on every rank before the model is made, or load the "
                "same checkpoint",
            )


def _sum(tensor: Tensor) -> float:
    """A sum that tells orders of one set of numbers apart where these are integers."""
    values = tensor.flatten().double()
    if not tensor.is_floating_point():
        values = values * torch.arange(1, len(values) + 1, dtype=values.dtype, device=values.device)
    return float(values.sum())
