"""A model that stays on meta until it is known which part of it this process holds.

``initialize(device="meta")`` keeps what the values would have been made of: the dense model on
meta, the plan, and the seed. ``fill`` makes them module by module, in the order and with the
random numbers of a model that is filled at once, and every process keeps its part only: the same
numbers on every mesh, and never more in memory than that part and one module.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tensorize.base.errors import TensorizeError
from tensorize.base.progress import no_progress
from tensorize.base.sharded import device_of_shards, empty_like, keep_own_part
from tensorize.base.tensors import unwrapped
from tensorize.passes.rewrite.fresh_cores import InitializeCores
from tensorize.passes.stages import Planned
from tensorize.weight.install import factored, names_now, owner_of

_NAME = "_blueprint"
Give = Callable[[str, Tensor], None]


@dataclass(frozen=True)
class Blueprint:
    """What a model's values are made of: the dense model on meta, a plan for it, and how."""

    dense: nn.Module
    planned: Planned
    how: InitializeCores

    def values(self, whole: bool, give: Give) -> None:
        """Hand over every parameter and buffer by its name, and keep none.

        Args:
            whole: weights that store no identity by the plan store both factors.
            give: is told every name of a parameter, and may be told other values again for one of
                several names; the last count.
        """
        skeleton = copy.deepcopy(self.dense)
        tied: dict[int, list[str]] = defaultdict(list)
        named = list(self.dense.named_parameters(remove_duplicate=False))
        for name, parameter in named:
            tied[id(parameter)].append(name)
        of_one = {name: tied[id(parameter)] for name, parameter in named}

        def hand_over(dense_names: set[str]) -> None:
            for name in sorted(dense_names):
                for now in names_now(skeleton, name):
                    owner, leaf = owner_of(skeleton, now)
                    value = owner._parameters[leaf]
                    if value is None:
                        continue
                    # A tied one that stayed dense is final under the last of its names alone.
                    for each in of_one[name] if now == name else [now]:
                        give(each, value.detach())
                    gone = torch.empty_like(value, device="meta")
                    owner._parameters[leaf] = nn.Parameter(gone, value.requires_grad)

        how = replace(self.how, model=skeleton, device="cpu", whole=whole, final=hand_over)
        how.run(self.planned)
        for path, module in skeleton.named_modules():
            for leaf, value in module._buffers.items():
                if value is not None:
                    give(f"{path}.{leaf}" if path else leaf, value)


def keep_blueprint(
    target: nn.Module, model: nn.Module, planned: Planned, how: InitializeCores
) -> None:
    """Keep on a target what the values of a model on meta are made of."""
    dense = copy.deepcopy(model)
    silent = replace(planned, progress=no_progress)
    target.__dict__[_NAME] = Blueprint(dense, silent, replace(how, model=dense))


def pass_on_blueprint(model: nn.Module, part: nn.Module) -> None:
    """Let a part, whose parameters have the names that they have in a model, be filled as it is."""
    if _NAME in model.__dict__:
        part.__dict__[_NAME] = model.__dict__[_NAME]


def fill(model: nn.Module, device: torch.device | str | None = None) -> nn.Module:
    """Give a model from ``initialize(device="meta")`` its values; of a sharded one, each its part.

    They are those that ``initialize`` gives on the CPU with the same seed, on every mesh. Make the
    optimizer after this.

    Args:
        device: where to; None: that of its mesh, or the CPU.

    Returns:
        The same model.

    Raises:
        TensorizeError: it is not on meta, or was not made by ``initialize(device="meta")``.
    """
    inner = unwrapped(model)
    blueprint = inner.__dict__.get(_NAME)
    if not isinstance(blueprint, Blueprint):
        raise TensorizeError(
            "nothing is known of the values that this model had",
            way_out='tensorize.initialize(model, device="meta") of a model on meta',
        )
    device = device or device_of_shards(inner)
    slots = {name: (held, leaf) for name, held, leaf in _slots(inner)}
    made: dict[int, tuple[Tensor, Tensor]] = {}
    for held, leaf in slots.values():
        tensor = held[leaf]
        if tensor.is_meta:
            held[leaf] = made.setdefault(id(tensor), (tensor, empty_like(tensor, device)))[1]

    def take(name: str, values: Tensor) -> None:
        if name in slots:
            held, leaf = slots[name]
            keep_own_part(held[leaf], values)

    whole = not any(weight.spec.pivoted for _, weight in factored(inner))
    blueprint.values(whole, take)
    del inner.__dict__[_NAME]
    return model


def _slots(model: nn.Module) -> Iterator[tuple[str, dict[str, Any], str]]:
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for held in (module._parameters, module._buffers):
            for leaf, tensor in held.items():
                if tensor is not None:
                    yield f"{prefix}{leaf}", held, leaf  # type: ignore[misc]
