"""``torch.compile(model, backend="tensorize", options={...})``.

On a model that ``tensorize.compile`` rewrote, the backend lowers it: kernels take in the norms and
the elementwise work around their weights; every product on a CPU is computed in the way that is
fastest for its rows; and the rest goes to inductor (``options={"inner": "eager"}``:
it runs as it is, projections of one token grouped; that compiles in a fraction of the time).

On a dense model it is a preview for inference: the linears of the graph are factorized within
``options["budget"]`` by the same analysis as ``tensorize.compile``. A backend cannot free the dense
weights, and the caller's optimizer does not see the factors, so they stay, and the log says so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from tensorize.api.options import Options
from tensorize.base.dynamo import compile_by_inductor, inductor_finds_a_compiler
from tensorize.base.errors import FaultError
from tensorize.passes.lowering.checks import guards_of
from tensorize.passes.lowering.cleanup import RemoveDead, RemoveRepeats
from tensorize.passes.lowering.cpu_products import ChooseProducts
from tensorize.passes.lowering.graph import LoweringPass, lower
from tensorize.passes.lowering.group import GroupProjections
from tensorize.passes.lowering.orders import ComputeInOrder
from tensorize.passes.lowering.packed import with_packed
from tensorize.reports.attach import note_fused
from tensorize.running.fuse_graph import fuse, has_gradients
from tensorize.running.in_use import launches
from tensorize.weight.made import made_of

log = logging.getLogger("tensorize")


# Rows up to which projections are grouped: measured on a CPU (passes/lowering/group.py); on a GPU
# launches are what a few rows cost.
_GROUPED_ROWS = {"cpu": 1, "cuda": 16}


def lower_graph(
    graph: fx.GraphModule,
    example_inputs: Sequence[Any],
    parameters: Mapping[str, Tensor],
    options: Options,
) -> Callable[..., Any]:
    device = next((p.device.type for p in parameters.values()), "cpu")
    inner = _best_inner(device) if options.inner == "auto" else options.inner
    lowered = fuse(graph, example_inputs, launches())
    for work, cores in lowered.fused:
        for core in cores:
            note_fused(core, work.fused)
    gradients = has_gradients(example_inputs)
    passes: list[LoweringPass] = [] if gradients else [RemoveRepeats()]
    if not gradients and inner == "eager":  # packed copies of the weights would get none
        passes.append(GroupProjections(_GROUPED_ROWS.get(device, 1)))
    if device == "cpu" and not gradients:
        passes.append(ComputeInOrder())
    if device == "cpu":
        passes.append(ChooseProducts(gradients))
    lowered = lower(lowered, [*passes, RemoveDead()])
    names = [node.name for node in graph.graph.nodes if node.op == "placeholder"]
    guards = [] if gradients else guards_of(graph.graph)
    if inner == "eager":
        run = with_packed(lowered.graph.forward, lowered, names)
        return _settled(run, guards) if guards else run
    given = dict(zip(names, example_inputs, strict=True))
    packed = [made_of(p.pack, [given[name] for name in p.names]) for p in lowered.packed]
    compiled = compile_by_inductor(lowered.graph, example_inputs, packed)
    run = with_packed(compiled, lowered, names)
    return _settled(run, guards) if guards else run


_ATTEMPTS = 4
"""How often a graph is run again: while faults are many, the second run may be hit too."""


def _settled(run: Callable[..., Any], guards: Sequence[str]) -> Callable[..., Any]:
    """A guarded graph that is run again where it found a fault that is mended, or is gone."""

    def call(*inputs: Any) -> Any:
        told: list[FaultError] = []
        while True:
            result = run(*inputs)
            try:
                for guard in guards:
                    torch.ops.tensorize.settle_faults([], guard)
            except FaultError as error:
                told.append(error)
                if error.came_right is None or len(told) > _ATTEMPTS:
                    raise
                continue
            for error in told:
                assert error.came_right is not None
                error.came_right()
            return result

    return call


def _best_inner(device: str) -> str:
    """Inductor; on a CPU it needs a C++ compiler."""
    if device != "cpu" or inductor_finds_a_compiler():
        return "inductor"
    log.warning(
        "there is no C++ compiler, so the rest of the graph runs as it is: install one, name one "
        'in CXX, or pass options={"inner": "eager"}'
    )
    return "eager"
