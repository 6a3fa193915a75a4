"""Stochastic rounding of parameters below float32.

An update smaller than half the spacing of a bfloat16 parameter is lost by rounding to nearest,
every time. Rounded up or down with the probability that makes the expectation right, it is kept on
average (Gupta et al. 2015; for bfloat16 training Zamirai et al. 2021), so that no float32 masters
are needed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from tensorize.base.errors import TensorizeError
from tensorize.base.sharded import own_part

NARROW = (torch.bfloat16,)


def round_stochastically(optimizer: torch.optim.Optimizer, seed: int = 0) -> RoundedSteps:
    """Let an optimizer step in float32 and round its bfloat16 parameters stochastically.

    Works with any ``torch.optim.Optimizer``: for the time of a step its bfloat16 parameters and
    gradients are float32, and so are its states, always. Other parameters step as they did.

    Args:
        seed: of the rounding.

    Returns:
        The handle: ``.remove()`` ends it; ``.state_dict()`` and ``.load_state_dict()`` are the
        random state, for stopping and resuming.

    Raises:
        TensorizeError: the optimizer holds no bfloat16 parameter.
    """
    if not any(p.dtype in NARROW for group in optimizer.param_groups for p in group["params"]):
        raise TensorizeError(
            "the optimizer holds no bfloat16 parameter: nothing would be rounded",
            way_out="model.to(torch.bfloat16) before the optimizer is made",
        )
    return RoundedSteps(optimizer, seed)


_WIDENED = ("step", "load_state_dict")
"""Methods of an optimizer for whose time its parameters are float32."""


class _Restored:
    """A method of an optimizer after which, whatever it raised, parameters are what they were."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        name: str,
        restore: Callable[[torch.optim.Optimizer], None],
    ) -> None:
        own = optimizer.__dict__.get(name)  # a scheduler may have put one there
        method = getattr(optimizer, name)

        @functools.wraps(method)
        def called(self: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
            try:
                return method(*args, **kwargs)
            finally:
                restore(self)

        self._optimizer, self._name, self._own = optimizer, name, own
        optimizer.__dict__[name] = self._method = MethodType(called, optimizer)

    def remove(self) -> None:
        if self._optimizer.__dict__.get(self._name) is not self._method:
            return  # wrapped once more meanwhile; what is left restores nothing
        del self._optimizer.__dict__[self._name]
        if self._own is not None:
            self._optimizer.__dict__[self._name] = self._own


class RoundedSteps:
    """What ``round_stochastically`` put around an optimizer's steps."""

    def __init__(self, optimizer: torch.optim.Optimizer, seed: int) -> None:
        devices = {p.device for group in optimizer.param_groups for p in group["params"]}
        self._generators = {d: torch.Generator(d).manual_seed(seed) for d in devices}
        # The list that holds a parameter, its place there, and both.
        self._narrow: list[tuple[list[Any], int, nn.Parameter, nn.Parameter]] = []
        self._handles = [
            optimizer.register_step_pre_hook(self._widen),
            optimizer.register_step_post_hook(self._round),
            # Loaded states take the dtype that their parameter has by then: they are to stay wide.
            optimizer.register_load_state_dict_pre_hook(self._widen_for_states),
            optimizer.register_load_state_dict_post_hook(self._narrow_again),
        ]
        self._restored = [_Restored(optimizer, name, self._narrow_again) for name in _WIDENED]

    def remove(self) -> None:
        """Steps are again what they were."""
        for handle in (*self._handles, *self._restored):
            handle.remove()

    def state_dict(self) -> dict[str, Any]:
        return {str(device): g.get_state() for device, g in self._generators.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, values in state.items():
            self._generators[torch.device(name)].set_state(values)

    def _widen(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if any(value is not None for value in (*args[1:], *kwargs.values())):
            raise TensorizeError(
                "a closure would see parameters in float32, whose steps are rounded after it",
                way_out="compute the gradients first, and call optimizer.step() without a closure",
            )
        self._swap(optimizer, with_gradients=True)

    def _widen_for_states(self, optimizer: torch.optim.Optimizer, state: Any) -> None:
        self._swap(optimizer, with_gradients=False)

    def _swap(self, optimizer: torch.optim.Optimizer, *, with_gradients: bool) -> None:
        """float32 in place of narrow parameters: of those with a gradient and it, or of all."""
        for group in optimizer.param_groups:
            held = group["params"]
            for place, own in enumerate(held):
                if own.dtype not in NARROW or (with_gradients and own.grad is None):
                    continue
                wide = nn.Parameter(own.detach().float())
                wide.grad = own.grad.float() if with_gradients else None
                held[place] = wide
                _move_state(optimizer, own, wide)
                self._narrow.append((held, place, own, wide))

    @torch.no_grad()
    def _round(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for _, _, own, wide in self._narrow:
            values = own_part(wide)
            rounded = stochastically_rounded(values, self._generators[values.device])
            own_part(own).copy_(rounded)
        self._narrow_again(optimizer)

    def _narrow_again(self, optimizer: torch.optim.Optimizer) -> None:
        for held, place, own, wide in self._narrow:
            held[place] = own
            _move_state(optimizer, wide, own)
        self._narrow.clear()


def _move_state(optimizer: torch.optim.Optimizer, now: Tensor, then: Tensor) -> None:
    if now in optimizer.state:
        optimizer.state[then] = optimizer.state.pop(now)


def stochastically_rounded(values: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """float32 values as bfloat16, up or down with the probability of the distance to the other.

    A bfloat16 is the upper half of a float32: a random number below 2^16 is added to its bits,
    and the lower half is cut. Infinities and NaN stay what they are.
    """
    bits = values.view(torch.int32)
    noise = torch.randint(
        1 << 16, bits.shape, dtype=torch.int32, device=bits.device, generator=generator
    )
    rounded = (bits + noise).bitwise_and(-(1 << 16)).view(torch.float32)
    return torch.where(torch.isfinite(values), rounded, values).to(torch.bfloat16)
