"""What a compressed model runs by: Triton kernels, looked at, measured, and put to use."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from tensorize.base.progress import Progress
from tensorize.base.tensors import device_of
from tensorize.codegen.device import autotune, kernel, operations
from tensorize.codegen.device.triton_env import DTYPES, interpreting
from tensorize.codegen.triton.roles import NotCovered
from tensorize.ir.spec import TTSpec
from tensorize.ir.work import Epilogue, Work
from tensorize.reports.attach import attach, known_report, report
from tensorize.reports.data import RunsBy, SiteReport
from tensorize.weight import whole_model
from tensorize.weight.contractions import Contractions
from tensorize.weight.install import factored, owner_of
from tensorize.weight.lazy import FactoredWeight
from tensorize.weight.low_rank import LowRankLinear
from tensorize.weight.whole_model import other_kernels

log = logging.getLogger("tensorize")

Kernel = kernel.Kernel

_KINDS = frozenset({"linear", "addmm", "matmul", "einsum", "embedding"})
"""Uses of a weight that a kernel may compute."""


def use_kernels(model: nn.Module, backend: str) -> nn.Module:
    """Let a compressed model run by what ``backend`` asks for; its report says which weights do by
    kernels."""
    measured, device = backend == "auto", device_of(model)
    found = known_report(model)
    assert found is not None
    sites = tuple(replace(site, runs_by=()) for site in found.sites)  # what was saved is of there
    some = backend == "triton" or (measured and autotune.known(device))
    # An operation of its own costs a weight that the library wins more than it could gain.
    won = autotune.winners(device) if some and measured else None

    def build(spec: TTSpec) -> Contractions:
        used = some and (won is None or spec in won)
        return operations.contractions(spec, measured=measured) if used else {}

    if backend == "inductor":
        model.compile(backend="tensorize", options={"inner": "inductor"})
    count = whole_model.use_kernels(model, build)
    if some:
        log.info("%d weights run by kernels", count)
        factors = dict(factored(model))
        owners = [owner_of(model, site.name) for site in sites]
        answers = (
            _runs_by(*owner, site, factors, device, measured)
            for owner, site in zip(owners, sites, strict=True)
        )
        sites = tuple(replace(s, runs_by=a) for s, a in zip(sites, answers, strict=True))
    attach(model, replace(found, backend=backend, sites=sites))
    return model


def _runs_by(
    owner: nn.Module,
    leaf: str,
    site: SiteReport,
    factors: Mapping[str, FactoredWeight],
    device: str,
    measured: bool,
) -> tuple[RunsBy, ...]:
    """What a weight runs by, for every range of rows that one choice holds for."""
    held = next((factors[n] for n in (site.name, *site.aliases) if n in factors), None)
    if held is None:
        return ()

    def library(why: str) -> tuple[RunsBy, ...]:
        return (RunsBy(1, None, "library", why=why),)

    if held.dtype not in DTYPES:
        return library(f"kernels know no {held.dtype}")
    why = operations.why_not(held.spec)
    if why is not None:
        return library(why)
    if isinstance(owner, LowRankLinear) and owner.input_product is not None:
        return library("one product with a first factor, in compiled graphs one launch, serves all")
    if not _has_kernels_for(site.kind):
        return library(f"kernels compute no {site.kind}")
    here = device != "cpu" or interpreting()
    why = "as asked" if here else "as asked; they do not run on a CPU: move the model to a GPU"
    if held.spec.precision is not None:
        if measured:
            return library('kernels of codes are not timed: backend="triton" runs by them')
        return (RunsBy(1, None, "kernels", why=why),)
    work = Work((held.spec,), epilogue=Epilogue(bias=_has_bias(owner, leaf)))
    if measured:
        return _measured(work, held.dtype, device)
    return _covered(work, held.dtype, device, why)


def _has_kernels_for(kind: str) -> bool:
    """Whether one of a weight's uses may be a kernel; others have torch operations only."""
    return not _KINDS.isdisjoint(kind.split("+"))


def _has_bias(owner: nn.Module, leaf: str) -> bool:
    return leaf == "weight" and isinstance(getattr(owner, "bias", None), torch.Tensor)


def _covered(work: Work, dtype: torch.dtype, device: str, why: str) -> tuple[RunsBy, ...]:
    """Kernels for every number of rows that a family covers."""

    def answer(most: int) -> RunsBy:
        if autotune.runs(work, dtype, most, device, measured=False):
            return RunsBy(1, most, "kernels", why=why)
        return RunsBy(1, most, "library", why="no kernel for so many rows and ranks")

    return _by_rows(answer)


