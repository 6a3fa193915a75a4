"""What a guarded model knows: its sites, its memory, its log; and how it comes to be guarded."""

from __future__ import annotations

import copy
import math
import uuid
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils import _pytree as pytree

from tensorize.base.errors import FaultError
from tensorize.base.sharded import is_sharded, on_any_rank, own_part, split_as
from tensorize.base.tensors import is_plain
from tensorize.capture.forward import of_the_model, once, untouched
from tensorize.checking import graph
from tensorize.checking.faults import Log, Mend, OnFault
from tensorize.checking.gradients import Leaves
from tensorize.checking.identity import COLUMNS, LOOKUP
from tensorize.checking.memory import COUNT, Memory, held_by
from tensorize.checking.site import CONV1D, HolderSite, ModuleSite, Site
from tensorize.formats import packs
from tensorize.ir.sites import Batch
from tensorize.store.coded import opened
from tensorize.store.manifest import read_manifest
from tensorize.weight.cores import Cores, FactoredLinear
from tensorize.weight.install import is_plain_linear
from tensorize.weight.low_rank import LowRankLinear

_GUARD, ARTEFACT = "_tensorize_guard", "_tensorize_artefact"
"""Attributes of a model: its guard, and the directory that holds a copy of its weights."""

_BACKWARDS = 4
"""Batches of the calibration whose gradients are looked at as well."""


