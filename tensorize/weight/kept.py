"""Weights that modules keep aside: in plain attributes, in lists, in closures.

Once the weight is factorized, a lazy one stands there too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from tensorize.base.references import replace_held
from tensorize.base.tensors import lies_in_memory
from tensorize.weight.lazy import FactoredWeight

IsLazy = Callable[[nn.Module, str], bool]


class KeptWeight(FactoredWeight):
    """The lazy weight of a module, looked up there each time: its cores may be other ones by then.

    ``detached``: what was kept was no parameter, but a tensor on its memory without gradients.
    """

    __slots__ = ("detached", "name", "owner")

    def __init__(self, owner: nn.Module, name: str, detached: bool) -> None:
        self.owner, self.name, self.detached = owner, name, detached

    def __reduce__(self) -> tuple[Any, ...]:
        # By state, not by arguments: the owner may be what holds this one.
        return KeptWeight.__new__, (KeptWeight,), (self.owner, self.name, self.detached)

    def __setstate__(self, state: tuple[nn.Module, str, bool]) -> None:
        self.owner, self.name, self.detached = state

    def now(self) -> FactoredWeight:
        weight = getattr(self.owner, self.name)
        return weight.data if self.detached else weight

    def dense_parameter(self) -> Tensor:
        """What was kept, once the owner has a dense parameter again."""
        parameter = self.owner.get_parameter(self.name)
        return parameter.detach() if self.detached else parameter


def _of_now(field: str) -> property:
    return property(lambda kept: getattr(kept.now(), field))


for _field in FactoredWeight.__slots__[1:]:
    setattr(KeptWeight, _field, _of_now(_field))


@contextlib.contextmanager
def followed(model: nn.Module, is_lazy: IsLazy) -> Iterator[None]:
    """Parameters that are replaced in here are so too where modules keep them aside.

    Args:
        model: what it keeps is looked for at once, and replaced at the end.
        is_lazy: whether a module's parameter of this name is lazy by now.
    """
    places = {
        id(parameter): (module, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and lies_in_memory(parameter)
    }
    memory = {_place(parameter): (module, name) for module, name, parameter in places.values()}
    kept: dict[int, tuple[Tensor, KeptWeight]] = {}

    def note(value: Any) -> Any:
        if id(value) in places:
            module, name, _ = places[id(value)]
            kept[id(value)] = value, KeptWeight(module, name, detached=False)
        elif type(value) is Tensor and lies_in_memory(value) and _place(value) in memory:
            module, name = memory[_place(value)]
            kept[id(value)] = value, KeptWeight(module, name, detached=not value.requires_grad)
        return value

    replace_held(model, note)
    places.clear()  # a dense weight is released as soon as its cores exist
    yield

    def of_now(value: Any) -> Any:
        if id(value) not in kept:
            return value
        weight = kept[id(value)][1]
        if is_lazy(weight.owner, weight.name):
            return weight
        return weight.dense_parameter() if isinstance(value, nn.Parameter) else value

    if kept:
        replace_held(model, of_now)


def forget(model: nn.Module, is_lazy: IsLazy) -> None:
    """Let a model that is dense again keep its parameters aside where it did before."""

    def of_now(value: Any) -> Any:
        dense = isinstance(value, KeptWeight) and not is_lazy(value.owner, value.name)
        return value.dense_parameter() if dense else value

    replace_held(model, of_now)


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Where the entries of a tensor are in memory, and in which order."""
    memory = tensor.untyped_storage()._cdata
    return memory, tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset()
