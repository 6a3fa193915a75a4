"""A model that FSDP2 shards, as it is on one machine."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from tensorize.base.errors import CaptureError
from tensorize.base.sharded import is_sharded, whole
from tensorize.weight.become import unsharded_class

_OF_FSDP = "torch.distributed."
_MARKS = ("__composable_api", "_is_fsdp_managed", "_fsdp_use_orig")
"""Beginnings of the names of what ``fully_shard`` leaves on modules."""


def is_gathered(model: nn.Module) -> bool:
    """Whether its values are those of one process: nothing of it is sharded."""
    return not any(is_sharded(parameter) for parameter in model.parameters())


def gathered(model: nn.Module) -> nn.Module:
    """A copy with whole parameters, of a model that ``fully_shard`` shards; another one as it is.

    Every process of its mesh has to ask, and each gets a copy.

    Raises:
        CaptureError: it is also split over other dimensions of a mesh.
    """
    if is_gathered(model):
        return model
    memo: dict[int, Any] = {}
    for name, parameter in model.named_parameters():
        mesh: Any = getattr(parameter, "device_mesh", None)
        if mesh is None or "tp" in (mesh.mesh_dim_names or ()):
            raise CaptureError(
                "it is not sharded by FSDP2 alone: compressed are whole models, or those",
                site=name,
                way_out="compress the model first: tensorize.distributed.parallelize(small, mesh)",
            )
        values = whole(parameter.detach()).clone()
        memo[id(parameter)] = nn.Parameter(values, parameter.requires_grad)
    modules = list(model.modules())
    for module in modules:
        memo[id(module)] = object.__new__(unsharded_class(type(module)))
    for module in modules:
        memo[id(module)].__dict__.update(copy.deepcopy(_own_state(module), memo))
    return memo[id(model)]


def _own_state(module: nn.Module) -> dict[str, Any]:
    """What a module holds without what FSDP2 put there: its marks and its hooks."""
    state = {name: v for name, v in vars(module).items() if not name.startswith(_MARKS)}
    for name, hooks in list(state.items()):
        if not name.endswith("_hooks") or not hooks:
            continue
        kept = {key: hook for key, hook in hooks.items() if not _is_of_fsdp(hook)}
        state[name] = type(hooks)(kept)
        for beside in (f"{name}_with_kwargs", f"{name}_always_called"):
            if state.get(beside):
                state[beside] = type(state[beside])(
                    (key, value) for key, value in state[beside].items() if key in kept
                )
    return state


def _is_of_fsdp(hook: Any) -> bool:
    return (getattr(hook, "__module__", None) or "").startswith(_OF_FSDP)
