"""The points of every weight: what each format and rank costs, and what it loses."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tensorize.formats.dense import is_dense
from tensorize.formats.registry import named
from tensorize.ir.machine import GENERIC, Machine
from tensorize.ir.plan import RankPlan, Totals
from tensorize.ir.sites import Site
from tensorize.ir.spec import Spec, TTSpec
from tensorize.passes.allocate.communication import dense_sent, spec_sent, whole_sent
from tensorize.passes.allocate.flops import dense_flops, spec_flops
from tensorize.passes.allocate.forms import (
    PRECISION,
    Forms,
    in_file,
    labelled,
    labels,
    rounding_lost,
    spec_of,
    takes_pivots,
    without_identities,
    worth_of,
)
from tensorize.passes.allocate.inputs import Inputs, inputs_lost
from tensorize.passes.allocate.times import dense_times, spec_times
from tensorize.passes.curves.curve import Spectrum
from tensorize.passes.curves.filed import SAID, STREAMS, Filed
from tensorize.passes.stages import Analysed

COSTS = ("params", "bytes", "flops", "communication", "file")
"""The first columns of a point's costs; then come its times, one for each of the batch sizes.

``file`` is the bytes in a file whose entries lose some θ; without one, those in memory."""

BYTES, FILE = COSTS.index("bytes"), COSTS.index("file")

# Without a loss, errors of different weights have no common unit. Distortion is divided by the
# weight's own size to this power: 0 compares absolute errors, 1 relative ones. Both fail badly on
# some trained model, and so does the same share for all; this fails on none of the three tried
# (`python -m benchmarks.no_data`).
_RELATIVE = 0.15

_USUAL = Inputs()


@dataclass(frozen=True)
class Points:
    """The points of one weight, by growing parameters.

    ``costs`` is (P, costs), ``distortion`` what a point adds to the predicted loss, ``objective``
    what the allocation minimises, ``errors`` the weight's relative error. ``labels`` says what a
    point is: 0 dense, above 0 low rank in one of its ``forms``, -k the k-th of ``others``.
    ``coded``: what of the distortion is that of codes in a file; None: nothing is.
    """

    site: Site
    costs: np.ndarray
    distortion: np.ndarray
    objective: np.ndarray
    errors: np.ndarray
    labels: np.ndarray
    others: tuple[Spec, ...] = ()
    fixed: str | None = None
    coded: np.ndarray | None = None

    def spec(self, k: int) -> Spec | None:
        """The factorization at point k; None is the dense weight."""
        label = int(self.labels[k])
        if label > 0:
            return spec_of(self.site, *labelled(label))
        return None if label == 0 else self.others[-label - 1]

    def coded_at(self, k: int) -> float:
        """What of the distortion at point k is that of codes in a file."""
        return 0.0 if self.coded is None else float(self.coded[k])

    @property
    def in_bits(self) -> np.ndarray:
        """Which points have entries of fewer bits than the weight's own."""
        return self.labels >= PRECISION

    @property
    def sites(self) -> tuple[Site, ...]:
        """The weights that a point is of."""
        return (self.site,)

    def plans(self, k: int) -> tuple[RankPlan, ...]:
        """What point k does with every weight that it is of."""
        reason = "rank chosen by the budget"
        if self.fixed is not None:
            reason = self.fixed
        elif self.spec(k) is None:
            reason = "dense: its parameters are worth more here than in other weights"
        elif self.site.last_resort is not None:
            reason = (
                f"rebuilt from its factors at every call, as {self.site.last_resort}: "
                "the budget cannot be met otherwise"
            )
        plan = RankPlan(
            name=self.site.name,
            kind=self.site.kind,
            shape=self.site.shape,
            spec=self.spec(k),
            predicted_error=float(self.errors[k]),
            predicted_loss=float(self.distortion[k]) - self.coded_at(k),
            reason=reason,
            reals=self.site.reals,
        )
        return (plan,)

    def only(self, keep: np.ndarray) -> Points:
        """The same weight with fewer points."""
        return replace(
            self,
            costs=self.costs[keep],
            distortion=self.distortion[keep],
            objective=self.objective[keep],
            errors=self.errors[keep],
            labels=self.labels[keep],
            coded=None if self.coded is None else self.coded[keep],
        )


def dense_totals(analysed: Analysed, batch_sizes: Sequence[int] = ()) -> Totals:
    """Parameters and bytes of the whole dense model, each once; FLOPs and times of its matmuls."""
    times = [dense_times(site, batch_sizes, analysed.machine) for site in analysed.sites]
    return Totals(
        latency=tuple(np.sum(times, axis=0).tolist()) if times else (0.0,) * len(batch_sizes),
        parameters=sum(elements for elements, _ in analysed.sizes.values()),
        bytes=sum(size for _, size in analysed.sizes.values()),
        flops=sum(dense_flops(site) for site in analysed.sites),
        communication=whole_sent(analysed.sites),
    )


