"""Run the model with factors in it before any are made: I · W in place of W changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tensorize.base.errors import ModelError, TensorizeError
from tensorize.base.tensors import parameter_of
from tensorize.capture.kept import keeping
from tensorize.ir.sites import Batch, Site
from tensorize.ir.spec import TTSpec
from tensorize.passes.beside import behaviour
from tensorize.passes.beside.behaviour import Calls
from tensorize.passes.beside.dense_reads import DenseReads, memory_of
from tensorize.passes.beside.rebuilt import rebuilt
from tensorize.passes.curves.curve import as_matrix
from tensorize.passes.rewrite.copies import copy_sharing
from tensorize.passes.stages import Found
from tensorize.weight.install import followed, install, owner_of


@dataclass(frozen=True)
class Rehearse:
    """Lets weights stay dense that the model's forward cannot have in factors.

    Each weight is replaced by itself times an identity, in a copy that shares the weights. Where
    the copy fails, or gives something else than the model, the forward's meaning depends on what
    the layer is, or it finds the weight by its name; the weights to blame are found by halves.
    """

    name: str = "rehearse"

    def run(self, found: Found) -> Found:
        free = {site.name: site for site in found.free}
        on_meta = any(p.is_meta for p in found.model.parameters())
        if found.inputs is None or on_meta or not free:
            return replace(found, summary="not run: no inputs are known" if free else "nothing")
        with keeping(found.model):  # the copies share its parameters
            return self._rehearsed(found, found.inputs, free)

    def _rehearsed(self, found: Found, batch: Batch, free: dict[str, Site]) -> Found:
        try:
            rehearsal = _Rehearsal(found.model, batch, free)
        except ModelError as error:  # it cannot be copied, and may be rewritten itself
            return replace(found, summary=f"not run: {error.cause}")
        names = list(free)
        if not rehearsal.goes_wrong(names):
            return replace(found, summary=f"{len(names)} weights can be replaced")
        to_blame = behaviour.to_blame(names, rehearsal.goes_wrong)
        blamed = {name: rehearsal.why(name) for name in to_blame}
        sites = tuple(replace(s, blocked=blamed.get(s.name, s.blocked)) for s in found.sites)
        summary = f"{len(blamed)} weights stay dense: the model's forward needs their layers"
        return replace(found, sites=sites, summary=summary)


class _Rehearsal:
    def __init__(self, model: nn.Module, batch: Batch, sites: dict[str, Site]) -> None:
        self.model, self.batch, self.sites = model, batch, sites
        self.unit = behaviour.unit_of(model)
        self.paths = [path for path, _ in model.named_modules()]
        self.identities: dict[tuple, Tensor] = {}
        self.reasons: dict[str, str] = {}
        self.dense = self._calls(self._copy())

    def _copy(self) -> nn.Module:
        return copy_sharing(self.model, dict(self.model.named_parameters()), to_run=True)

    def _calls(self, model: nn.Module) -> Calls:
        return behaviour.calls_of(model, self.batch, self.paths)

    def goes_wrong(self, names: Sequence[str]) -> bool:
        """Whether the model does something else with these weights in factors."""
        model = self._copy()
        memory = memory_of({name: parameter_of(model, name) for name in names})
        with followed(model):
            for name in names:
                self._install(model, self.sites[name])
        reads = DenseReads(model, memory)
        try:
            found = behaviour.calls_of(model, self.batch, self.paths, reads)
        except TensorizeError as error:
            self.reasons |= dict.fromkeys(names, f"fails: {behaviour.words_of(error)}")
            return True
        for name, func in reads.seen.items():
            self.reasons[name] = f"still reads it, by {func} of what something holds"
        wrong = behaviour.differs(found, self.dense, self.unit, self._blurred)
        return wrong or bool(reads.seen)

    def _blurred(self) -> Calls:
        """The calls of the dense model, with every weight rounded at random."""
        model = self._copy()
        for site in self.sites.values():
            weight = parameter_of(model, site.name)
            noisy = rebuilt(weight, weight.detach, noise=self.unit)
            for name in site.names:
                owner, leaf = owner_of(model, name)
                owner._parameters[leaf] = noisy
        return self._calls(model)

    def _install(self, model: nn.Module, site: Site) -> None:
        weight = as_matrix(site, parameter_of(model, site.name).detach())
        m, n = weight.shape[-2:]
        spec = TTSpec.low_rank(m, n, min(m, n), experts=site.experts)
        key = min(m, n), site.experts, weight.dtype, weight.device
        if key not in self.identities:
            identity = torch.eye(min(m, n), dtype=weight.dtype, device=weight.device)
            self.identities[key] = identity.expand(*weight.shape[:-2], *identity.shape)
        identity = self.identities[key]
        cores = (weight, identity) if n <= m else (identity, weight)
        held = [nn.Parameter(core, requires_grad=False) for core in cores]
        install(model, site.names, spec, held)

    def why(self, name: str) -> str:
        """The reason for the report."""
        other = "gives something else: its forward asks for the layer's class, or its names"
        return f"in factors the model {self.reasons.get(name, other)}"
