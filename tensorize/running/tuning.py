"""Time the kernels that a model may run by, on the GPU that it is on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch import nn

from tensorize.base.errors import TensorizeError
from tensorize.base.progress import Progress, shown
from tensorize.base.tensors import device_of, unwrapped
from tensorize.capture.inputs import find_inputs
from tensorize.running.emitted import launches_of
from tensorize.running.in_use import tune, use_kernels, works_of

log = logging.getLogger("tensorize")

ROWS = (1, 16, 64, 256, 4096, 8192)
"""One for each range of rows that a choice holds for (``autotune.BUCKETS``)."""


def tune_kernels(
    model: nn.Module,
    rows: Sequence[int] = ROWS,
    *,
    example_inputs: Any = None,
    progress: Progress | bool | None = None,
) -> int:
    """Time the kernels of a compiled model on the GPU that it is on; returns how many won.

    Both those of single weights and the launches that take in what is around them in the graphs
    of ``torch.compile(model, backend="tensorize")``. What is found is kept for this GPU; models
    compiled or loaded afterwards with ``backend="auto"`` use kernels where they beat torch's own
    matmuls. This one does from now on, and its report says where.

    Args:
        rows: how many rows of x are tried; a choice holds for a range around each.
        example_inputs: as in ``compile``, to see the model's graphs with.
        progress: None: a bar on a terminal; True, False, or a function (stage, done, total).

    Raises:
        TensorizeError: the model is not on a GPU.
        CaptureError: it does not run on ``example_inputs``.
    """
    model = unwrapped(model)
    device = device_of(model)
    if device == "cpu":
        raise TensorizeError(
            "kernels are timed on a GPU, and the model is on the CPU", way_out="model.to('cuda')"
        )
    works = works_of(model)
    batch, source = find_inputs(model, example_inputs, ())
    if batch is None:
        log.warning("no inputs are known that the model runs on: only its weights are timed alone")
    else:
        log.info("graphs are seen with %s", source)
        works |= launches_of(model, batch)
    with shown(progress) as tell:
        won = tune(works, rows, device, tell)
    use_kernels(model, "auto")
    return won