def other_costs(analysed: Analysed, batch_sizes: Sequence[int] = ()) -> np.ndarray:
    """Parameters and bytes of everything that is no site: biases, norms, scales."""
    listed = {site.name for site in analysed.sites}
    rest = [size for name, size in analysed.sizes.items() if name not in listed]
    sizes = sum(n for n, _ in rest), sum(b for _, b in rest)
    known = [*sizes, 0.0, 0.0, sizes[1] + SAID * len(rest) + STREAMS]
    return np.array(known + [0.0] * len(batch_sizes))


def _costs(
    site: Site, spec: Spec, itemsize: int, batch_sizes: Sequence[int], machine: Machine
) -> list[float]:
    size = spec.bytes(itemsize, len(site.names))
    return [
        spec.parameters * site.reals,
        size,
        spec_flops(site, spec, batch_sizes, machine),
        spec_sent(site, spec),
        size,
        *spec_times(site, spec, batch_sizes, machine),
    ]


def _dense_costs(
    site: Site, itemsize: int, batch_sizes: Sequence[int], machine: Machine
) -> list[float]:
    times = dense_times(site, batch_sizes, machine)
    sizes = [site.parameters * site.reals, site.parameters * itemsize, dense_flops(site)]
    return [*sizes, dense_sent(site), sizes[1], *times]


def dense_point(
    site: Site,
    itemsize: int,
    reason: str,
    batch_sizes: Sequence[int] = (),
    machine: Machine = GENERIC,
) -> Points:
    zero = np.zeros(1)
    costs = np.array([_dense_costs(site, itemsize, batch_sizes, machine)], dtype=float)
    return Points(site, costs, zero, zero, zero, np.zeros(1, int), fixed=reason)


def scales(analysed: Analysed) -> dict[str, float]:
    """What turns each curve's distortion into the unit in which weights are compared.

    That is the loss, where there is one. A weight that the calibration data did not reach is then
    taken to be worth as much of it as a typical one of its size.
    """
    whole = {name: float(curve.distortion[0]) for name, curve in analysed.spectra.items()}
    known = [
        whole[name] / curve.site.parameters
        for name, curve in analysed.spectra.items()
        if curve.in_nats and whole[name] > 0
    ]
    found = {}
    for name, curve in analysed.spectra.items():
        if curve.in_nats or whole[name] <= 0:
            found[name] = 1.0
        elif known:
            found[name] = float(np.median(known)) * curve.site.parameters / whole[name]
        else:
            found[name] = whole[name] ** -_RELATIVE
    return found


def curve_points(
    curve: Spectrum,
    allowed: Sequence[str],
    itemsize: int,
    batch_sizes: Sequence[int],
    rank_multiple: int = 1,
    machine: Machine = GENERIC,
    scale: float = 1.0,
    *,
    pivots: bool = False,
    always: bool = False,
    own: bool = True,
    precisions: Sequence[str] = (),
    inputs: Inputs = _USUAL,
    worth: Mapping[str, float] | None = None,
    filed: Filed | None = None,
) -> Points:
    """All points of a weight; low ranks above ``rank_multiple`` only at its multiples.

    ``scale`` turns its distortion into what the allocation minimises; ``pivots``: low rank need not
    store what a change of basis can remove, and ``always``: where it need not it does not.
    ``own``: entries may keep the weight's own dtype; ``precisions``: those that they may have;
    ``inputs``: what inputs may be rounded to; ``worth``: by what the distortion of a family of
    forms counts; ``filed``: the file that the weight will be in.
    """
    site = curve.site
    spectral = any(named(name).spectral for name in allowed)
    ranks = np.arange(1, len(curve.distortion)) if spectral else np.arange(0)
    ranks = ranks[(ranks % rank_multiple == 0) | (ranks < rank_multiple)]
    load = itemsize, batch_sizes, machine
    structured = list(_structured(curve, allowed, *load, pivots, always)) if own else []
    others = tuple(spec for spec, _ in structured)
    rows, lost, kinds = [], [], []
    forms = Forms((site,), itemsize, batch_sizes, machine)
    worthwhile = forms.worthwhile(ranks, pivots=pivots, always=always) if own else {}
    for pivoted, those in worthwhile.items():
        rows.append(forms.costs(those, pivoted))
        lost.append(curve.distortion.numpy()[those] + rounding_lost(curve, pivoted))
        kinds.append(labels(those, pivoted))
    if others:
        rows.append(np.array([_costs(site, spec, *load) for spec in others]))
        lost.append(np.array([loss for _, loss in structured]))
        kinds.append(-1 - np.arange(len(others)))
    dense = any(map(is_dense, allowed))
    for rounding in (each for each in curve.roundings if each.precision in precisions):
        name, none = rounding.precision, np.zeros(1, int)
        for pivoted, every in forms.in_bits(ranks, pivots=pivots).items():
            for kind, those in inputs.of(forms, curve, every, pivoted, rounding):
                rows.append(forms.costs(those, pivoted, name, kind))
                added = inputs_lost(curve, those, name, kind, machine)
                added = added + rounding.low_rank.numpy()[those]
                lost.append(curve.distortion.numpy()[those] + added)
                kinds.append(labels(those, pivoted, name, kind))
        for kind, those in inputs.of(forms, curve, none, False, rounding) if dense else ():
            spec = spec_of(site, 0, False, name, kind)
            rows.append(np.array([_costs(site, spec, itemsize, batch_sizes, machine)]))
            lost.append(rounding.dense + inputs_lost(curve, those, name, kind, machine))
            kinds.append(labels(those, False, name, kind))
    reason = None
    if not any(map(len, rows)):
        reason = f"no rank of {', '.join(f for f in allowed if not is_dense(f))} saves parameters"
    if (dense and own) or reason:
        rows.append(np.array([_dense_costs(site, itemsize, batch_sizes, machine)]))
        lost.append(np.zeros(1))
        kinds.append(np.zeros(1, int))
    costs, distortion = np.concatenate(rows).astype(float), np.concatenate(lost)
    order = np.lexsort((distortion, costs[:, 0]))
    costs, distortion, found = costs[order], distortion[order], np.concatenate(kinds)[order]
    rises = curve.rise(distortion) * worth_of(found, worth or {})
    coded = None
    if filed is not None:
        tails = [curve.distortion.numpy()]
        costs[:, FILE], coded = in_file(filed, (curve,), tails, found, costs[:, BYTES])
        rises = rises + coded
    return Points(
        site,
        costs,
        rises * curve.in_nats,
        rises * scale,
        curve.errors(distortion),
        found,
        others,
        fixed=reason,
        coded=None if coded is None else coded * curve.in_nats,
    )


