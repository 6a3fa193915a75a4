"""Tensors of which every process holds a part (DTensor): taken apart, and put together.

``torch.distributed.tensor`` is imported where it is needed: it takes a second and a half.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def is_sharded(tensor: Any) -> bool:
    """Whether processes hold parts of a tensor, or copies that they know of."""
    module = sys.modules.get("torch.distributed.tensor")  # who has one has imported it
    return module is not None and isinstance(tensor, module.DTensor)


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; every process has to ask for it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def device_of_shards(model: nn.Module) -> str:
    """The kind of device that a model's parameters are sharded over; the CPU where they are not."""
    meshes: Any = (p.device_mesh for p in model.parameters() if is_sharded(p))  # type: ignore[attr-defined]
    return next((mesh.device_type for mesh in meshes), "cpu")


def mesh_of(tensors: Iterable[Tensor]) -> Any:
    """The processes that hold parts of tensors, as a mesh; None where none is sharded."""
    meshes: list[Any] = [t.device_mesh for t in tensors if is_sharded(t)]  # type: ignore[attr-defined]
    return max(meshes, key=lambda mesh: mesh.ndim, default=None)


def mean_over(mesh: Any, value: Tensor) -> Tensor:
    """The mean of what the processes of a mesh have: all of them have to ask.

    As many of them hold each batch, so it is a mean over batches. Without a mesh it is the value.
    """
    if mesh is None:
        return value.detach()
    total = value.detach().to(mesh.device_type, torch.float64, copy=True)
    for group in mesh.get_all_groups():
        dist.all_reduce(total, group=group)
    return total / mesh.size()


def of_all_in(mesh: Any, value: Any) -> list[Any]:
    """What the processes of a mesh have of a value, in one order: all of them have to ask."""
    found = [value]
    for group in () if mesh is None else mesh.get_all_groups():
        held: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(held, found, group=group)
        found = [each for part in held for each in part]
    return found


def by_first_in(mesh: Any, value: Tensor) -> Tensor:
    """What the first process of a mesh computed, where all of them did: its bits are all of theirs.

    Eigenvectors have a sign of their own on other machines.
    """
    if mesh is None:
        return value
    told = value.detach().to(mesh.device_type, copy=True).contiguous()
    for group in mesh.get_all_groups():
        dist.broadcast(told, group=group, group_src=0)
    return told


def is_first_in(mesh: Any) -> bool:
    """Whether this is the process that writes what all of a mesh have."""
    return mesh is None or not any(mesh.get_coordinate())


def resharded(model: nn.Module) -> None:
    """Let FSDP2 give back what it gathered: without a backward pass the outermost weights stay as
    they were then, whatever becomes of the parts."""
    for module in fully_sharded(model):
        module.reshard()


def fully_sharded(model: nn.Module) -> list[Any]:
    """The modules that FSDP2 shards."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # else nothing is sharded by it
    if fsdp is None:
        return []
    return [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]


def empty_like(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor without values of the same kind, elsewhere."""
    made = torch.empty_like(tensor, device=device)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(made, requires_grad=tensor.requires_grad)
    return made


@torch.no_grad()
def keep_own_part(tensor: Tensor, values: Tensor) -> None:
    """Write this process's part of the whole tensor's values, which all processes have."""
    own_part(tensor).copy_(own_part(split_as(values, tensor)))


def split_as(values: Tensor, like: Tensor) -> Tensor:
    """Values that all processes have, sharded as another tensor; nothing is communicated."""
    if not is_sharded(like):
        return values
    return split_over(values, like.device_mesh, like.placements)  # type: ignore[attr-defined]


def split_over(values: Tensor, mesh: Any, placements: Any) -> Tensor:
    """Values that all processes have, sharded over a mesh; nothing is communicated."""
    from torch.distributed.tensor import DTensor, Replicate

    there = values.to(mesh.device_type)
    everywhere = DTensor.from_local(there, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=placements)


def is_first_rank() -> bool:
    """Whether this is the process that writes what all of them have."""
    return not dist.is_initialized() or dist.get_rank() == 0


def of_first_rank(value: Any) -> Any:
    """What that process has of a value, for all to decide by the same; all have to ask."""
    held = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(held)
    return held[0]


def of_each_rank(value: Any, device: torch.device | str) -> Iterator[Any]:
    """What every process has of a value, one after the other; tensors lie on this one's device.

    All have to ask for all of them. Of what is sent only one process's is in memory at a time.
    """
    for rank in range(dist.get_world_size()):
        written = io.BytesIO()
        if rank == dist.get_rank():
            torch.save(value, written)
        held = [written.getvalue()]
        del written
        dist.broadcast_object_list(held, src=rank)
        if rank == dist.get_rank():
            yield value
        else:
            yield torch.load(io.BytesIO(held.pop()), map_location=device, weights_only=False)


def on_any_rank(happened: bool, device: torch.device | str) -> bool:
    """Whether something happened in any process; every process has to ask."""
    told = torch.tensor(float(happened), device=device)
    dist.all_reduce(told, dist.ReduceOp.MAX)
    return bool(told)


def by_first_rank(write: Callable[[], None], failure: type[Exception]) -> None:
    """Let one process write; all go on after it, and all raise a failure of it."""
    found: list[Exception | None] = [None]
    if is_first_rank():
        try:
            write()
        except failure as error:
            found = [error]
    if dist.is_initialized():
        dist.broadcast_object_list(found)
    if found[0] is not None:
        raise found[0]
