"""Optimizer states that stay on the host, updated in sub-groups, some of them on the device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from tensorize.base import timer
from tensorize.base.errors import TensorizeError
from tensorize.training.host_updates import UpdateRates, best_stride, on_device

_SIZE = 100_000_000
_TIMED = 4_000_000
"""Parameters of the updates and copies that are timed where no rates are given."""
_TEMPORARY = 2
"""Copies of a parameter that an update makes on the way, as torch's own Adam does."""


def offload(
    optimizer: torch.optim.Optimizer,
    *,
    stride: int | None = None,
    size: int = _SIZE,
    device: torch.device | str | None = None,
    rates: UpdateRates | None = None,
) -> Offload:
    """Update parameters that are on the host in sub-groups, every ``stride``-th on the device.

    The parameters are where FSDP2's ``CPUOffloadPolicy()`` leaves them, or wherever else on the
    host; their states stay beside them. ``optimizer.step()`` is called as before, and gives the
    same numbers whatever the schedule is: each parameter is updated once, by the optimizer itself.
    Hooks of its steps run for each sub-group.

    Args:
        stride: every how manieth sub-group is updated on the device; 0: none is; None: what takes
            the least time by ``rates``, and 0 where there is no accelerator.
        size: parameters of a sub-group; a larger one is a group by itself.
        device: where; None: the machine's accelerator.
        rates: what host, device and the link between them do; None: some updates and copies are
            timed, if there is an accelerator.

    Returns:
        A handle; ``remove()`` undoes it.

    Raises:
        TensorizeError: an argument makes no sense, or the optimizer's steps are not each
            parameter's own.
    """
    if size < 1 or (stride is not None and stride < 0):
        raise TensorizeError(
            f"size must be positive and stride not negative, got {size} and {stride}",
            way_out="offload(optimizer, stride=2)",
        )
    in_groups = {"step", "k"} & {key for group in optimizer.param_groups for key in group}
    if in_groups or isinstance(optimizer, torch.optim.LBFGS):
        raise TensorizeError(
            f"{type(optimizer).__name__} counts or searches over all parameters at once, so they "
            "cannot be updated in sub-groups",
            way_out="an optimizer of which each parameter has its own states, such as AdamW",
        )
    accelerator = torch.accelerator.current_accelerator()
    where = torch.device(device) if device is not None else accelerator
    if stride is None:
        known = rates or (measured_rates(where) if accelerator is not None and where else None)
        stride = 0 if known is None else best_stride(known)
    if stride and where is None:
        raise TensorizeError(
            f"stride={stride} needs a device, and this machine has no accelerator",
            way_out='stride=0; or device="cpu", which gains nothing',
        )
    return Offload(optimizer, stride, size, where)


