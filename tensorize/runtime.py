"""What a compressed model runs by: Triton kernels, looked at, measured, and put to use."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from tensorize import weight
from tensorize.codegen import autotune, kernel, launch, triton_ops
from tensorize.errors import TensorizeError
from tensorize.ir import DENSE
from tensorize.report import report

log = logging.getLogger("tensorize")

Kernel = kernel.Kernel


def device_of(model: nn.Module) -> str:
    """The first GPU that a parameter is on, else the CPU."""
    return next((str(p.device) for p in model.parameters() if p.is_cuda), "cpu")


def use_kernels(model: nn.Module, backend: str) -> nn.Module:
    """Let weights run by the kernels that ``backend`` asks for."""
    measured = backend == "auto"
    if backend == "aten" or (measured and not autotune.known(device_of(model))):
        return model
    build = partial(triton_ops.contractions, measured=measured)
    count = weight.use_kernels(model, build)
    log.info("%d weights run by kernels", count)
    return model


def kernels(model: nn.Module) -> dict[str, Kernel]:
    """The Triton kernels of a compiled model's weights, whatever it runs by, by weight and purpose.

    ``str(kernel)`` is its source; ``kernel.compile("cuda:90")`` compiles it, without a GPU. Weights
    that no kernel family covers have none.
    """
    found: dict[str, Kernel] = {}
    for site in report(model).sites:
        if site.format == DENSE:
            continue
        for name in (site.name, *site.aliases):
            factors = next((w for n, w in weight.factored(model) if n == name), None)
            if factors is None or factors.spec.batch or factors.dtype not in launch.DTYPES:
                continue
            owner, leaf = weight.owner_of(model, name)
            bias = leaf == "weight" and isinstance(getattr(owner, "bias", None), torch.Tensor)
            lookup = "embedding" in site.kind
            made = kernel.of_weight(factors.spec, factors.dtype, bias=bias, lookup=lookup)
            found |= {f"{name}.{k}": replace(v, name=f"{name}.{k}") for k, v in made.items()}
            break
    return found


def tune_kernels(model: nn.Module, rows: Iterable[int] = (1, 16, 256, 4096)) -> int:
    """Time the kernels of a compiled model on the GPU that it is on; returns how many won.

    What is found is kept for this GPU; models compiled afterwards with ``backend="auto"`` use
    kernels where they beat torch's own matmuls. This one does from now on.

    Raises:
        TensorizeError: the model is not on a GPU.
    """
    device = device_of(model)
    if device == "cpu":
        raise TensorizeError("kernels are timed on a GPU", way_out="model.to('cuda')")
    seen, won = set(), 0
    for _, factors in weight.factored(model):
        for bias in (False, True):
            key = (factors.spec, factors.dtype, bias)
            if key in seen or factors.spec.batch or not triton_ops.contractions(factors.spec):
                continue
            seen.add(key)
            for count in rows:
                won += autotune.tune_weight(*key, count, device)
    use_kernels(model, "auto")
    return won
