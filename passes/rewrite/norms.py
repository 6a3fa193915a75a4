"""Estimate the statistics of batch norms again, on what arrives in the compressed model.

A batch norm subtracts a mean and divides by a deviation that were seen in training. In the
compressed model what arrives there is not quite the same, and one pass over the calibration data
tells its statistics (as after the averaging of weights, Izmailov et al. 2018).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tensorize.capture.forward import once, untouched
from tensorize.ir.sites import Batch
from tensorize.passes.observe.loss import PreservedLoss
from tensorize.passes.stages import Rewritten


@dataclass(frozen=True)
class EstimateNorms:
    """Gives batch norms the statistics of the calibration data, where that lowers what is lost.

    ``dense`` is the model as it was. No labels are needed, and no gradients: forward passes over
    the batches ``learnt``, and the distance to the dense outputs on those ``held_out``.
    """

    dense: nn.Module
    learnt: tuple[Batch, ...]
    held_out: tuple[Batch, ...]
    loss: PreservedLoss
    name: str = "norms"

    def run(self, done: Rewritten) -> Rewritten:
        norms = norms_of(done.model)
        kept = {norm: [buffer.clone() for buffer in norm.buffers()] for norm in norms}
        buffers = [buffer for norm in norms for buffer in norm.buffers()]
        with untouched(done.model, buffers), untouched(self.dense):
            before = after = self._distance(done.model)
            if estimate(done.model, norms, self.learnt):
                for norm, values in kept.items():
                    _keep_count(norm, values)
                after = self._distance(done.model)
            if not after < before:
                for norm, values in kept.items():
                    _put(norm, values)
        told = f"{len(norms)} batch norms: {before:.4g} to {after:.4g} on held-out batches"
        if not after < before:
            return replace(done, summary=f"{told}, so they keep their statistics")
        note = f"estimated again on the calibration data: the statistics of {told}"
        return replace(done, summary=told, notes=(*done.notes, note))

    def _distance(self, model: nn.Module) -> float:
        return self.loss.mean_distance(model, self.dense, self.held_out or self.learnt)


def norms_of(model: nn.Module) -> list[_BatchNorm]:
    """The batch norms that use statistics which they keep, and can estimate them."""
    return [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm)
        and not isinstance(module, nn.SyncBatchNorm)  # for several processes only
        and module.running_mean is not None
        and module.num_batches_tracked is not None
    ]


class _OneValue(Exception):
    """A channel has one value, of which there is no deviation."""


def estimate(model: nn.Module, norms: Sequence[_BatchNorm], batches: Sequence[Batch]) -> bool:
    """Give norms the mean statistics of batches, inside of ``untouched``; whether it can be done.

    Each batch is normalized by its own statistics, as in training: what arrives at a later norm is
    then what will arrive there.
    """

    def check(norm: nn.Module, args: tuple[Any, ...]) -> None:
        x: Tensor = args[0]
        if x.numel() <= x.shape[1]:
            raise _OneValue

    handles = [norm.register_forward_pre_hook(check) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum, norm.training = None, True
    try:
        for batch in batches:
            once(model, batch)
    except _OneValue:
        return False
    finally:
        for norm, handle in zip(norms, handles, strict=True):
            norm.training = False
            handle.remove()
    return True


def _keep_count(norm: _BatchNorm, values: Sequence[Tensor]) -> None:
    """The count of batches of before; all of it, where the norm was not called."""
    assert norm.num_batches_tracked is not None
    if norm.num_batches_tracked == 0:
        _put(norm, values)
    else:
        norm.num_batches_tracked.copy_(values[-1])


@torch.no_grad()
def _put(norm: _BatchNorm, values: Sequence[Tensor]) -> None:
    for buffer, value in zip(norm.buffers(), values, strict=True):
        buffer.copy_(value)
