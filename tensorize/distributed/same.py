"""That all processes hold the same numbers before each of them keeps its part."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from tensorize.base.errors import CaptureError


@torch.no_grad()
def check_same(model: nn.Module) -> None:
    """Compare one sum of every parameter between all processes.

    Raises:
        CaptureError: one of them differs, or models have different parameters.
    """
    known = [(name, p) for name, p in model.named_parameters() if not p.is_meta]
    sums = [(name, tuple(p.shape), float(p.sum(dtype=torch.float64))) for name, p in known]
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