def _structured(
    curve: Spectrum,
    allowed: Sequence[str],
    itemsize: int,
    batch_sizes: Sequence[int],
    machine: Machine,
    pivots: bool,
    always: bool,
) -> Iterator[tuple[Spec, float]]:
    """The points of other formats, and what they lose: each in the forms that pay, which are as
    those of low rank."""
    site = curve.site
    load = batch_sizes, machine
    for spec, lost in curve.train_points:
        if spec.format not in allowed:
            continue
        bare = without_identities(site, spec, itemsize) if pivots else None
        saves = spec.parameters < math.prod(spec.shape)
        if saves and not (always and bare):
            yield spec, lost
        if bare is None or bare.parameters >= math.prod(spec.shape):
            continue
        dense = dense_times(site, *load)
        slow = (spec_times(site, bare, *load) > dense).any()
        if always or not (slow and saves and (spec_times(site, spec, *load) <= dense).all()):
            yield bare, lost + rounding_lost(curve, 1)


def takes_ranks(curve: Spectrum, allowed: Sequence[str]) -> bool:
    """Whether a weight can be factorized in one of the formats that are allowed."""
    spectral = any(named(name).spectral for name in allowed)
    return spectral or any(train.spec.format in allowed for train in curve.trains)


def forced_point(
    curve: Spectrum,
    rank: int | str,
    itemsize: int,
    batch_sizes: Sequence[int],
    allowed: Sequence[str],
    machine: Machine = GENERIC,
    *,
    pivots: bool = False,
    filed: Filed | None = None,
) -> Points:
    """The one point that ``ranks=`` asks for, of a weight that ``takes_ranks``."""
    site = curve.site
    m, n = site.matrix
    spec: Spec
    if any(named(name).spectral for name in allowed):
        size = min(m, n) if rank == "full" else min(int(rank), m, n)
        taken = pivots and bool(takes_pivots(site, np.array(size)))
        pivoted = Forms((site,), itemsize, batch_sizes, machine).neighbours if taken else 0
        spec = TTSpec.low_rank(m, n, size, experts=site.experts, pivoted=pivoted)
        asked = (each for each, _ in curve.train_points if each.ranks == spec.ranks)
        spec = next((each for each in asked if named(each.format).spectral), spec)
    else:
        exact = next(t.spec for t in curve.trains if t.spec.format in allowed)
        cut = exact.ranks if rank == "full" else [min(int(rank), r) for r in exact.ranks]
        spec = exact.with_ranks(cut)
        spec = (without_identities(site, spec, itemsize) if pivots else None) or spec
    lost = curve.distortion_of(spec)
    rise, coded = curve.rise(np.array([lost])), None
    costs = np.array([_costs(site, spec, itemsize, batch_sizes, machine)], dtype=float)
    if filed is not None and named(spec.format).spectral:
        label, tails = labels(np.array(spec.ranks[:1]), spec.pivoted), [curve.distortion.numpy()]
        costs[:, FILE], coded = in_file(filed, (curve,), tails, label, costs[:, BYTES])
        rise, coded = rise + coded, coded * curve.in_nats
    # What the data say nothing of adds nothing: in units of its own it would hide all the others.
    rise = rise * curve.in_nats
    return Points(
        site,
        costs,
        rise,
        rise,
        np.array([curve.error(lost)]),
        np.array([-1]),
        (spec,),
        fixed=f"ranks={rank!r}",
        coded=coded,
    )