class Guard:
    """What one guarded model knows.

    ``together``: whether other processes train the same numbers, and skip the same steps.
    """

    def __init__(self, model: nn.Module, on_fault: OnFault, *, together: bool = False) -> None:
        self.model, self.log, self.memory = model, Log(on_fault), Memory()
        self.together = together or any(map(is_sharded, model.parameters()))
        self.leaves = Leaves(self.log)
        self.handles: list[Any] = []
        self.traced = False
        self.sites: dict[str, Site] = {}
        inside: set[int] = set()  # modules that are a part of one that is checked as a whole
        for path, module in model.named_modules():
            found = () if id(module) in inside else _sites_of(path, module, self)
            for site in found:
                self.sites[site.name] = site
                inside |= {id(part) for part in module.modules()}
        self._find_alone()
        self._enter()

    def _enter(self) -> None:
        self.key = uuid.uuid4().hex
        graph.known(self.key, self)

    def __deepcopy__(self, memo: dict) -> Guard:
        copied = memo[id(self)] = Guard.__new__(Guard)
        for name, value in vars(self).items():
            setattr(copied, name, copy.deepcopy(value, memo))
        copied._enter()
        return copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._enter()

    # ------------------------------------------------------------------------------ on and off

    def attach(self) -> None:
        """Let every weight that has a check be checked."""
        for site in self.sites.values():
            counted = torch.zeros((), dtype=torch.int64, device=_device(site.module))
            site.module.register_buffer(COUNT, counted, persistent=False)
            self.handles += site.attach()
        self.handles.append(self.model.register_forward_hook(_Settle(self)))
        self.model.__dict__[_GUARD] = self

    def _find_alone(self) -> None:
        """Tell which sites' parameters serve products of that very kind only."""
        kinds: dict[int, set[str]] = defaultdict(set)
        for site in self.sites.values():
            for parameter in site.module.parameters():
                kinds[id(parameter)].add(site.gradient_kind)
        for site in self.sites.values():
            own = (kinds[id(parameter)] for parameter in site.module.parameters())
            site.alone = bool(site.gradient_kind) and all(len(found) == 1 for found in own)

    def detach(self) -> None:
        """Take all of it away again."""
        while self.handles:
            self.handles.pop().remove()
        for module in self.model.modules():
            if module._buffers.pop(COUNT, None) is not None:
                module._non_persistent_buffers_set.discard(COUNT)
        self.leaves.release()
        self.model.__dict__.pop(_GUARD, None)

    def calibrate(self, batches: Sequence[Batch]) -> None:
        """Let the limits be what rounding does on these batches."""
        self.log.calibrating = True
        trains = any(parameter.requires_grad for parameter in self.model.parameters())
        try:
            for k, batch in enumerate(batches):
                with untouched(self.model), of_the_model(f"calibration batch {k} does not run"):
                    once(self.model, batch)
                    if trains and k < _BACKWARDS:
                        with torch.enable_grad():
                            _backward(once(self.model, batch), k)
        finally:
            self.log.calibrating = False
        for site in self.sites.values():
            for use in site.uses.values():
                use.settle()
        for leaf in self.leaves.named.values():
            leaf.settle()

    def prepare(self) -> None:
        """Make what checks multiply with, of weights that are as they should be."""
        for site in self.sites.values():
            site.prepare()
        self.memory.remember(self.model)

    # ------------------------------------------------------------------------------ while it runs

    def remember(self, tensors: Sequence[Tensor]) -> None:
        """Take a weight as it is for what it should be: somebody wrote to it."""
        self.memory.take(self.model, tensors)

    def mend(self, site: Site | None = None) -> tuple[list[Mend], list[str]]:
        """Put back what changed in memory, of all tensors or of a site's: what, and what is lost.

        What checks multiply with is made anew of weights that were looked at, and of no others.
        """
        only = None if site is None else held_by(site.module)
        mends, lost = self.memory.scrub(self.model, self._copy, only)
        for tensor in self.model.buffers() if only is None else only:
            packs.forget(tensor)  # nothing says whether they are whole
        if not lost:
            for each in self.sites.values() if site is None else (site,):
                if self.memory.knows(each.tensors()):
                    mends += each.renewed()
        self.log.mends += mends
        return mends, lost

    def _copy(self, name: str) -> Tensor | None:
        directory: Path | None = self.model.__dict__.get(ARTEFACT)
        if directory is None or not directory.exists():
            return None
        with opened(read_manifest(directory).weights) as file:
            if name not in set(file.keys()):
                return None
            values = file.get_tensor(name)
        held = dict(self.model.named_parameters()).get(name)
        return values if held is None else own_part(split_as(values, held))

    def settle_counts(self) -> None:
        """Take down what compiled graphs counted since, and do what is to be done.

        Raises:
            FaultError: there was a fault: a graph computes nothing again.
        """
        errors: list[FaultError] = []
        for site, found in self._taken_counts():
            found, training = found % graph.TRAINING, found // graph.TRAINING
            if not training and site.is_stale():  # the graph's sums were of the weight before
                site.refresh()
                continue
            found += training
            errors.append(self.log.found_by_graph(site.name, found, site.count, self.mend))
        if errors:  # one of them says it, all are in the log
            errors[0].came_right = _together([error.came_right for error in errors])
            raise errors[0]

    def _taken_counts(self) -> list[tuple[Site, int]]:
        """What compiled graphs counted since, where it is not 0; one copy from each device."""
        by_device: dict[torch.device, list[Site]] = defaultdict(list)
        for site in self.sites.values():
            by_device[site.count.device].append(site)
        found = []
        for sites in by_device.values():
            counts = torch.stack([site.count for site in sites]).tolist()
            found += [(site, count) for site, count in zip(sites, counts, strict=True) if count]
        for site, _ in found:
            site.count.zero_()
        return found

    def skips(self, optimizer: torch.optim.Optimizer) -> None:
        """Before a step: let it do nothing where a gradient was wrong, in any process."""
        skip = self.log.skip_next
        if not (skip or self.together):
            return
        own = {id(parameter) for parameter in self.model.parameters()}
        stepped = [p for group in optimizer.param_groups for p in group["params"] if id(p) in own]
        if not stepped or not (on_any_rank(skip, stepped[0].device) if self.together else skip):
            return
        for parameter in stepped:
            parameter.grad = None
        self.log.skip_next, self.log.skipped = False, self.log.skipped + 1