class Offload:
    """What ``offload`` made of an optimizer's step."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        stride: int,
        size: int,
        device: torch.device | None,
    ) -> None:
        self.stride, self.device = stride, device
        self._optimizer, self._own = optimizer, optimizer.__dict__.get("step")
        self._step: Callable[[], Any] = optimizer.step
        every = [p for group in optimizer.param_groups for p in group["params"]]
        self.groups = tuple(_grouped(every, size))
        self._done: dict[int, Future[None]] = {}

        @functools.wraps(optimizer.step)
        def step(_: torch.optim.Optimizer, closure: Callable[[], Any] | None = None) -> Any:
            return self._all(closure)

        optimizer.__dict__["step"] = self._method = MethodType(step, optimizer)

    def remove(self) -> None:
        """Steps are again what they were; states are where they are."""
        if self._optimizer.__dict__.get("step") is not self._method:
            return  # wrapped once more meanwhile
        del self._optimizer.__dict__["step"]
        if self._own is not None:
            self._optimizer.__dict__["step"] = self._own

    @property
    def host_bytes(self) -> int:
        """What a step takes of the host at its most: parameters, gradients, states, temporaries.

        Of an optimizer that has not made its states yet, those of Adam are counted.
        """
        total = largest = 0
        for parameter in (p for group in self.groups for p in group if p.requires_grad):
            own = _local(parameter).nbytes
            states = self._optimizer.state.get(parameter, {}).values()
            held = sum(_local(s).nbytes for s in states if isinstance(s, Tensor) and s.dim())
            total += 2 * own + (held or 2 * own)
            largest = max(largest, own)
        return total + _TEMPORARY * largest

    @contextmanager
    def last_backward(self) -> Iterator[None]:
        """The last backward pass before a step: sub-groups of the host are updated meanwhile.

        Each begins once the gradients of all of its parameters are there, so nothing may change
        these afterwards (no clipping, no unscaling); ``step()`` waits for them.
        """
        missing = [{id(p) for p in group if p.requires_grad} for group in self.groups]
        home = {id(p): k for k, group in enumerate(self.groups) for p in group}
        with ThreadPoolExecutor(1) as worker:

            def arrived(parameter: Tensor) -> None:
                k = home[id(parameter)]
                missing[k].discard(id(parameter))
                if not missing[k] and k not in self._done and not on_device(k, self.stride):
                    self._done[k] = worker.submit(self._on_host, self.groups[k])

            handles = [
                p.register_post_accumulate_grad_hook(arrived)
                for group in self.groups
                for p in group
                if p.requires_grad
            ]
            try:
                yield
            finally:
                for handle in handles:
                    handle.remove()

    def _all(self, closure: Callable[[], Any] | None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for future in self._done.values():
            future.result()
        for k, group in enumerate(self.groups):
            if k in self._done:
                continue
            if on_device(k, self.stride):
                self._on_device(group)
            else:
                self._on_host(group)
        self._done.clear()
        if self.stride and self.device is not None and self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return loss

    def _on_host(self, group: Sequence[nn.Parameter]) -> None:
        with self._only({id(p): p for p in group}):
            self._step()

    @torch.no_grad()
    def _on_device(self, group: Sequence[nn.Parameter]) -> None:
        """Copies there in place of the parameters, and back; work is only queued where it can be.

        A parameter that has no states yet gets them on the host.
        """
        assert self.device is not None
        state = self._optimizer.state
        stateless = [p for p in group if p.grad is not None and not state.get(p)]
        if stateless:
            self._on_host(stateless)
        stand_ins: dict[int, nn.Parameter] = {}
        moved = [p for p in group if p.grad is not None and not any(p is q for q in stateless)]
        for parameter in moved:
            copy = nn.Parameter(self._there(parameter))
            copy.grad = self._there(parameter.grad)
            stand_ins[id(parameter)] = copy
            state[copy] = {
                name: self._there(value) if isinstance(value, Tensor) and value.dim() else value
                for name, value in state[parameter].items()
            }
        with self._only(stand_ins):
            self._step()
        for parameter in moved:
            copy = stand_ins[id(parameter)]
            _local(parameter).copy_(copy, non_blocking=True)
            for name, value in state.pop(copy).items():
                held = state[parameter].get(name)
                if isinstance(held, Tensor) and held.dim():
                    _local(held).copy_(value, non_blocking=True)
                else:
                    state[parameter][name] = value

    def _there(self, tensor: Any) -> Tensor:
        return _local(tensor).detach().to(self.device, non_blocking=True, copy=True)

    @contextmanager
    def _only(self, chosen: dict[int, nn.Parameter]) -> Iterator[None]:
        """The optimizer has some of its parameters, or what stands for them."""
        groups = self._optimizer.param_groups
        every = [group["params"] for group in groups]
        for group, own in zip(groups, every, strict=True):
            group["params"] = [chosen[id(p)] for p in own if id(p) in chosen]
        try:
            yield
        finally:
            for group, own in zip(groups, every, strict=True):
                group["params"] = own


def _grouped(parameters: Sequence[nn.Parameter], size: int) -> Iterator[tuple[nn.Parameter, ...]]:
    """Neighbours, as long as they have no more numbers together."""
    group: list[nn.Parameter] = []
    for parameter in parameters:
        if group and sum(map(_numbers, (*group, parameter))) > size:
            yield tuple(group)
            group = []
        group.append(parameter)
    if group:
        yield tuple(group)


def _numbers(parameter: Tensor) -> int:
    return _local(parameter).numel()


def _local(tensor: Any) -> Tensor:
    """A tensor's part on this rank, where it is one of a sharded one."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def measured_rates(device: torch.device) -> UpdateRates:
    """Parameters a second that Adam updates here and there, bytes a second between them."""

    def updates(where: torch.device) -> float:
        parameter = nn.Parameter(torch.ones(_TIMED, device=where))
        parameter.grad = torch.ones_like(parameter)
        optimizer = torch.optim.AdamW([parameter])
        return _TIMED / timer.seconds_of(optimizer.step, where.type)

    host = torch.ones(_TIMED, pin_memory=device.type == "cuda")
    there = host.to(device)
    up = timer.seconds_of(lambda: there.copy_(host, non_blocking=True), device.type)
    down = timer.seconds_of(lambda: host.copy_(there, non_blocking=True), device.type)
    moved = host.nbytes
    return UpdateRates(updates(torch.device("cpu")), updates(device), moved / up, moved / down)
