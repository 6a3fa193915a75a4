"""Fuse the launches of a traced graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from tensorize.base.dynamo import own_graph, parameters_in
from tensorize.passes.lowering.cleanup import RemoveDead, RemoveIdentities
from tensorize.passes.lowering.fuse import FuseKernels, Kernels
from tensorize.passes.lowering.graph import Lowered, lower


def fuse(graph: fx.GraphModule, example_inputs: Sequence[Any], kernels: Kernels) -> Lowered:
    """A copy of a graph, whose kernels take in what is around their weights.

    Nothing is changed where the model does not run by kernels, or where there are gradients.
    """
    program = Lowered(own_graph(graph), parameters_in(graph, example_inputs))
    by_kernels = any(node.target is kernels.contract for node in graph.graph.nodes)
    if not by_kernels or has_gradients(example_inputs):
        return program
    return lower(program, (RemoveIdentities(), FuseKernels(kernels), RemoveDead()))


def has_gradients(inputs: Sequence[Any]) -> bool:
    """Whether anything that goes in, a parameter or not, may be asked for its gradient."""
    return torch.is_grad_enabled() and any(
        isinstance(value, Tensor) and value.requires_grad for value in inputs
    )
