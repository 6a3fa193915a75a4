"""The kernels of a compiled model, to be read: those of its weights, and those of its graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from tensorize.base.tensors import device_of, unwrapped
from tensorize.capture import forward
from tensorize.capture.inputs import checked
from tensorize.codegen.device import kernel
from tensorize.ir.work import Work
from tensorize.running.fuse_graph import fuse
from tensorize.running.in_use import Kernel, OfferedWorks, every_kernel, kernels_of_weights


def kernels(model: nn.Module, example_inputs: Any = None) -> dict[str, Kernel]:
    """The Triton kernels of a compiled model, whatever it runs by, by weight and purpose.

    ``str(kernel)`` is its source; ``kernel.compile("cuda:90")`` compiles it, without a GPU. What
    serves some numbers of rows only has their most in its name (``forward_to_64``, ``forward``).
    Weights that no kernel family covers have none. Those of low rank that store no identity have
    one for many rows and no gradients: ``tensorize.weight.plain(model)`` gives them both factors
    whole, and all kernels.

    Args:
        example_inputs: as in ``compile``. With them the launches that take in norms, activations
            and several weights in the graphs of ``torch.compile(model, backend="tensorize")`` are
            there as well (``graph_0.forward``, …); each says what it computes.

    Raises:
        TensorizeError: the model was not made by tensorize.
        CaptureError: the model does not run on ``example_inputs``.

    Examples:
        >>> whole = tensorize.weight.plain(copy.deepcopy(small))
        >>> all("import triton" in str(kernel) for kernel in tensorize.kernels(whole).values())
        True
    """
    model = unwrapped(model)
    found = kernels_of_weights(model)
    if example_inputs is None:
        return found
    device = device_of(model)
    fused = [(work, dtype) for work, dtype in launches_of(model, example_inputs) if work.fused]
    for k, (work, dtype) in enumerate(fused):
        found |= kernel.named(f"graph_{k}", kernel.of_work(work, dtype, device))
    return found


def launches_of(model: nn.Module, example_inputs: Any) -> dict[tuple[Work, torch.dtype], None]:
    """What the graphs of a model offer to launches that take in more than one weight.

    Raises:
        CaptureError: the model does not run on ``example_inputs``.
    """
    offered = OfferedWorks()

    def note(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        fuse(graph, inputs, offered)
        return graph.forward

    with every_kernel(model):
        batch = checked(model, example_inputs)
        compiled: Any = torch.compile(model, backend=note)
        with forward.untouched(model):
            compiled(*batch.args, **batch.kwargs)
    return offered.works
