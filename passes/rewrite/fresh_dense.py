"""Give values to a model on the meta device, module by module, by its own initialisers.

A Hugging Face model's ``_init_weights``, a layer's ``reset_parameters``, or the caller's function
make the values. Memory is filled with NaN first, so what nobody initialises is found. A module's
values are handed on as soon as they are final, so that dense weights can give way to cores before
the next ones are made.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tensorize.base.errors import CaptureError

Initializer = Callable[[nn.Module], object]

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def is_on_meta(model: nn.Module) -> bool:
    return any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def made_fresh(
    model: nn.Module, device: torch.device, initializer: Initializer | None
) -> Iterator[set[str]]:
    """Make the values of a model on meta; yields names of parameters as they become final.

    The caller may take those parameters away before it goes on.

    Raises:
        CaptureError: a module has values that none of its initialisers makes.
    """
    rooms = _Rooms(model, device)
    waiting: dict[int, set[str]] = defaultdict(set)
    for path, module, above in list(_children_first(model, "", ())):
        method = initializer or _method_of((*above, module))
        if rooms.fill(module):
            _initialise(path, module, method)
        elif initializer is None and method is not None:
            method(module)  # of a model that sets its layers' values anew, as GPT-2's does
        own = {f"{path}.{leaf}" if path else leaf for leaf in module._parameters}
        final = waiting.pop(id(module), set())
        if initializer is None and _has_method_of_its_own(above):
            waiting[id(above[-1])] |= own
        else:
            final |= own
        yield final


def _children_first(
    module: nn.Module, path: str, above: tuple[nn.Module, ...]
) -> Iterator[tuple[str, nn.Module, tuple[nn.Module, ...]]]:
    """Every module after its children, with all modules above it."""
    seen: set[int] = set()
    for name, child in module.named_children():
        if id(child) not in seen:
            seen.add(id(child))
            inner = f"{path}.{name}" if path else name
            yield from _children_first(child, inner, (*above, module))
    yield path, module, above


class _Rooms:
    """Memory for tensors on meta. A tied one is held until its last module has it, no other is."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._device = device
        self._left = Counter(id(t) for module in model.modules() for _, _, t in _on_meta(module))
        self._tied: dict[int, tuple[Tensor, Tensor]] = {}

    def fill(self, module: nn.Module) -> bool:
        """Give a module's own tensors memory; whether there were any that nobody had before."""
        new = False
        for held, leaf, tensor in list(_on_meta(module)):
            key = id(tensor)
            self._left[key] -= 1
            if key in self._tied:
                room = self._tied[key][1]
            else:
                new, room = True, _unset(tensor, self._device)
                if isinstance(tensor, nn.Parameter):
                    room = nn.Parameter(room, requires_grad=tensor.requires_grad)
                self._tied[key] = tensor, room
            held[leaf] = room
            if not self._left[key]:
                del self._tied[key]
        return new


def _on_meta(module: nn.Module) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    for held in (module._parameters, module._buffers):
        for leaf, tensor in held.items():
            if tensor is not None and tensor.is_meta:
                yield held, leaf, tensor


def _unset(tensor: Tensor, device: torch.device) -> Tensor:
    room = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    if tensor.is_floating_point() or tensor.is_complex():
        return room.fill_(torch.nan)
    return room.zero_() if tensor.dtype == torch.bool else room.fill_(_no_integer(tensor.dtype))


def _no_integer(dtype: torch.dtype) -> int:
    return int(torch.iinfo(dtype).max)


def _method_of(chain: tuple[nn.Module, ...]) -> Initializer | None:
    """The ``_init_weights`` of the innermost Hugging Face model among these modules."""
    found = (getattr(module, "_init_weights", None) for module in reversed(chain))
    return next((method for method in found if callable(method)), None)


def _has_method_of_its_own(above: tuple[nn.Module, ...]) -> bool:
    """Whether a method runs on the next module above that may know the layers in it."""
    return _method_of(above) is not None and not isinstance(above[-1], _CONTAINERS)


def _initialise(path: str, module: nn.Module, method: Initializer | None) -> None:
    if method is not None:
        with torch.no_grad():
            method(module)
    for name in ("reset_parameters", "_reset_parameters"):
        # A method that does not know this layer leaves it to the layer's own.
        if _unmade(module) and callable(own := getattr(module, name, None)):
            own()
    if missing := _unmade(module):
        raise CaptureError(
            f"nothing makes the values of {', '.join(missing)} of this {type(module).__name__}",
            site=path or None,
            way_out="give the class a reset_parameters(), pass initializer= (a function of a "
            "module), or build the model on a real device",
        )


def _unmade(module: nn.Module) -> list[str]:
    tensors = {**module._parameters, **module._buffers}
    return [leaf for leaf, t in tensors.items() if t is not None and _is_unset(t)]


def _is_unset(tensor: Tensor) -> bool:
    if tensor.is_meta or tensor.dtype == torch.bool or not tensor.numel():
        return False
    if tensor.is_floating_point() or tensor.is_complex():
        return bool(torch.isnan(tensor.sum()))  # without a mask of its size
    return bool((tensor == _no_integer(tensor.dtype)).all())
