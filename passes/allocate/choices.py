"""Whether a plan's choices are ones for the weights of a model, before the first is changed."""

from __future__ import annotations

from torch import nn

from tensorize.base.errors import AnalysisError
from tensorize.base.tensors import parameter_of
from tensorize.formats.registry import format_of
from tensorize.ir.plan import Plan, RankPlan
from tensorize.passes.curves.curve import Spectrum
from tensorize.passes.stages import Analysed

_ANEW = "analyse this model: tensorize.analyze(model).plan(budget)"


def check_choices(plan: Plan, analysed: Analysed, model: nn.Module) -> None:
    """Raises AnalysisError, with the name of the weight, for a choice that it cannot have."""
    sites = {site.name: site for site in analysed.sites}
    named = {choice.name: choice for choice in plan.sites}
    for choice in plan.sites:
        site, curve = sites.get(choice.name), analysed.spectra.get(choice.name)
        if site is None or site.shape != choice.shape:
            _refuse(choice, "no such weight" if site is None else f"it is of {site.shape}")
        elif choice.spec is not None:
            what = "nothing can be chosen for it" if curve is None else _misfit(choice, curve)
            what = what or _partner(choice, named, analysed, model)
            if what is not None:
                _refuse(choice, what)


def _refuse(choice: RankPlan, what: str) -> None:
    raise AnalysisError(
        f"the plan has {choice.spec or choice.shape} for it, and in the model: {what}",
        site=choice.name,
        way_out=_ANEW,
    )


def _misfit(choice: RankPlan, curve: Spectrum) -> str | None:
    """What is wrong with a spec for a weight."""
    spec, site = choice.spec, curve.site
    assert spec is not None
    lead = (site.experts,) if site.experts else ()
    if spec.shape != (*lead, *site.matrix):
        return f"it is of {(*lead, *site.matrix)}"
    form = format_of(spec.plain)
    most = form.largest_ranks(spec.plain)
    if form.spectral:  # a first factor in common may have a larger rank than each weight alone
        common = curve.shared if choice.shared is not None else None
        most = (min(site.matrix) if common is None else len(common.distortion) - 1,)
    if any(rank > largest for rank, largest in zip(spec.ranks, most, strict=True)):
        return f"from ranks of {most} on it is exact"
    return None


def _pivoted(choice: RankPlan) -> bool:
    return choice.spec is not None and choice.spec.pivoted


def _partner(
    choice: RankPlan, named: dict[str, RankPlan], analysed: Analysed, model: nn.Module
) -> str | None:
    """What is wrong with the weight whose first factor it has."""
    if choice.shared is None:
        return None
    first = named.get(choice.shared)
    curves = [analysed.spectra.get(name) for name in (choice.shared, choice.name)]
    groups = {None if c is None or c.shared is None else c.site.input_group for c in curves}
    one = first is not None and first.shared == first.name and first.ranks == choice.ranks
    one = one and _pivoted(first) == _pivoted(choice)
    order = list(named)
    one = one and order.index(choice.shared) <= order.index(choice.name)
    spectral = choice.spec is not None and format_of(choice.spec).spectral
    if not (one and spectral) or None in groups or len(groups) > 1:
        return f"{choice.shared} has no first factor that it can share"
    trained = {parameter_of(model, name).requires_grad for name in (choice.shared, choice.name)}
    if len(trained) > 1:
        return f"it is to share a first factor with {choice.shared}, and one of them is frozen"
    return None