def _measured(work: Work, dtype: torch.dtype, device: str) -> tuple[RunsBy, ...]:
    """The winner for every range of rows; ranges that were not measured are one."""

    def answer(most: int) -> RunsBy:
        choice = autotune.recorded(work, dtype, most, device)
        if choice is None:
            return RunsBy(1, most, "library", why="not measured")
        return RunsBy(1, most, choice.family if choice.wins else "library", choice.ratio)

    return _by_rows(answer)


def _by_rows(answer: Callable[[int], RunsBy]) -> tuple[RunsBy, ...]:
    """What is answered for every bucket of rows; of those that say the same unmeasured one."""
    found: list[RunsBy] = []
    first = 1
    for most in autotune.BUCKETS:
        last = None if most == autotune.BUCKETS[-1] else most
        now = replace(answer(most), first=first, last=last)
        if found and now.ratio is None and replace(found[-1], first=first, last=last) == now:
            now = replace(now, first=found.pop().first)
        found.append(now)
        first = most + 1
    return tuple(found)


def launches() -> operations.Launches:
    """What graphs of models that run by kernels are fused by."""
    return operations.Launches()


def _weights(model: nn.Module) -> Iterator[tuple[str, SiteReport, FactoredWeight]]:
    """The weights whose uses and dtype kernels know: each once, by the name that it is found by."""
    factors = dict(factored(model))
    for site in report(model).sites:
        name = next((n for n in (site.name, *site.aliases) if n in factors), None)
        if name is None or not _has_kernels_for(site.kind):
            continue
        if factors[name].dtype in DTYPES:
            yield name, site, factors[name]


def factors_with_kernels(model: nn.Module) -> Iterator[tuple[str, SiteReport, FactoredWeight]]:
    """Those of them whose products a ``Work`` says: of numbers."""
    for name, site, held in _weights(model):
        if held.format.kernels and not held.spec.batch:
            yield name, site, held


def kernels_of_weights(model: nn.Module) -> dict[str, Kernel]:
    """Those of single weights, by weight and purpose."""
    device = device_of(model)
    found: dict[str, Kernel] = {}
    for name, site, factors in factors_with_kernels(model):
        given = {"bias": _has_bias(*owner_of(model, name)), "lookup": "embedding" in site.kind}
        made = kernel.of_weight(factors.spec, factors.dtype, device, **given)
        found |= kernel.named(name, made)
    for name, _, factors in _weights(model):
        if factors.spec.precision is not None and operations.why_not(factors.spec) is None:
            bias = _has_bias(*owner_of(model, name))
            found |= kernel.named(name, kernel.of_codes(factors.spec, factors.dtype, bias=bias))
    return found


class OfferedWorks(operations.Launches):
    """Launches that are noted, and never used."""

    def __init__(self) -> None:
        self.works: dict[tuple[Work, torch.dtype], None] = {}

    def uses(self, work: Work, x: torch.Tensor, measured: bool) -> bool:
        if super().uses(work, x, measured=False):
            self.works[work, x.dtype] = None
        return False


def works_of(model: nn.Module) -> dict[tuple[Work, torch.dtype], None]:
    """What the weights of a model compute by themselves, where kernels cover it."""
    return {
        (
            Work((factors.spec,), epilogue=Epilogue(bias=_has_bias(*owner_of(model, name)))),
            factors.dtype,
        ): None
        for name, _, factors in factors_with_kernels(model)
        if operations.contractions(factors.spec)
    }


def tune(
    works: Iterable[tuple[Work, torch.dtype]], rows: Sequence[int], device: str, tell: Progress
) -> int:
    """Time every work for these numbers of rows and keep the choices; how many kernels won.

    Raises:
        ValueError: the device is no GPU.
    """
    pairs = [(*work, count) for work in works for count in rows]
    won = 0
    for done, (work, dtype, count) in enumerate(pairs):
        tell("timing kernels", done, len(pairs))
        with contextlib.suppress(NotCovered):
            won += autotune.tune(work, dtype, count, device).wins
    tell("timing kernels", len(pairs), len(pairs))
    return won


def every_kernel(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """In it every weight that kernels cover is one operation, that runs by what was measured."""
    return other_kernels(model, partial(operations.contractions, measured=True))
