"""Time the kernels that a model may run by, on the GPU that it is on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from tensorize import capture, forward, runtime
from tensorize.backend import fuse
from tensorize.errors import TensorizeError
from tensorize.progress import Progress, shown
from tensorize.work import Work

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
    """
    device = runtime.device_of(model)
    if device == "cpu":
        raise TensorizeError(
            "kernels are timed on a GPU, and the model is on the CPU", way_out="model.to('cuda')"
        )
    works = {**runtime.works_of(model), **launches_of(model, example_inputs)}
    with shown(progress) as tell:
        won = runtime.tune(works, rows, device, tell)
    runtime.use_kernels(model, "auto")
    return won


def launches_of(
    model: nn.Module, example_inputs: Any = None
) -> dict[tuple[Work, torch.dtype], None]:
    """What the graphs of a model offer to launches that take in more than one weight.

    Its weights run by what was measured, from then on.
    """
    runtime.measure_all(model)
    batch, source = capture.find_inputs(model, example_inputs, ())
    if batch is None:
        log.warning("no inputs are known that the model runs on: only its weights are timed alone")
        return {}
    log.info("graphs are seen with %s", source)
    offered = runtime.OfferedWorks()

    def note(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        fuse(graph, inputs, offered)
        return graph.forward

    forward.run(torch.compile(model, backend=note), batch)  # type: ignore[arg-type]
    return offered.works
