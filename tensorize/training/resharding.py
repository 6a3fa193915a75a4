"""Values of another size in the place of a sharded parameter, split as it was.

DTensors know how they are split. FSDP2 besides keeps the sizes of each parameter, in an object that
is made anew here; the groups, hooks and buffers of its modules stay. Torch has no call for that.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from tensorize.base.sharded import fully_sharded, is_sharded, split_as, split_over


def in_place_of(model: nn.Module, before: nn.Parameter, values: Tensor) -> nn.Parameter:
    """A parameter with values that all processes have, sharded as the one before.

    Where FSDP2 shards that, its modules hold the new one after this; else the caller puts it there.
    """
    for group, number in _places(model, before):
        return _of_fsdp(group, number, values)
    return nn.Parameter(split_as(values, before), requires_grad=before.requires_grad)


def split_dimensions(model: nn.Module, parameter: Tensor) -> set[int]:
    """The dimensions of a parameter that processes compute with a part of (FSDP2 puts its parts
    together before)."""
    if not is_sharded(parameter):
        return set()
    places = _places(model, parameter)
    specs = [_over_tp(group.fsdp_params[number]) for group, number in places] or [parameter]
    placements = (p for spec in specs if spec is not None for p in spec.placements)  # type: ignore[union-attr]
    return {placement.dim for placement in placements if placement.is_shard()}


def _places(model: nn.Module, parameter: Tensor) -> Iterator[tuple[Any, int]]:
    """The group of FSDP2 that a parameter belongs to, and its number there."""
    for module in fully_sharded(model):
        state = module._get_fsdp_state()
        several = getattr(state, "_fsdp_param_groups", None)  # older torch has one, or none
        for group in filter(None, [state._fsdp_param_group] if several is None else several):
            for number, held in enumerate(group.fsdp_params):
                if held.sharded_param is parameter:
                    yield group, number


def _of_fsdp(group: Any, number: int, values: Tensor) -> nn.Parameter:
    old = group.fsdp_params[number]
    if (spec := _over_tp(old)) is not None:  # that is done first
        values = split_over(values, spec.mesh, spec.placements)
    given = nn.Parameter(values.to(group.device), requires_grad=old.sharded_param.requires_grad)
    new = type(old)(
        given,
        old._module_info,
        old.mesh_info,
        old.post_forward_mesh_info,
        group.device,
        lambda _: old.fsdp_placement,
        group.mp_policy,
        group.offload_policy,
    )
    new.init_dtype_attrs(group.mp_policy)
    new._param_fqn = old._param_fqn
    old._post_load_hook_handle.remove()
    group.fsdp_params[number] = new
    return new.sharded_param


def _over_tp(held: Any) -> Any:
    """How a parameter of FSDP2 is split over ``tp`` as well, if it is."""
    older = getattr(held, "_tp_spec", None)
    return getattr(held, "_unsharded_dtensor_spec", older)
