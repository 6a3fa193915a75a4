"""The rate-distortion curve of every weight: how much is lost at each rank of each format.

A metric on W (M, N) is ‖R^½ ΔW K^½‖² with R (M, M) and K (N, N): both the identity for
``frobenius``, one of them the inputs' second moment for ``input``, both for ``loss``. One
decomposition in it gives every rank at once (``decompositions.py``).

A tied weight has a sum of metrics, and no single SVD: its terms are averaged into one metric for
the factors, and the sum itself is evaluated at every rank.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tensorize.algebra.factors import best_factors, singular_squares
from tensorize.algebra.metric import Metric, average, root_times, times_root
from tensorize.algebra.svd import tail_sums
from tensorize.base.printer import seconds
from tensorize.base.tensors import at_work, doubled, give_back, squared
from tensorize.formats import registry
from tensorize.formats.format import TensorTrain
from tensorize.formats.low_rank import largest_that_pays
from tensorize.ir.sites import Site
from tensorize.ir.spec import Spec
from tensorize.passes.curves.curve import Spectrum, Store, Weights, as_matrix, weights_of
from tensorize.passes.curves.formats import UNASKED, FormatsOption, asked_formats
from tensorize.passes.curves.joint import with_shared_factors
from tensorize.passes.curves.metric import site_metrics
from tensorize.passes.curves.rounding import roundings
from tensorize.passes.curves.side_by_side import is_small, side_by_side
from tensorize.passes.stages import Found, Learned, Observed

# Rows of a table that are in float64 at a time.
_ROWS = 4096


@dataclass(frozen=True)
class ComputeSpectra:
    """Learns the curve of every free site, in the metric that is asked for.

    ``weights`` gives a dense weight by its name, where they are not the model's. Curves that the
    ``store`` has kept are not made again. What weights share is looked for once all have theirs.
    """

    formats: FormatsOption = None
    precisions: tuple[str, ...] = ()
    weights: Weights | None = None
    store: Store | None = None
    name: str = "spectra"

    def run(self, observed: Observed) -> Learned:
        spectra = self.kept(observed)
        todo = [site for site in observed.free if site.name not in spectra]
        begun = time.perf_counter()
        return self.learned(observed, self.curves(observed, todo, spectra), todo, begun)

    def kept(self, found: Found) -> dict[str, Spectrum]:
        """The curves that the store has kept of an earlier run."""
        if self.store is None:
            return {}
        curves = ((site.name, self.store.find(site)) for site in found.free)
        return {name: curve for name, curve in curves if curve is not None}

    def curves(
        self, observed: Observed, todo: Sequence[Site], known: Mapping[str, Spectrum]
    ) -> dict[str, Spectrum]:
        """Those known, and those of the sites ``todo``.

        The second moments are given up one site at a time, as their roots are made: only one of
        the two is ever held.
        """
        asked = asked_formats(observed.free, self.formats)
        weights = self.weights or weights_of(observed.model)

        def curve_of(site: Site) -> Spectrum:
            moments = observed.statistics.get(site.name)
            reached = moments is not None and bool(moments.terms)
            metrics = site_metrics(site, moments, observed.metric)
            if moments is not None:
                moments.terms.clear()
            weight = as_matrix(site, weights(site.name))
            curve = spectrum(site, weight, metrics, asked[site.name])
            work = at_work(weight)
            return replace(
                curve,
                roundings=roundings(work, metrics, self.precisions),
                squares=None if work.is_complex() else _squares(work),
                in_nats=reached and observed.metric == "loss",
                few=observed.few.get(site.name),
                unforeseen=observed.unforeseen.get(site.name),
            )

        spectra, whole = dict(known), len(observed.free)
        observed.progress("spectra", len(spectra), whole)
        for site, curve in zip(todo, side_by_side(curve_of, todo, is_small), strict=True):
            spectra[site.name] = curve if self.store is None else self.store.keep(curve)
            if (other := observed.statistics.get(site.name)) is not None:
                other.terms.clear()  # where another process made the curve
            give_back(site.parameters)
            observed.progress("spectra", len(spectra), whole)
        return spectra

    def learned(
        self, found: Found, spectra: Mapping[str, Spectrum], last: Sequence[Site], begun: float
    ) -> Learned:
        """Every curve, with what weights share.

        ``last`` are the sites whose curves came last, ``begun`` is when that was.
        """
        ordered = {site.name: spectra[site.name] for site in found.free}
        weights = self.weights or weights_of(found.model)
        ordered = with_shared_factors(ordered, weights, self.store, found.progress)
        trains = sum(bool(s.trains) for s in ordered.values())
        shared = sum(s.shared is not None for s in ordered.values())
        summary = (
            f"{len(ordered)} curves in the {found.metric} metric, {trains} with TT points, "
            f"{shared} that may share a first factor"
        )
        if before := len(ordered) - len(last):
            summary += f"; {before} were kept by an earlier run"
        if parameters := sum(site.parameters for site in last):
            summary += f"; {seconds((time.perf_counter() - begun) / parameters)} a parameter"
        few = {name: curve.few for name, curve in ordered.items() if curve.few is not None}
        unforeseen = {n: c.unforeseen for n, c in ordered.items() if c.unforeseen is not None}
        told = {"few": few, "unforeseen": unforeseen}
        return found.to(Learned, spectra=ordered, summary=summary, **told)


def spectrum(
    site: Site, weight: Tensor, metrics: tuple[Metric, ...], formats: tuple[str, ...] | None
) -> Spectrum:
    """The curve of one weight in its metric.

    Where nobody chose ``formats`` (None), those that the weight suggests are among them.
    """
    m, n = site.matrix
    pay = largest_that_pays(m, n)
    if len(metrics) == 1:
        values = singular_squares(at_work(weight), pay, metrics[0]).double()
        tails = tail_sums(values.reshape(-1, values.shape[-1]).sum(0)) * metrics[0].scale
    else:
        left, right = best_factors(weight, average(metrics), pay)
        tails = _summed_tails(weight.to(left.dtype), metrics, left, right, min(m, n))
    # What a plan reads is not on a GPU.
    curve = Spectrum(site, formats or UNASKED, metrics, tails.cpu())
    fitting = [form for form in registry.formats() if form.fits(site) and not form.spectral]
    if not fitting:
        return curve
    weight = at_work(weight)
    if formats is None:
        chosen = [form for form in fitting if not form.unasked and form.suggests(weight)]
        curve = replace(curve, formats=(*UNASKED, *(form.name for form in chosen)))
    else:
        chosen = [form for form in fitting if form.name in formats]
    found: list[TensorTrain[Spec]] = []
    points: list[tuple[Spec, float]] = []
    for form in chosen:
        for exact in form.exact(weight, asked=formats is not None):
            found.append(exact)
            for spec in form.ladder(exact.spec):
                cores = form.factors(spec, weight, metrics, exact)
                points.append((spec, form.error(spec, cores, weight, metrics)))
    return replace(curve, trains=tuple(found), train_points=tuple(points))


def _squares(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The means of the squares of rows (M,) and of columns (N,), over all matrices of a stack."""
    squares = weight.square()
    *lead, _, _ = range(squares.dim())
    return squares.mean((*lead, -1)).cpu(), squares.mean((*lead, -2)).cpu()


