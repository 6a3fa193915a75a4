"""The best strategy of a model on so many devices, and why it is the best."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from tensorize.base import printer
from tensorize.base.errors import BudgetError, TensorizeError
from tensorize.base.records import plain
from tensorize.distributed.strategy.cluster import Cluster, cluster_of
from tensorize.distributed.strategy.estimate import ROOM, Estimate, Estimator
from tensorize.distributed.strategy.memory import states_table
from tensorize.distributed.strategy.reading import workload_of
from tensorize.distributed.strategy.search import Found, search, styles_of
from tensorize.distributed.strategy.simulate import Timeline, simulate
from tensorize.distributed.strategy.strategy import INPUTS, Strategy
from tensorize.distributed.strategy.workload import Workload
from tensorize.ir.budget import Budget

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

AXES = ("pp", "dp", "tp")
_SHOWN = 12


@dataclass(frozen=True, eq=False)
class StrategyPlan:
    """How a model is trained on so many devices: the best strategy, and the others.

    ``best`` is its estimate; ``others`` are those that fit by growing time; ``refused`` says which
    numbers of tensor-parallel devices the model does not allow, and which meshes do not fit.
    """

    workload: Workload
    cluster: Cluster
    devices: int
    batch: int
    sequence: int
    best: Estimate
    others: tuple[Estimate, ...]
    refused: dict[str, str]
    estimator: Estimator = field(repr=False)

    @property
    def strategy(self) -> Strategy:
        return self.best.strategy

    def mesh(self, device_type: str = "cuda") -> DeviceMesh:
        """The mesh (pp, dp, tp) of the running process group; neighbours are tensor-parallel.

        Raises:
            TensorizeError: no group runs, or it has another size.
        """
        from torch import distributed

        if not distributed.is_initialized() or distributed.get_world_size() != self.devices:
            raise TensorizeError(
                f"the plan is for a process group of {self.devices}, and none such runs",
                way_out=f"torchrun with {self.devices} processes in all, and "
                "torch.distributed.init_process_group() first",
            )
        from torch.distributed.device_mesh import init_device_mesh

        shape = tuple(getattr(self.strategy, axis) for axis in AXES)
        return init_device_mesh(device_type, shape, mesh_dim_names=AXES)

    def explain(self, strategy: Strategy) -> Estimate:
        """The figures of any strategy for this model, these devices and this batch.

        Raises:
            TensorizeError: it is for other devices, for another batch, or not for this model.
        """
        if strategy.devices != self.devices or strategy.batch != self.batch:
            raise TensorizeError(
                f"the strategy is for {strategy.devices} devices and {strategy.batch} sequences, "
                f"the plan for {self.devices} and {self.batch}",
                way_out="pp * dp * tp are the devices, dp * rows * micro the sequences",
            )
        if strategy.style not in styles_of(self.workload, strategy.tp):
            raise TensorizeError(
                f"style={strategy.style!r} does not suit the model's weights",
                way_out=f"one of {styles_of(self.workload, strategy.tp)}",
            )
        if strategy.pp > len(self.workload.layers):
            raise TensorizeError(
                f"{len(self.workload.layers)} layers make no {strategy.pp} stages",
                way_out="fewer stages",
            )
        for layer in self.estimator.over.unlike:
            if (why := layer.parts(strategy.tp)) is not None:
                raise TensorizeError(why, way_out=f"tp={self.strategy.tp}")
        return self.estimator(strategy, stages=True)

    def timeline(self, strategy: Strategy | None = None, schedule: str = "1f1b") -> Timeline:
        """A step of the best strategy, or of another one, run through its schedule.

        Raises:
            TensorizeError: as ``explain``, or the schedule is unknown.
        """
        return simulate(self.best if strategy is None else self.explain(strategy), schedule)

    def communication_budget(self, size: float) -> Budget:
        """The budget at which tensor parallelism sends so many bytes a step on the plan's mesh.

        They are the payloads of one pipeline's layers, on a device of each of its stages.

        Raises:
            TensorizeError: the plan has no tensor parallelism, or a row would have no byte.
        """
        rows = self.batch // self.strategy.dp * self.sequence
        if self.strategy.tp == 1 or size < rows:
            raise TensorizeError(
                f"{printer.bytes_(size)} are no limit for {rows} rows on {self.strategy}",
                way_out="a plan with tp > 1, and more bytes",
            )
        return Budget(communication=int(size // rows))

    @property
    def tokens(self) -> float:
        """Tokens a second of all devices."""
        return self.batch * self.sequence / self.best.total

    @property
    def used(self) -> float:
        """The share of the devices' peak that the model's own FLOPs take (MFU)."""
        return self.share_of_peak(self.best)

    def share_of_peak(self, estimate: Estimate) -> float:
        """The same for any estimate: six FLOPs a parameter and token, and those of attention."""
        attention = sum(6 * self.sequence * layer.attention for layer in self.workload.layers)
        head = self.workload.head
        weights = sum(layer.parameters for layer in self.workload.layers)
        rows = self.batch * self.sequence
        flops = rows * (6 * (weights + head.inputs * head.outputs) + attention)
        return flops / (estimate.total * self.devices * self.cluster.peak)

    def __str__(self) -> str:
        states = ", ".join(
            f"{cause} {printer.bytes_(size)}" for cause, size in states_table(self.workload).items()
        )
        lines = [
            f"{printer.count(self.workload.parameters)} parameters on {self.devices} x "
            f"{self.cluster.name}, {self.batch} sequences of {self.sequence} a step",
            f"states in all: {states}",
            "",
            f"best: {self.best}",
            f"  {printer.count(self.tokens)} tokens a second, {printer.percent(self.used)} of the "
            "peak",
            "",
            self._table(),
        ]
        if self.refused:
            lines.append("")
            told = list(self.refused.items())[:_SHOWN]
            lines += [f"not {name}: {why}" for name, why in told]
            if len(self.refused) > _SHOWN:
                lines.append(f"and {len(self.refused) - _SHOWN} more (plan.refused)")
        return printer.plain("\n".join(lines))

    def _table(self) -> str:
        titles = ("strategy", "a step", "bubble", "memory", "why not")
        rows = [
            (
                str(each.strategy),
                printer.seconds(each.total),
                printer.percent(each.bubble),
                printer.bytes_(each.bytes),
                self.why_not(each),
            )
            for each in self.shown()
        ]
        align: tuple[printer.Align, ...] = ("keep", "right", "right", "right", "keep")
        return printer.table(titles, rows, width=160, align=align)

    def shown(self) -> Iterator[Estimate]:
        """The best of each mesh and style, by growing time."""
        known: set[str] = set()
        for each in (self.best, *self.others):
            s = each.strategy
            if s.mesh not in known and len(known) < _SHOWN:
                known.add(s.mesh)
                yield each

    def why_not(self, other: Estimate) -> str:
        """The cause of most of the time by which another strategy is slower."""
        if other is self.best:
            return "the best"
        if not other.fits:
            return f"needs {printer.bytes_(other.bytes)} of {printer.bytes_(other.room)}"
        causes = {*self.best.seconds, *other.seconds}
        more = {
            cause: other.seconds.get(cause, 0.0) - self.best.seconds.get(cause, 0.0)
            for cause in sorted(causes)
        }
        worst = max(more, key=lambda cause: more[cause])
        return f"{printer.seconds(more[worst])} more of {worst}"

    def to_json(self) -> str:
        """All of it but the model's layers: the best strategy, and every other that fits."""
        return json.dumps(
            {
                "machine": plain(self.cluster),
                "devices": self.devices,
                "batch": self.batch,
                "sequence": self.sequence,
                "parameters": self.workload.parameters,
                "best": _figures(self.best),
                "others": [_figures(each) for each in self.others],
                "refused": self.refused,
            },
            indent=1,
        )


