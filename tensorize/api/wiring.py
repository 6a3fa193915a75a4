"""Where passes and codegen meet: contractions in the order that is predicted to be fastest."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from tensorize.base.tensors import device_of
from tensorize.codegen.aten import emit as aten
from tensorize.codegen.machine import rates as machine
from tensorize.codegen.machine import timed_orders
from tensorize.ir.machine import Machine
from tensorize.ir.orders import ContractionPlan
from tensorize.ir.spec import TTSpec
from tensorize.passes.orders.by_time import BREAKPOINTS, common_breakpoints, timed_plan
from tensorize.weight.contractions import Asked, Contraction, register_backend


class _Contractions:
    """Contractions in the fastest order that the machine's figures predict, as torch operations."""

    def contraction(self, asked: Asked) -> Contraction:
        return aten.build(self._plan(asked))

    def turns(self, asked: Asked) -> tuple[int, ...]:
        return self._plan(asked).breakpoints

    def _plan(self, asked: Asked) -> ContractionPlan:
        return timed_plan(
            asked.spec,
            asked.contract,
            machine.current(asked.device),
            BREAKPOINTS if asked.breakpoints is None else asked.breakpoints,
            asked.dtype,
            timed_orders.known(asked.device),
        )

    def breakpoints(self, uses: Sequence[tuple[TTSpec, str]], device: str) -> tuple[int, ...]:
        sides = [(s, contract, dtype) for s, dtype in uses for contract in ("columns", "rows")]
        return common_breakpoints(sides, machine.current(device))


register_backend(_Contractions())


def figures(model: nn.Module) -> Machine:
    """Those of the machine that a model is on."""
    return machine.current(device_of(model))
