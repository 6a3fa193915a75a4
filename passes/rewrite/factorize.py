"""Put the planned cores in place of the dense weights."""

from __future__ import annotations

import contextlib
import copy
import itertools
import signal
import threading
from collections.abc import (
    Collection,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, replace
from types import FrameType

import torch
from torch import Tensor, nn

from tensorize.base.errors import AnalysisError, ModelError
from tensorize.formats.registry import format_of
from tensorize.ir.plan import RankPlan
from tensorize.ir.sites import Site
from tensorize.passes.curves.curve import Spectrum, as_matrix
from tensorize.passes.curves.side_by_side import is_small, side_by_side
from tensorize.passes.pipeline import Program
from tensorize.weight.install import first_factor, install, owner_of
from tensorize.weight.whole_model import settle

_SMALL = 4_000_000
Cores = tuple[Tensor, ...]


@dataclass(frozen=True)
class Factorize:
    """Program whose ``model`` (changed in place) holds cores, with the measured ``errors``.

    Each dense weight is released as soon as its cores exist. An interrupt takes effect between two
    weights, so the model can always run.
    """

    name: str = "factorize"

    def run(self, program: Program) -> Program:
        sites = {site.name: site for site in program.sites}
        errors: dict[str, float] = {}
        assert program.plan is not None
        chosen = [choice for choice in program.plan.sites if choice.spec is not None]
        for done, choice in enumerate(chosen):
            program.progress("factorize", done, len(chosen))
            # Refined cores are released as soon as the model has its copy.
            curve, cores = program.spectra[choice.name], program.cores.pop(choice.name, None)
            errors[choice.name] = replace_weight(
                program.model, sites[choice.name], choice, curve, cores
            )
        settle(program.model)
        program.progress("factorize", len(chosen), len(chosen))
        worst = max(errors.values(), default=0.0)
        summary = f"{len(chosen)} weights replaced, largest measured error {worst:.4f}"
        return replace(program, errors=errors, summary=summary)


def planned_cores(
    program: Program, sites: Sequence[RankPlan], known: Mapping[str, Cores] | None = None
) -> dict[str, Cores]:
    """The factors of every weight that a plan factorizes, as its curve gives them.

    ``known``: what ``best_components`` found for this plan among others.
    """
    parameters = dict(program.model.named_parameters())
    found: dict[str, Cores] = {}
    todo: list[RankPlan] = []
    for choice in sites:
        if choice.spec is None:
            continue
        if known is not None and choice.name in known and _is_cut(program, choice):
            left, right = known[choice.name]
            (rank,) = choice.spec.ranks
            found[choice.name] = left[..., :rank], right[..., :rank, :]
        else:
            todo.append(choice)

    def factors(choice: RankPlan) -> Cores:
        assert choice.spec is not None
        curve, dense = program.spectra[choice.name], parameters[choice.name].detach()
        matrix = as_matrix(curve.site, dense)
        return curve.factors(choice.spec, matrix, shared=choice.shared is not None)

    made = side_by_side(factors, todo, lambda choice: is_small(program.spectra[choice.name].site))
    return found | {choice.name: cores for choice, cores in zip(todo, made, strict=True)}


def best_components(program: Program, plans: Iterable[Sequence[RankPlan]]) -> dict[str, Cores]:
    """The factors at the largest rank that a weight has in any of several plans.

    Where those of smaller ranks are cut from them: one decomposition then serves all of the plans.
    """
    largest: dict[str, RankPlan] = {}
    for choice in itertools.chain.from_iterable(plans):
        if choice.spec is not None and _is_cut(program, choice):
            known = largest.get(choice.name)
            if known is None or known.ranks < choice.ranks:
                largest[choice.name] = choice
    return planned_cores(program, list(largest.values()))


def _is_cut(program: Program, choice: RankPlan) -> bool:
    """Whether its factors are the first components of those of larger ranks."""
    assert choice.spec is not None
    curve = program.spectra[choice.name]
    plain = choice.shared is None and len(curve.metrics) == 1
    return (
        plain
        and format_of(choice.spec).spectral
        and choice.spec.ranks[0] < len(curve.distortion) - 1
    )


def copy_sharing(model: nn.Module, names: Collection[str]) -> nn.Module:
    """A deep copy that shares the dense weights which are about to be replaced."""
    memo = {id(p): p for name, p in model.named_parameters() if name in names}
    try:
        return copy.deepcopy(model, memo)  # type: ignore[arg-type]
    except Exception as error:
        raise ModelError(
            f"the model cannot be copied: {type(error).__name__}: {error}",
            way_out="pass inplace=True",
        ) from error


def compressed_copy(
    program: Program, sites: Sequence[RankPlan], cores: Mapping[str, Cores]
) -> nn.Module:
    """The model with these cores in place of its weights."""
    model = copy_sharing(program.model, cores.keys())
    by_name = {site.name: site for site in program.sites}
    for choice in sites:
        if choice.spec is not None:
            curve = program.spectra[choice.name]
            replace_weight(model, by_name[choice.name], choice, curve, cores[choice.name])
    return model


def replace_weight(
    model: nn.Module, site: Site, choice: RankPlan, curve: Spectrum, cores: Cores | None = None
) -> float:
    """Swap one dense parameter for its cores; the relative error that they really have."""
    assert choice.spec is not None
    owner, leaf = owner_of(model, site.name)
    dense = owner._parameters.get(leaf)
    if dense is None or tuple(dense.shape) != site.shape:
        raise AnalysisError(
            "the model has no such weight any more",
            site=site.name,
            way_out="apply a plan to the model that it was made for",
        )
    weight = as_matrix(site, dense.detach())
    cores = cores or curve.factors(choice.spec, weight, shared=choice.shared is not None)
    held = [nn.Parameter(_own(core, weight), requires_grad=dense.requires_grad) for core in cores]
    if choice.shared not in (None, site.name):
        held[1] = first_factor(model, choice.shared)
    for core in held:
        if not torch.isfinite(core).all():
            raise AnalysisError(
                f"its cores do not fit into {site.dtype}: they overflow",
                site=site.name,
                way_out="exclude it, or convert the model to bfloat16 or float32 first",
            )
    # Rebuilt in float64 where that is small: at exact ranks the error is below float32's rounding.
    exact = torch.float64 if weight.numel() <= _SMALL else torch.float32
    cores = tuple(core.detach().to(exact) for core in held)
    rebuilt = format_of(choice.spec).reconstruct(choice.spec, cores)
    error = curve.measured_error(weight, rebuilt)
    with _uninterrupted():
        install(model, site.names, choice.spec, held)
    return error


def _own(core: Tensor, weight: Tensor) -> Tensor:
    """A contiguous copy in the weight's dtype and place: the analysis keeps its factors."""
    copy = torch.empty(core.shape, dtype=weight.dtype, device=weight.device)
    return copy.copy_(core)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hold back Ctrl-C until the block is done (on the main thread; elsewhere it never arrives)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[tuple[int, FrameType | None]] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: arrived.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if arrived and callable(before):
        before(*arrived[0])