def _before_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for guard in graph.guards():
        guard.skips(optimizer)


register_optimizer_step_pre_hook(_before_step)


class _Settle:
    """After a call of the model: looks at what graphs counted."""

    def __init__(self, guard: Guard) -> None:
        self.guard = guard

    def __call__(self, model: nn.Module, args: Any, output: Any) -> None:
        guard = self.guard
        if torch.compiler.is_compiling():
            if not torch.compiler.is_exporting():
                counts = [site.count for site in guard.sites.values()]
                torch.ops.tensorize.settle_faults(counts, guard.key)
        elif guard.traced:
            guard.settle_counts()


def _together(calls: Sequence[Callable[[], None] | None]) -> Callable[[], None] | None:
    """One call for all; None where one of them is missing."""
    known = [call for call in calls if call is not None]

    def every() -> None:
        for call in known:
            call()

    return every if len(known) == len(calls) else None


def guard_of(model: nn.Module) -> Guard | None:
    """The guard of a model; None for any other."""
    found = model.__dict__.get(_GUARD)
    return found if isinstance(found, Guard) else None


def unguard(model: nn.Module) -> None:
    """Let a model be guarded no more, if it was."""
    found = guard_of(model)
    if found is not None:
        found.detach()


def _device(module: nn.Module) -> torch.device | None:
    return next((p.device for p in module.parameters()), None)


def _sites_of(path: str, module: nn.Module, guard: Guard) -> Sequence[Site]:
    """The checks of a module: its own, where it works in a way that only it knows."""
    own = getattr(module, "guard_sites", None)
    if own is not None:
        return own(path, module, guard)
    site = _site_of(path, module, guard)
    return () if site is None else (site,)


def _site_of(path: str, module: nn.Module, guard: Guard) -> Site | None:
    """The check of a module that is a product, or of cores that a module with others holds."""
    name = f"{path}.weight" if path else "weight"
    if not all(
        is_plain(parameter) for parameter in module._parameters.values() if parameter is not None
    ):
        return None  # sharded, or quantized by another library
    if isinstance(module, LowRankLinear):
        if module.nonlinearity is not None or not _is_whole(module):
            return None
        return ModuleSite(name, module.spec.format, module, guard, COLUMNS)
    if isinstance(module, FactoredLinear):
        holder: Any = module._modules["weight_cores"]
        return ModuleSite(name, holder.spec.format, module, guard, COLUMNS)
    if isinstance(module, Cores):
        return HolderSite(path.removesuffix("_cores"), module.spec.format, module, guard)
    own, held = type(module), module._parameters.get("weight")
    if not isinstance(held, Tensor):
        return None
    if own.forward is nn.Linear.forward:
        return ModuleSite(name, "dense", module, guard, COLUMNS)
    if is_plain_linear(module, "weight"):
        return ModuleSite(name, CONV1D, module, guard, COLUMNS)
    if own is nn.Embedding:
        return ModuleSite(name, "dense", module, guard, LOOKUP)
    return None


def _is_whole(module: LowRankLinear) -> bool:
    """Whether both factors are there, as plain tensors in plain layers."""
    layers = (module._modules["first"], module._modules["second"])
    weights = [layer._parameters.get("weight") for layer in layers if layer is not None]
    return all(isinstance(weight, Tensor) and is_plain(weight) for weight in weights)


def _backward(output: Any, seed: int) -> None:
    """Gradients of a random sum of what a model gives, which nobody keeps."""
    draw = torch.Generator().manual_seed(seed)
    found = [
        value
        for value in pytree.tree_leaves(output)
        if isinstance(value, Tensor) and value.requires_grad and value.is_floating_point()
    ]
    if not found:
        return
    noise = [
        torch.randn(value.shape, generator=draw).to(value) / math.sqrt(max(value.numel(), 1))
        for value in found
    ]
    torch.autograd.backward(found, noise)