def _figures(estimate: Estimate) -> dict[str, Any]:
    return {
        "strategy": plain(estimate.strategy),
        "total": estimate.total,
        "seconds": estimate.seconds,
        "sent": estimate.sent,
        "memory": estimate.memory,
        "host": estimate.host,
        "bubble": estimate.bubble,
    }


def plan(
    model: nn.Module | Workload,
    *,
    devices: int,
    machine: str | Cluster,
    batch: int,
    sequence: int,
    example_inputs: Any = None,
) -> StrategyPlan:
    """The fastest strategy to train a model on so many devices, of all that fit into their memory.

    Nothing runs but one forward pass on tensors without values: the figures are a model's
    (docs/strategy.md says which, and how far it was off where it was compared).

    Args:
        model: dense, compressed or initialized, on any device or on meta; or a ``Workload``.
        devices: how many there are, of all nodes.
        machine: the name of a kind of devices (``CLUSTERS``), a ``Cluster``, or ``"measured"``:
            what ``tensorize calibrate --distributed`` found from this machine.
        batch: sequences of a step, over all devices.
        sequence: tokens of a sequence.
        example_inputs: what forward takes, where the model has no inputs of its own.

    Raises:
        TensorizeError: an argument makes no sense, or the model is none that can be planned.
        BudgetError: no strategy fits into the memory of so many devices; it names how many would.
    """
    cluster = cluster_of(machine)
    for name, value in (("devices", devices), ("batch", batch), ("sequence", sequence)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise TensorizeError(
                f"{name} must be a positive integer, got {value!r}", way_out=f"{name}=64"
            )
    workload = model if isinstance(model, Workload) else workload_of(model, example_inputs)
    estimator = Estimator(workload, cluster, sequence)
    found = search(estimator, devices, batch)
    if not found.fitting:
        raise _nothing_fits(found, estimator, devices, batch)
    best, *others = found.fitting
    given = workload, cluster, devices, batch, sequence
    best = estimator(best.strategy, stages=True)
    return StrategyPlan(*given, best, tuple(others), found.refused, estimator)


def _nothing_fits(found: Found, estimator: Estimator, devices: int, batch: int) -> TensorizeError:
    if found.leanest is None:
        return TensorizeError(
            f"a batch of {batch} cannot be spread over {devices} devices",
            way_out=f"a multiple of the devices: batch={devices}",
        )
    room = printer.bytes_(ROOM * estimator.cluster.memory)
    needed = printer.bytes_(found.leanest.bytes)
    for times in (2**k for k in range(1, 13)):
        more = search(estimator, devices * times, batch * times)
        if more.fitting:
            return BudgetError(
                f"no strategy fits: the leanest ({found.leanest.strategy}) takes {needed} of "
                f"{room} a device",
                way_out=f"devices={devices * times} with batch={batch * times} hold it, or a "
                "shorter sequence, a smaller model, devices of more memory",
            )
    return BudgetError(
        f"no strategy fits: one sequence takes {needed} of {room} a device",
        way_out=f"a shorter sequence, or devices of more memory; checkpoint={INPUTS!r} was tried",
    )
