"""Curves of weights that are not trained yet: all that is known of them is their shapes.

At s of its P parameters a weight is taken to lose P (1 - s)². Every weight then loses equally much
by its next parameter where all keep the same share, so a budget of parameters gives every weight
the same share of its own, which is what low-rank pre-training does (CoLA, Liu et al. 2025; compute
better spent, Qiu et al. 2024); other limits weigh the shares against FLOPs, bytes and times. A
table that is looked up loses twice as much: its rows are used one by one, and cost no FLOPs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from tensorize.base.errors import AnalysisError
from tensorize.formats.format import Format, TensorTrain
from tensorize.formats.registry import format_of, formats, named
from tensorize.ir.sites import Site
from tensorize.ir.spec import LOW_RANK, Spec
from tensorize.passes.curves.curve import Spectrum
from tensorize.passes.curves.formats import FormatsOption, formats_by_site, joins
from tensorize.passes.observe.select import matches, require_match
from tensorize.passes.stages import Found, Learned

_LOOKUP = 2.0
_POINTS = 32

TrainingFormats = FormatsOption | Spec | Mapping[str, object]


@dataclass(frozen=True)
class Assumed(Spectrum):
    """The curve of a weight that has none.

    ``exact`` is the factorization that was asked for, if one was.
    """

    exact: Spec | None = None

    def distortion_of(self, spec: Spec) -> float:
        return _lost(self.site, spec.parameters)


@dataclass(frozen=True)
class AssumeSpectra:
    """Curves by shape alone.

    ``formats``: as in ``compile``, and a ``TTSpec`` for "this factorization"; by default low rank
    or dense. ``pivoted``: low rank loses what its parameters say where it stores no identity.
    """

    formats: TrainingFormats = None
    pivoted: bool = False
    name: str = "shapes"

    def run(self, found: Found) -> Learned:
        free = found.free
        allowed, exact = split_formats(free, self.formats)
        padded = {site.name for site in free if _is_padded(found.model, site)}
        spectra = {}
        for site in free:
            how = allowed[site.name], exact.get(site.name)
            apart = site.name in padded
            spectra[site.name] = _curve(site, *how, apart=apart, pivoted=self.pivoted)
        return found.to(Learned, spectra=spectra, summary=f"{len(spectra)} curves by shape")


def split_formats(
    sites: list[Site], option: TrainingFormats
) -> tuple[dict[str, tuple[str, ...]], dict[str, Spec]]:
    """The formats that each site may take, and the exact factorizations that were asked for.

    Raises:
        AnalysisError: a factorization has not the shape of its weight, or a format is unknown or
            needs trained weights.
    """
    option = {"*": option} if isinstance(option, Spec) else option
    exact: dict[str, Spec] = {}
    names: object = option
    if isinstance(option, Mapping):
        require_match(sites, list(option), "formats")
        for site in sites:
            chosen = next((f for pattern, f in option.items() if matches(site, pattern)), None)
            if isinstance(chosen, Spec):
                exact[site.name] = _fitting(site, chosen)
        names = {p: (f.format if isinstance(f, Spec) else f) for p, f in option.items()}
    allowed = formats_by_site(sites, names)  # type: ignore[arg-type]
    asked = names.values() if isinstance(names, Mapping) else (names,)
    several = (f for f in asked if isinstance(f, str | tuple | list))
    if any(joins((f,) if isinstance(f, str) else f) for f in several):
        raise AnalysisError(
            "a first factor in common is chosen by trained weights", way_out=f"formats={LOW_RANK!r}"
        )
    alone = {name: tuple(f for f in fs if not named(f).joins) for name, fs in allowed.items()}
    return alone, exact


def _fitting(site: Site, spec: Spec) -> Spec:
    expected = (site.experts, *site.matrix) if site.experts else site.matrix
    if spec.shape != expected:
        raise AnalysisError(
            f"{spec} stands for a weight of {spec.shape}, not {expected}",
            site=site.name,
            way_out="choose modes whose products are the weight's rows and columns",
        )
    if not format_of(spec).fits(site):
        raise AnalysisError(
            f"its uses ({', '.join(use.kind for use in site.uses)}) take low rank only",
            site=site.name,
            way_out=f"formats={LOW_RANK!r} for it",
        )
    return spec


def _lost(site: Site, parameters: int) -> float:
    weight = _LOOKUP if any(use.contract == "lookup" for use in site.uses) else 1.0
    return weight * site.parameters * max(0.0, 1 - parameters / site.parameters) ** 2


def _is_padded(model: nn.Module, site: Site) -> bool:
    """Whether a weight is a table with a row of padding, which is zero."""
    owner = model.get_submodule(site.name.rpartition(".")[0])
    return getattr(owner, "padding_idx", None) is not None


def _curve(
    site: Site, allowed: tuple[str, ...], exact: Spec | None, *, apart: bool, pivoted: bool
) -> Assumed:
    m, n = site.matrix
    count = max(site.experts, 1)
    ranks = [r * (m + n - pivoted * r) * count for r in range(min(m, n) + 1)]
    lost = torch.tensor([_lost(site, size) for size in ranks], dtype=torch.float64)
    lost[-1] = 0.0
    curve = Assumed(site, allowed, (), lost)
    if exact is not None:
        if apart and format_of(exact).rows_apart(exact) is None:
            raise AnalysisError(
                f"its padding_idx names a row of zeros, which would not stay so: in {exact} the "
                "rows share their entries",
                site=site.name,
                way_out='"low_rank", or a TTSpec whose row_modes are '
                f"{(m, *(1,) * (len(exact.ranks) or 1))}",
            )
        points = ((exact, _lost(site, exact.parameters)),)
        return replace(curve, formats=(exact.format,), train_points=points, exact=exact)
    chosen = [form for form in formats() if form.name in allowed and form.fits(site)]
    trains = tuple(TensorTrain(spec, ()) for form in chosen for spec in _widest(form, m, n, apart))
    every = [spec for train in trains for spec in ladder(train.spec)]
    sizes = (format_of(s).least(s) if pivoted else s.parameters for s in every)
    points = tuple((s, _lost(site, size)) for s, size in zip(every, sizes, strict=True))
    return replace(curve, trains=trains, train_points=points)


def _widest(form: Format[Any], m: int, n: int, apart: bool) -> list[Any]:
    return form.widest(m, n, apart=True) if apart else form.widest(m, n)


def ladder(spec: Spec) -> list[Spec]:
    """The same modes at ranks from 1 to where nothing is saved, about 15 % apart, and its own."""
    own = [spec] if spec.parameters < math.prod(spec.shape) else []
    several = {*format_of(spec).ladder(spec, _POINTS), *own}
    return sorted(several, key=lambda each: each.ranks)


def exact_ranks(spectra: Mapping[str, Spectrum]) -> dict[str, int | str]:
    """What ``ranks=`` says of the factorizations in low rank that were asked for."""
    assumed = ((name, curve) for name, curve in spectra.items() if isinstance(curve, Assumed))
    found = ((name, curve.exact) for name, curve in assumed)
    return {name: e.ranks[0] for name, e in found if e is not None and format_of(e).spectral}
