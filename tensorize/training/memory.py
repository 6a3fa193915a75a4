"""What a training run takes, before it is made."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from tensorize.base import printer
from tensorize.base.errors import CaptureError, TensorizeError, check_one_of
from tensorize.base.sharded import fully_sharded, own_part
from tensorize.capture.inputs import batch_of
from tensorize.capture.kept import keeping

# Bytes a parameter: the weights themselves (mixed: float32 masters and their bfloat16 copies),
# gradients, each of the optimizer's states, and what else there is of every parameter (mixed: the
# gradients of the copies, before they are those of the masters).
PRECISIONS = {
    "mixed": (6, 4, 4, 2),
    "float32": (4, 4, 4, 0),
    "bfloat16": (2, 2, 2, 0),
    "stochastic": (2, 2, 4, 0),
}
STATES = {"adamw": 2, "adam": 2, "momentum": 1, "sgd": 0}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of a training run.

    ``other`` are the narrow gradients of mixed precision; ``activations`` what a forward pass saves
    for its backward pass (0 where no batch was given).
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int = 0
    other: int = 0

    @property
    def total(self) -> int:
        """All of them: not all are at their largest at the same moment, so a run takes less."""
        parts = self.parameters, self.gradients, self.optimizer, self.activations, self.other
        return sum(parts)

    def devices(self, memory: float, node: int = 8) -> int:
        """How many devices of so many bytes hold it at least; never less than one whole node."""
        return max(node, math.ceil(self.total / memory))

    def __str__(self) -> str:
        parts = ("parameters", "gradients", "optimizer", "other", "activations", "total")
        rows = [(name, printer.bytes_(getattr(self, name))) for name in parts]
        return printer.table(("memory", "bytes"), rows, width=40, align=["left", "right"])


def memory(
    model: nn.Module | float,
    *,
    optimizer: str = "adamw",
    precision: str = "mixed",
    batch: Any = None,
) -> MemoryEstimate:
    """Memory of training, by the rule of bytes a parameter; activations by tracing a batch.

    For mixed-precision Adam: 6 bytes a parameter (masters and copies), 4 of gradients, 8 of
    states and 2 of the copies' gradients, 20 in all (Dash et al. 2023, "Optimizing distributed
    training on Frontier").

    Args:
        model: a module (it may be on meta), or a number of parameters. Frozen parameters take
            their weights only. Of a sharded one, what this process holds.
        optimizer: ``"adamw"``, ``"adam"``, ``"momentum"`` (SGD with it) or ``"sgd"``.
        precision: ``"mixed"`` (bfloat16 autocast with float32 masters), ``"float32"``,
            ``"bfloat16"`` (nothing wider) or ``"stochastic"`` (bfloat16 parameters, float32 states:
            ``round_stochastically``).
        batch: what forward takes, as ``example_inputs``: its saved activations are counted on fake
            tensors, without a computation.

    Raises:
        TensorizeError: an option is unknown, a number of parameters came with a batch, or the model
            is one of FSDP2's and there is a batch.
        CaptureError: the batch does not fit, or the forward pass needs values.
    """
    check_one_of("optimizer", optimizer, STATES)
    check_one_of("precision", precision, PRECISIONS)
    weight, gradient, state, other = PRECISIONS[precision]
    if isinstance(model, nn.Module):
        sizes = [(own_part(p).numel(), p.requires_grad) for p in model.parameters()]
    elif batch is None:
        sizes = [(int(model), True)]
    else:
        raise TensorizeError("activations need the model", way_out="pass the module itself")
    count, trained = sum(n for n, _ in sizes), sum(n for n, grad in sizes if grad)
    saved = 0
    if isinstance(model, nn.Module) and batch is not None:
        saved = activations(model, batch, autocast=precision == "mixed")
    return MemoryEstimate(
        parameters=weight * count,
        gradients=gradient * trained,
        optimizer=state * STATES[optimizer] * trained,
        activations=saved,
        other=other * trained,
    )


def activations(model: nn.Module, batch: Any, *, autocast: bool = False) -> int:
    """Bytes that a forward pass in training mode keeps for its backward pass, but parameters.

    Its outputs are among them, where there is no loss among those. Nothing is computed, and the
    model is left as it was.

    Raises:
        CaptureError: the batch does not fit the model, or the forward pass needs values.
    """
    if fully_sharded(model):
        raise TensorizeError(
            "FSDP2 gathers weights while the model runs, so there is none to trace",
            way_out="count activations before fully_shard, or parallelize with dp: they are the "
            "same",
        )
    given = batch_of(batch)
    device = next((p.device.type for p in model.parameters()), "cpu")
    device = "cpu" if device == "meta" else device
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with keeping(model), mode:
        own = as_fake(model, device)
        args, kwargs = pytree.tree_map(
            lambda v: torch.empty_like(v, device=device) if isinstance(v, Tensor) else v,
            (given.args, dict(given.kwargs)),
        )
        live = LiveBytes(own)
        try:
            with live, torch.autocast(device, torch.bfloat16, enabled=autocast):
                kept = _what_is_kept(model(*args, **kwargs))
        except Exception as error:
            raise CaptureError(
                f"the activations cannot be traced: {type(error).__name__}: {error}",
                way_out="batch= is a tuple of positional or a dict of keyword arguments",
            ) from error
        found = live.bytes
        del kept
    return found


def _what_is_kept(outputs: Any) -> Any:
    """Of a model that computes its loss, the loss; else its outputs."""
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    return outputs if loss is None else loss


class LiveBytes(TorchDispatchMode):
    """What operations in a block made that is still alive, each storage once.

    After a forward pass that is what autograd, and checkpointing, keep for the backward pass. The
    tensors ``without`` do not count, nor do their copies in another dtype (autocast's).
    """

    def __init__(self, without: Iterable[Tensor]) -> None:
        super().__init__()
        self._without = {_storage(tensor) for tensor in without}
        self._alive: Any = WeakIdKeyDictionary()

    @property
    def bytes(self) -> int:
        return sum(self._alive.values())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and _storage(args[0]) in self._without:
            self._without.add(_storage(result))
        for value in pytree.tree_leaves(result):
            if isinstance(value, Tensor) and _storage(value) not in self._without:
                storage = value.untyped_storage()
                self._alive[storage] = storage.nbytes()
        return result


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def as_fake(model: nn.Module, device: str) -> list[Tensor]:
    """Fake tensors in the model in place of its own, and it in training mode."""
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        if id(tensor) not in made:
            blank = torch.empty(own_part(tensor).shape, dtype=tensor.dtype, device=device)
            if isinstance(tensor, nn.Parameter):
                blank = nn.Parameter(blank, requires_grad=tensor.requires_grad)
            made[id(tensor)] = blank
        return made[id(tensor)]

    for module in model.modules():
        module._parameters.update({k: fake(v) for k, v in module._parameters.items()})  # type: ignore[arg-type]
        module._buffers.update({k: fake(v) for k, v in module._buffers.items()})
    model.train()
    return list(made.values())
