"""torchtitan's Llama for some steps on the CPU, built and run as its trainer does."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest import mock

import spmd_types as spmd
import torch
import torch.distributed as dist
from spmd_types.runtime import get_local_type
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

with mock.patch("torch._utils._get_available_device_type", return_value="cpu"):
    import torchtitan.tools.utils  # noqa: F401  # a machine without a GPU is one of CUDA to it

from torchtitan.config import ConfigManager
from torchtitan.config.override import apply_overrides
from torchtitan.distributed import ParallelDims
from torchtitan.distributed import utils as dist_utils
from torchtitan.distributed.full_dtensor import parallelize_inputs
from torchtitan.distributed.spmd_types import annotate_input_spmd_types
from torchtitan.models.common.attention import ScaledDotProductAttention

SEQUENCES, TOKENS, STEPS, WORDS = 4, 32, 4, 2048
OURS = ("--module", "tensorize.torchtitan", "--config", "llama3_debugmodel")
TP = ("--parallelism.tensor-parallel-degree", "2")
WHOLE_STREAM = ("--parallelism.no-enable-sequence-parallel",)
WAYS = {
    "tp": ("partial_dtensor", TP),
    "tp, the stream whole": ("partial_dtensor", (*TP, *WHOLE_STREAM)),
    "tp, full": ("full_dtensor", TP),
    "dp": ("partial_dtensor", ()),
    "dp, full": ("full_dtensor", ()),
}


def config_of(*flags: str) -> Any:
    """What torchtitan's command line makes of these flags: two layers, which run on a CPU."""
    usual = ("--training.seq-len", str(TOKENS), "--training.mixed-precision-param", "float32")
    os.environ.setdefault("LOCAL_RANK", "0")
    config = ConfigManager().parse_args([*flags, *usual])
    config.activation_checkpoint = None
    model = config.model_spec.model
    del model.layers[2:]
    for layer in model.layers:  # flex attention has no backward pass on a CPU
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    return config


def updated(config: Any) -> Any:
    """The model's config as the trainer completes it before it builds the model."""
    config.model_spec.model.update_from_config(config=config)
    if config.override.imports:
        apply_overrides(config.override, config)
    return config.model_spec.model


def alone() -> Any:
    """The model in one process."""
    dist_utils.set_spmd_backend("partial_dtensor")
    model = updated(config_of(*OURS)).build()
    torch.manual_seed(0)
    with torch.no_grad():
        model.init_states(buffer_device=torch.device("cpu"))
    return model


def arranged(config: Any) -> Any:
    """How the processes are arranged."""
    dims = ParallelDims.from_config(config.parallelism, dist.get_world_size())
    dims.build_mesh()
    dist_utils.set_spmd_backend(config.parallelism.spmd_backend)
    return dims


def built(config: Any, dims: Any, values: dict[str, Tensor]) -> Any:
    """The model over all processes, each with its part of the same numbers."""
    spec = config.model_spec
    with torch.device("meta"):
        model = updated(config).build()
    model.verify_module_protocol()
    model = spec.parallelize_fn(
        model,
        parallel_dims=dims,
        training=config.training,
        parallelism=config.parallelism,
        compile_config=config.compile,
        ac_config=config.activation_checkpoint,
        dump_folder=config.dump_folder,
    )
    for part in model.modules():
        if isinstance(part, FSDPModule):  # gloo has no sums that are scaled on their way
            part.set_force_sum_reduction_for_comms(True)
    model.to_empty(device="cpu")
    with torch.no_grad():
        model.init_weights(buffer_device=None)
        for name, own in model.named_parameters():
            part = distribute_tensor(values[name], own.device_mesh, own.placements)
            own.to_local().copy_(part.to_local())
    return model