def _summed_tails(
    weight: Tensor, metrics: Sequence[Metric], left: Tensor, right: Tensor, largest: int
) -> Tensor:
    """What every rank loses in a sum of metrics.

    With W − U_r V_r = D + Σ_{i>r} u_i v_i over the stored components, and D what they leave, the
    loss is quadratic: the sums of the trailing blocks of one Gram matrix of components.
    """
    stored = left.shape[-1]
    total = torch.zeros(stored + 1, dtype=torch.float64, device=left.device)
    for metric in metrics:
        outer, inner = metric.left, metric.right
        v = times_root(doubled(right), inner)
        gram, cross, beyond = 0.0, 0.0, 0.0
        for rows in _parts_of_rows(weight, outer):
            root = outer if outer is None or outer.dim() > 1 else outer[rows]
            some = doubled(left[..., rows, :])
            rest = doubled(weight[..., rows, :]) - some @ doubled(right)
            u, rest = root_times(root, some), times_root(root_times(root, rest), inner)
            gram = gram + u.mH @ u
            cross = cross + ((u.mH @ rest) * v.conj()).sum(-1).real
            beyond += float(squared(rest).sum())
        # Experts, where there are several, are summed over: they are cut at one rank.
        blocks = (gram * (v @ v.mH).mT).real.reshape(-1, stored, stored).sum(0)
        trailing = blocks.flip(0, 1).cumsum(0).cumsum(1).diagonal().flip(0)
        cross = cross.reshape(-1, stored).sum(0)
        cross_tail = torch.cat([cross.flip(0).cumsum(0).flip(0), cross.new_zeros(1)])
        own = torch.cat([trailing, trailing.new_zeros(1)])
        total += metric.scale * (own + 2 * cross_tail + beyond)
    # Beyond the stored ranks no factorization pays; min(M, N) is exact.
    padding = total.new_full((largest - stored,), float(total[-1]))
    tails = torch.cat([total, padding])
    tails[-1] = 0.0
    return tails.clamp_min(0)


def _parts_of_rows(weight: Tensor, root: Tensor | None) -> Iterator[slice]:
    """All rows of a weight, or some of them at a time where the root does not mix them."""
    rows = weight.shape[-2]
    step = rows if root is not None and root.dim() > 1 else _ROWS
    for start in range(0, rows, step):
        yield slice(start, start + step)
