"""What a guard knows, kept with the artefact: limits, not what is made of the weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from tensorize.base.records import plain, record
from tensorize.checking.faults import RECOMPUTE
from tensorize.checking.guarding import ARTEFACT, Guard, guard_of, unguard
from tensorize.checking.limits import Limit
from tensorize.store.manifest import damage_named, read_manifest


def note_artefact(model: nn.Module, directory: Path) -> None:
    """Remember where a model's weights lie on disk: a copy to mend from."""
    model.__dict__[ARTEFACT] = directory.resolve()


def guard_record(model: nn.Module) -> dict[str, Any] | None:
    """The limits of a guarded model as JSON data; None of any other.

    What a caller's own function does about faults is not kept: it is then ``"recompute"``.
    """
    guard = guard_of(model)
    if guard is None:
        return None
    asked = guard.log.on_fault
    return {
        "on_fault": asked if isinstance(asked, str) else RECOMPUTE,
        "sites": {
            name: {
                contract: [_written(use.limits), _written(use.back_limits)]
                for contract, use in site.uses.items()
            }
            for name, site in guard.sites.items()
        },
        "gradients": {
            leaf.name: [leaf.kind, leaf.limit]
            for leaf in guard.leaves.named.values()
            if leaf.limit is not None
        },
    }


def resume(model: nn.Module) -> None:
    """Guard a loaded model by the limits that were saved with it; no other is guarded.

    Raises:
        CheckpointError: they are not what ``guard_record`` wrote.
    """
    manifest = read_manifest(model.__dict__[ARTEFACT])
    data = manifest.guard
    if data is None:
        return
    unguard(model)
    with damage_named(manifest.path):
        guard = Guard(model, data["on_fault"])
        guard.attach()
        for name, uses in data["sites"].items():
            for contract, (limits, back_limits) in uses.items():
                use = guard.sites[name].use(contract)
                use.limits, use.back_limits = _read(limits), _read(back_limits)
        for name, (kind, limit) in data["gradients"].items():
            guard.leaves.known(name, kind, limit)
    guard.prepare()


def _written(limits: Mapping[str, Limit]) -> dict[str, Any]:
    return {name: plain(limit) for name, limit in limits.items()}


def _read(data: Mapping[str, Any]) -> dict[str, Limit]:
    return {name: record(Limit, values) for name, values in data.items()}