def loss_of(config: Any, dims: Any, model: Any, ids: Tensor, typed: bool = False) -> float:
    """The loss of all processes, and gradients."""
    inputs, labels, others = ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), {}
    if config.parallelism.spmd_backend == "spmd_types":
        inputs, labels, others = annotate_input_spmd_types(dims, inputs, labels, others)
    if config.parallelism.spmd_backend == "full_dtensor":
        inputs, labels, others = parallelize_inputs(dims, inputs, labels, others)
    loss_fn = config.loss.build(compile_config=config.compile)
    loss_fn.set_lm_head(model.lm_head)
    model._skip_lm_head = True
    with dist_utils.get_spmd_context(parallel_dims=dims, spmd_typechecking=typed)():
        loss, _ = loss_fn(model(inputs), labels, torch.tensor(SEQUENCES * TOKENS))
        with spmd.no_typecheck():
            loss.backward()
    told = loss.detach()
    if isinstance(told, DTensor):
        return float(told.full_tensor())
    if dims.dp_enabled:
        told = told.clone()
        dist.all_reduce(told, group=dims.get_mesh("batch").get_group())
    return float(told)


def batches() -> list[Tensor]:
    made = torch.Generator().manual_seed(1)
    return [torch.randint(WORDS, (SEQUENCES, TOKENS + 1), generator=made) for _ in range(STEPS)]


def trained(config: Any, model: Any, dims: Any) -> list[float]:
    """The losses of some steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for ids in batches():
        if dims.dp_enabled:
            mesh = dims.get_mesh("batch")
            ids = ids.chunk(mesh.size())[mesh.get_local_rank()].contiguous()
        losses.append(loss_of(config, dims, model, ids))
        optimizer.step()
        optimizer.zero_grad()
    return losses


def trained_alone(model: Any) -> list[float]:
    """The same in one process, by torch's own loss."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for ids in batches():
        logits = model(ids[:, :-1].contiguous())
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    return losses


def values_of(model: Any) -> dict[str, Tensor]:
    found = ((n, p.detach()) for n, p in model.named_parameters())
    return {n: (p.full_tensor() if isinstance(p, DTensor) else p).clone() for n, p in found}


def trains_as_one_process_does(folder: Path) -> None:
    one = alone()
    start = values_of(one)
    wanted = trained_alone(one)
    end = values_of(one)
    assert wanted[0] != wanted[-1]
    for way, (backend, flags) in WAYS.items():
        config = config_of(*OURS, *flags, "--parallelism.spmd-backend", backend)
        dims = arranged(config)
        model = built(config, dims, start)
        losses = trained(config, model, dims)
        assert max(abs(a - b) for a, b in zip(losses, wanted, strict=True)) < 4e-6, (way, losses)
        moved = {name: value - start[name] for name, value in values_of(model).items()}
        for name, move in moved.items():
            wish = end[name] - start[name]
            assert (move - wish).norm() < 1e-4 * wish.norm(), (way, name)


def types_are_those_of_the_numbers(folder: Path) -> None:
    """torchtitan's own backend, whose FSDP needs a later torch: without it, and types checked."""
    one = alone()
    start, ids = values_of(one), batches()[0]
    logits = one(ids[:, :-1].contiguous())
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    wanted.backward()
    for flags in ((), WHOLE_STREAM):
        config = config_of(*OURS, *TP, *flags)
        assert config.parallelism.spmd_backend == "spmd_types"
        dims = arranged(config)
        model = split_by_types(config, dims, start)
        loss = loss_of(config, dims, model, ids, typed=True)
        assert abs(loss - float(wanted.detach())) < 4e-6
        group = dims.get_mesh("tp").get_group()
        for name, wish in one.named_parameters():
            own = model.get_parameter(name)
            grad, kind = own.grad, next(iter(get_local_type(own).values()))
            if kind is spmd.R:  # every process has a part of its gradient, which FSDP sums
                dist.all_reduce(grad, group=group)
            parts = [torch.empty_like(grad) for _ in range(2)]
            dist.all_gather(parts, grad, group=group)
            axis = next((a for a in (0, 1)[: grad.ndim] if grad.shape[a] != wish.shape[a]), None)
            grad = parts[0] if axis is None else torch.cat(parts, axis)
            assert (grad - wish.grad).norm() < 5e-6 * wish.grad.norm(), (flags, name)


def split_by_types(config: Any, dims: Any, values: dict[str, Tensor]) -> Any:
    model = updated(config).build()
    with torch.no_grad():
        model.init_states(buffer_device=torch.device("cpu"))
        for name, own in model.named_parameters():
            own.copy_(values[name])
    model.parallelize(dims)
    return model
