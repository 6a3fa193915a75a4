"""What is checked in a guarded model, what is not, and what happened."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from tensorize.checking.faults import Fault, Mend

if TYPE_CHECKING:
    from tensorize.checking.guarding import Guard

_NEVER = (
    "dense parameters that a module's own code multiplies with, as a head tied by hand",
    "attention, norms, activations and sums between products",
    "what arrives at a product wrong already, and what befalls a result after its check",
    "faults below the limits: about what rounding to the result's dtype does to a row",
)


@dataclass(frozen=True)
class Checked:
    """One use of a weight: rows checked so far, the limit relative to its input, by dtypes, and
    whether its gradients are checked as well."""

    weight: str
    kind: str
    use: str
    rows: int
    limits: dict[str, float]
    gradients: bool


@dataclass(frozen=True)
class GuardReport:
    """What ``tensorize.guard_report`` tells.

    ``counts``: (weight, device, rank) and how many faults. ``skipped``: steps of training.
    ``not_covered``: what, and why.
    """

    sites: tuple[Checked, ...]
    faults: tuple[Fault, ...]
    mends: tuple[Mend, ...]
    counts: dict[tuple[str, str, int], int]
    skipped: int
    not_covered: tuple[tuple[str, str], ...]

    @property
    def rows(self) -> int:
        """Rows of all products that were checked."""
        return sum(site.rows for site in self.sites)

    def __str__(self) -> str:
        steps = f", {self.skipped} steps skipped" if self.skipped else ""
        lines = [
            f"guarded: {len(self.sites)} uses of weights, {self.rows} rows checked, "
            f"{len(self.faults)} faults, {len(self.mends)} tensors mended{steps}"
        ]
        for (weight, device, rank), count in self.counts.items():
            lines.append(f"  {count:6d} x {weight} on rank {rank}, {device}")
        lines += [f"  {fault}" for fault in self.faults[-10:]]
        lines += [f"  {mend}" for mend in self.mends[-10:]]
        lines.append("not covered:")
        lines += [f"  {what}: {why}" if why else f"  {what}" for what, why in self.not_covered]
        return "\n".join(lines)


def reported(guard: Guard) -> GuardReport:
    """The report of a guard."""
    sites, missing = [], [(what, "") for what in _NEVER]
    for site in guard.sites.values():
        checked = [(name, use) for name, use in site.uses.items() if use.limits]
        if not checked:
            missing.append((site.name, "the calibration data do not reach it"))
        sites += [
            Checked(
                site.name,
                site.kind,
                how,
                use.rows,
                {name: limit.relative for name, limit in use.limits.items()},
                bool(use.back_limits),
            )
            for how, use in checked
        ]
        for use in site.uses.values():
            missing += [(site.name, f"{why} ({n} times)") for why, n in use.missed.items()]
    known = {id(part) for site in guard.sites.values() for part in site.module.modules()}
    missing += [
        (name or "the model itself", f"a {type(module).__name__} has no check")
        for name, module in guard.model.named_modules()
        if id(module) not in known and _multiplies(module)
    ]
    foreign = [leaf.name for leaf in guard.leaves.named.values() if leaf.limit is None]
    missing += [
        (name, "its gradient is not checked: calibration saw none, or other uses")
        for name in foreign
    ]
    missing += [
        (name, "its memory is in no one piece") for name in guard.memory.missing(guard.model)
    ]
    log = guard.log
    counts = dict(log.counts())
    return GuardReport(
        tuple(sites), tuple(log.faults), tuple(log.mends), counts, log.skipped, tuple(missing)
    )


def _multiplies(module: nn.Module) -> bool:
    """Whether a module holds a matrix of its own."""
    return any(p is not None and p.dim() > 1 for p in module._parameters.values())
