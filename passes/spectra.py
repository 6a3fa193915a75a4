"""The rate-distortion curve of every weight: how much is lost at each rank of each format.

A metric on W (M, N) is ‖R^½ ΔW K^½‖² with R (M, M) and K (N, N): both the identity for
``frobenius``, one of them the inputs' second moment for ``input``, both for ``loss``. With
R = L_R L_Rᵀ and K = L_K L_Kᵀ the best rank-r approximation in the metric is the truncated SVD of
the whitened weight L_Rᵀ W L_K, mapped back (Eckart-Young). One eigendecomposition of its smaller
Gram matrix gives every rank at once.

A tied weight has a sum of metrics, and no single SVD: its terms are averaged into one metric for
the factors, and the sum itself is evaluated at every rank.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from tensorize import tt
from tensorize.errors import AnalysisError
from tensorize.ir import BLOCK, DENSE, FORMATS, LOW_RANK, SHARED, TT, Site, TTSpec
from tensorize.passes.als import error_of, improved
from tensorize.passes.metric import (
    Metric,
    average,
    root_times,
    site_metrics,
    solve_root,
    times_root,
)
from tensorize.passes.pipeline import Program
from tensorize.passes.side_by_side import side_by_side
from tensorize.passes.sites import matches, require_match
from tensorize.passes.trains import (
    TensorTrain,
    blocks_of,
    has_kronecker_structure,
    points_of,
    trains_of,
)
from tensorize.progress import Progress, no_progress
from tensorize.tensors import at_work

_LinAlgError = torch.linalg.LinAlgError  # pyright: ignore[reportPrivateImportUsage]

# Weights up to this size are analysed side by side, each on one thread.
_SMALL_SIDE, _SMALL = 1024, 4_000_000
# A tied weight with more entries keeps the factors of its averaged metric.
_LARGEST_ALS = 4_000_000
FormatsOption = str | Sequence[str] | Mapping[str, str | Sequence[str]] | None


@dataclass(frozen=True)
class SharedFactor:
    """A first factor V (K, N) that weights W_k of one input have in common: W_k ≈ (W_k P) V.

    ``reader`` is P (N, K). At rank r the first r components count; ``distortion[r]`` is what the
    weight that holds this then loses. The members of a group hold the same tensors.
    """

    factor: Tensor
    reader: Tensor
    distortion: Tensor


@dataclass(frozen=True)
class Spectrum:
    """The curve of one weight.

    ``distortion[r]`` is what the best factors of rank r (r = 0 … min(M, N)) lose in the units of
    the metric; ``distortion[0]`` is the whole weight. The factors themselves are made for the one
    rank that is wanted: all of them would take as much memory as the weight. ``trains`` are the
    splits tried for TT and blocks, ``train_points`` what their roundings lose. ``in_nats`` is False
    for a weight that the calibration data say nothing about. ``shared`` is the curve with a first
    factor in common with other weights. ``measured`` are pairs of a distortion and the rise of the
    loss that it was found to cost, of a weight measured by itself.
    """

    site: Site
    formats: tuple[str, ...]
    metrics: tuple[Metric, ...]
    distortion: Tensor
    trains: tuple[TensorTrain, ...] = ()
    train_points: tuple[tuple[TTSpec, float], ...] = ()
    in_nats: bool = True
    shared: SharedFactor | None = None
    measured: tuple[tuple[float, float], ...] = ()

    def rise(self, distortion: np.ndarray) -> np.ndarray:
        """What distortions add to the loss: as much, or as was measured for this weight.

        Between two measured ones on logarithmic scales, beyond them in proportion.
        """
        known = [(lost, found) for lost, found in self.measured if lost > 0 and found > 0]
        if not known:
            return distortion
        losses, found = np.log(np.array(known).T)
        found = np.maximum.accumulate(found)
        logs = np.log(np.maximum(distortion, 1e-300))
        nearest = np.clip(logs, losses[0], losses[-1])
        rises = np.exp(np.interp(nearest, losses, found) + logs - nearest)
        return np.where(distortion > 0, rises, 0.0)

    def error(self, distortion: float) -> float:
        """The relative error of the weight in its metric: sqrt(distortion / whole)."""
        whole = float(self.distortion[0])
        return (max(distortion, 0.0) / whole) ** 0.5 if whole > 0 else 0.0

    def distortion_of(self, spec: TTSpec) -> float:
        """What a spec of this weight loses; exact ranks lose nothing."""
        if spec.format == LOW_RANK:
            return float(self.distortion[min(spec.ranks[0], len(self.distortion) - 1)])
        for known, lost in self.train_points:
            if known == spec:
                return lost
        train = self._train(spec)
        weight = tt.reconstruct(train.spec, train.cores)
        return error_of(spec, train.cut(spec.ranks, weight, self.metrics), weight, self.metrics)

    def _train(self, spec: TTSpec) -> TensorTrain:
        for train in self.trains:
            own = train.spec
            if (own.format, own.row_modes, own.column_modes) == (
                spec.format,
                spec.row_modes,
                spec.column_modes,
            ):
                return train
        what = "block low rank" if spec.format == BLOCK else "tensor train"
        raise AnalysisError(
            f"the analysis holds no {what} with the modes of {spec}",
            site=self.site.name,
            way_out=f"analyse with formats={spec.format!r}",
        )

    def factors(self, spec: TTSpec, weight: Tensor, *, shared: bool = False) -> tuple[Tensor, ...]:
        """The cores of ``spec`` for the dense weight, in the shapes that the spec stores.

        ``shared``: with the first factor that it has in common with others.
        """
        if shared:
            assert self.shared is not None
            (rank,) = spec.ranks
            reader = self.shared.reader[:, :rank]
            return weight.to(reader.dtype) @ reader, self.shared.factor[:rank]
        if spec.format == LOW_RANK:
            (rank,) = spec.ranks
            if rank >= len(self.distortion) - 1:
                return exact_factors(weight)
            found = best_factors(weight, average(self.metrics), rank)
            if len(self.metrics) == 1 or weight.dim() == 3 or weight.numel() > _LARGEST_ALS:
                return found
            return improved(spec, found, at_work(weight), self.metrics)
        return self._train(spec).cut(spec.ranks, at_work(weight), self.metrics)

    def require(self, formats: Sequence[str]) -> None:
        """Raises AnalysisError for a format that was not analysed."""
        for name in formats:
            if name != DENSE and name not in self.formats:
                raise AnalysisError(
                    f"the format {name!r} was not analysed (only {', '.join(self.formats)})",
                    site=self.site.name,
                    way_out=f"analyse with formats={(*self.formats, name)!r}",
                )

    def measured_error(self, weight: Tensor, approximation: Tensor) -> float:
        """The relative error in the metric of an approximation (M, N), which is overwritten."""
        delta = approximation.sub_(weight)
        return self.error(sum(metric.norm(delta) for metric in self.metrics))


class Store(Protocol):
    """Keeps what is finished, so that a run that was killed goes on after it.

    What it gives back takes the place of what it was given: it may lie on disk.
    """

    def find(self, site: Site) -> Spectrum | None: ...

    def keep(self, curve: Spectrum) -> Spectrum: ...

    def find_shared(self, group: str) -> Mapping[str, SharedFactor] | None: ...

    def keep_shared(
        self, group: str, members: Mapping[str, SharedFactor]
    ) -> Mapping[str, SharedFactor]: ...


Weights = Callable[[str], Tensor]


@dataclass(frozen=True)
class ComputeSpectra:
    """Program with ``spectra``: the curve of every free site, in the program's metric.

    The second moments are given up one site at a time, as their roots are made: only one of the
    two is ever held. ``weights`` gives a dense weight by its name, where they are not the model's.
    Sites that have a curve already keep it; of the others those named by ``only`` get one. What
    weights share is looked for once all of them have theirs.
    """

    formats: FormatsOption = None
    weights: Weights | None = None
    store: Store | None = None
    only: frozenset[str] | None = None
    name: str = "spectra"

    def run(self, program: Program) -> Program:
        free = [site for site in program.sites if site.blocked is None]
        allowed = formats_by_site(free, self.formats)
        weights = self.weights or weights_of(program.model)
        spectra = {**kept_curves(program, self.store)}
        todo = [s for s in free if s.name not in spectra and s.name in (self.only or {s.name})]
        found, start = len(spectra), time.perf_counter()

        def curve_of(site: Site) -> Spectrum:
            moments = program.statistics.get(site.name)
            known = moments is not None and bool(moments.terms)
            metrics = site_metrics(site, moments, program.metric)
            if moments is not None:
                moments.terms.clear()
            weight = as_matrix(site, weights(site.name))
            curve = spectrum(site, weight, metrics, allowed[site.name])
            return replace(curve, in_nats=known and program.metric == "loss")

        program.progress("spectra", found, len(free))
        curves = side_by_side(curve_of, todo, is_small)
        for done, (site, curve) in enumerate(zip(todo, curves, strict=True), found + 1):
            spectra[site.name] = curve if self.store is None else self.store.keep(curve)
            program.progress("spectra", done, len(free))
        program = replace(program, statistics={})
        if len(spectra) < len(free):
            return replace(program, spectra=spectra, summary=f"{len(spectra)} curves so far")
        spectra = {site.name: spectra[site.name] for site in free}
        spectra = with_shared_factors(spectra, weights, self.store, program.progress)
        trains = sum(bool(s.trains) for s in spectra.values())
        shared = sum(s.shared is not None for s in spectra.values())
        summary = (
            f"{len(spectra)} curves in the {program.metric} metric, {trains} with TT points, "
            f"{shared} that may share a first factor"
        )
        if found:
            summary += f"; {found} were kept by an earlier run"
        if parameters := sum(site.parameters for site in todo):
            summary += f"; {1e6 * (time.perf_counter() - start) / parameters:.2g} µs a parameter"
        return replace(program, spectra=spectra, summary=summary)


def is_small(site: Site) -> bool:
    """Whether a weight's decompositions leave a second thread idle."""
    return min(site.matrix) <= _SMALL_SIDE and site.parameters <= _SMALL


def weights_of(model: nn.Module) -> Weights:
    """The dense weights of a model, by name."""
    parameters = dict(model.named_parameters())
    return lambda name: parameters[name].detach()


def kept_curves(program: Program, store: Store | None) -> dict[str, Spectrum]:
    """The curves that a program has, and those that a store has kept of an earlier run."""
    curves = dict(program.spectra)
    if store is not None:
        for site in program.sites:
            if site.blocked is None and site.name not in curves:
                curve = store.find(site)
                curves |= {} if curve is None else {site.name: curve}
    return curves


def as_matrix(site: Site, weight: Tensor) -> Tensor:
    """The weight as (M, N), or (experts, M, N): a convolution's kernel is part of its columns."""
    lead = (site.experts,) if site.experts else ()
    return weight.reshape(*lead, *site.matrix)


# -------------------------------------------------------------------------------- decompositions


def exact_factors(weight: Tensor) -> tuple[Tensor, Tensor]:
    """U (M, k) and V (k, N), k = min(M, N), with U V = W to rounding."""
    m, n = weight.shape[-2:]
    basis = gram_eigenvectors(weight.double(), min(m, n))[0]
    if n <= m:
        return weight.double() @ basis, basis.mT
    return basis, basis.mT @ weight.double()


def singular_squares(weight: Tensor, pay: int, metric: Metric | None = None) -> Tensor:
    """All σ² of the whitened W, descending.

    From the smaller Gram matrix, several times faster than from W. That loses what is below
    sqrt(eps) of the largest singular value, so without a metric it is taken in the weight's own
    precision only where the energy beyond rank ``pay`` survives that, else in float64, and where
    that is not enough W itself is decomposed.
    """
    return _decomposed(weight, pay, metric, vectors=False)[1]


def gram_eigenvectors(
    weight: Tensor, pay: int, metric: Metric | None = None
) -> tuple[Tensor, Tensor]:
    """Right (N ≤ M) or left singular vectors of the whitened W, and ``singular_squares``."""
    found, squares = _decomposed(weight, pay, metric, vectors=True)
    assert found is not None
    return found, squares


def _decomposed(
    weight: Tensor, pay: int, metric: Metric | None, *, vectors: bool
) -> tuple[Tensor | None, Tensor]:
    m, n = weight.shape[-2:]
    metric = metric or Metric(1.0, None, None)
    oriented, matrix = (metric, weight) if n <= m else (metric.transposed(), weight.mT)
    found: tuple[Tensor | None, Tensor] | None = None
    own = metric.plain or oriented.mixes_rows  # where less than float64 is less work
    for dtype in dict.fromkeys((weight.dtype, torch.float64) if own else (torch.float64,)):
        at_dtype = matrix.to(dtype)
        gram = at_dtype.mT @ at_dtype if metric.plain else oriented.gram(at_dtype)
        try:
            if vectors:
                values, basis = torch.linalg.eigh(gram)
            else:
                values, basis = torch.linalg.eigvalsh(gram), None
        except _LinAlgError:
            continue  # squares that overflow, or a solver that does not converge
        values = values.flip(-1).clamp_min(0)
        found = None if basis is None else basis.flip(-1), values
        tail = values[..., pay:].sum(-1) if pay < values.shape[-1] else values[..., -1]
        share = tail / values.sum(-1).clamp_min(1e-300)
        if bool((share > _noise(dtype, metric)).all()):
            return found
    white = metric.whiten(weight)
    try:
        if not vectors:
            return None, torch.linalg.svdvals(white).square()
        left, sigma, right = torch.linalg.svd(white, full_matrices=False)
    except _LinAlgError:
        if found is None:
            raise
        return found  # the float64 Gram is right to sqrt(eps) of the largest
    return (right.mT if n <= m else left), sigma.square()


def _noise(dtype: torch.dtype, metric: Metric) -> float:
    """The share of the energy from which on a tail has four digits.

    The rounding of a Gram matrix is about eps of the whole. Where only L_Rᵀ W is made in a lower
    precision, its rounding E shifts σ² by 2 σ uᵀE v, with random signs, and adds ‖E‖² = eps² of the
    whole.
    """
    eps, exact = torch.finfo(dtype).eps, torch.finfo(torch.float64).eps
    return max(1e4 * exact, 1e4 * eps if metric.plain else 1e6 * eps**2)


def joint_factors(
    weights: Sequence[Tensor], metrics: Sequence[Metric], rank: int
) -> tuple[Tensor, Tensor]:
    """The best common first factor V (rank, N) of weights with one input metric, and P (N, rank).

    W_k ≈ U_k V with U_k = W_k P: the best rank-r factors of the whitened weights stacked on each
    other, whose rows each have the gradients' metric of their own.
    """
    return _joint_pair(weights, metrics[0].right, _joint_basis(weights, metrics, rank)[0])


def _joint_basis(
    weights: Sequence[Tensor], metrics: Sequence[Metric], rank: int
) -> tuple[Tensor, list[Tensor]]:
    """The best subspace (N, rank) of whitened inputs, and each weight's own whitened Gram matrix.

    Without a metric their Gram matrices are not made one by one, and there are none.
    """
    if all(metric.plain for metric in metrics):
        stacked = at_work(torch.cat(list(weights)))
        if stacked.shape[1] <= len(stacked):
            return gram_eigenvectors(stacked, rank)[0][:, :rank].double(), []
    grams = [m.scale * m.gram(w) for w, m in zip(weights, metrics, strict=True)]
    total = grams[0].clone()
    for gram in grams[1:]:
        total += gram
    return torch.linalg.eigh(total)[1].flip(-1)[:, :rank], grams


def _joint_pair(
    weights: Sequence[Tensor], root: Tensor | None, basis: Tensor
) -> tuple[Tensor, Tensor]:
    """V and P of a subspace, each component of the same length in both."""
    reader, shared = _left_times(root, basis), solve_root(root, basis).mT
    size = torch.stack([(w.double() @ reader).square().sum(0) for w in weights]).sum(0).sqrt()
    ratio = (shared.norm(dim=-1) / size.clamp_min(1e-30)).clamp(1e-15, 1e15).sqrt()
    return shared / ratio.unsqueeze(-1), reader * ratio


def with_shared_factors(
    spectra: Mapping[str, Spectrum],
    weights: Weights,
    store: Store | None = None,
    progress: Progress = no_progress,
) -> dict[str, Spectrum]:
    """The curves, with those of a common first factor where weights read the same input."""
    groups: dict[str, list[Spectrum]] = defaultdict(list)
    for curve in spectra.values():
        alone = SHARED not in curve.formats or len(curve.metrics) > 1
        if curve.site.input_group is not None and not alone:
            groups[curve.site.input_group].append(curve)
    result = dict(spectra)
    alike: dict[str, list[Spectrum]] = {}
    for group, members in groups.items():
        rights = [curve.metrics[0].right for curve in members]
        if len(members) > 1 and all(_alike(right, rights[0]) for right in rights):
            alike[group] = members
    kept = {} if store is None else {group: store.find_shared(group) for group in alike}
    todo = [group for group in alike if kept.get(group) is None]
    made = side_by_side(
        lambda group: _common_factors(alike[group], weights),
        todo,
        lambda group: all(is_small(curve.site) for curve in alike[group]),
    )
    for done, (group, common) in enumerate(zip(todo, made, strict=True)):
        progress("shared factors", done, len(todo))
        kept[group] = common if store is None else store.keep_shared(group, common)
    if todo:
        progress("shared factors", len(todo), len(todo))
    for group, members in alike.items():
        for curve in members:
            result[curve.site.name] = replace(curve, shared=kept[group][curve.site.name])
    return result


def _common_factors(members: Sequence[Spectrum], weights: Weights) -> dict[str, SharedFactor]:
    """The first factor of weights with one input, and what each of them loses with it."""
    metrics = [curve.metrics[0] for curve in members]
    matrices = [weights(curve.site.name) for curve in members]
    rows, columns = sum(len(w) for w in matrices), matrices[0].shape[1]
    pay = min(rows, columns, (rows * columns - 1) // (rows + columns))
    basis, grams = _joint_basis(matrices, metrics, pay)
    shared, reader = _joint_pair(matrices, metrics[0].right, basis)
    work = at_work(matrices[0]).dtype
    # The members hold the same tensors, laid out as they are once they were kept on disk.
    factor, given = shared.to(work).contiguous(), reader.to(work).contiguous()
    found: dict[str, SharedFactor] = {}
    for k, (curve, weight) in enumerate(zip(members, matrices, strict=True)):
        # What a rank loses is what the other components hold.
        if grams:
            held = (basis * (grams[k] @ basis)).sum(0)
        else:
            held = metrics[k].scale * (weight.double() @ basis).square().sum(0)
        whole = curve.distortion[0].to(held.device)
        lost = whole - torch.cat([held.new_zeros(1), held.cumsum(0)])
        found[curve.site.name] = SharedFactor(factor, given, lost.clamp_min(0).cpu())
    return found


def _alike(root: Tensor | None, other: Tensor | None) -> bool:
    if root is None or other is None:
        return root is other
    return root.shape == other.shape and bool((root - other).norm() <= 1e-3 * other.norm())


def spectrum(
    site: Site, weight: Tensor, metrics: tuple[Metric, ...], formats: tuple[str, ...]
) -> Spectrum:
    """The curve of one weight in its metric."""
    m, n = site.matrix
    pay = max(1, (m * n - 1) // (m + n))
    if len(metrics) == 1:
        values = singular_squares(at_work(weight), pay, metrics[0]).double()
        tails = tt.tails(values.reshape(-1, values.shape[-1]).sum(0)) * metrics[0].scale
    else:
        left, right = best_factors(weight, average(metrics), pay)
        tails = _summed_tails(weight.to(left.dtype), metrics, left, right, min(m, n))
    # What a plan reads is not on a GPU.
    curve = Spectrum(site, formats, metrics, tails.cpu())
    return _with_trains(curve, at_work(weight)) if site.takes_trains else curve


def _with_trains(curve: Spectrum, weight: Tensor) -> Spectrum:
    """The curve with the points of trains and blocks; trains also where they find structure."""
    formats, counts = curve.formats, (2, 3)
    if TT not in formats:
        if LOW_RANK in formats and has_kronecker_structure(weight):
            formats, counts = (*formats, TT), (2,)
        else:
            counts = ()
    trains = trains_of(weight, counts)
    if BLOCK in formats:
        trains += blocks_of(weight)
    points = points_of(trains, weight, curve.metrics)
    return replace(curve, formats=formats, trains=tuple(trains), train_points=tuple(points))


def best_factors(weight: Tensor, metric: Metric, rank: int) -> tuple[Tensor, Tensor]:
    """The best U (…, M, rank) and V (…, rank, N) in one metric, at least in float32.

    The first r components are the best of rank r.
    """
    m, n = weight.shape[-2:]
    work = at_work(weight)
    basis = gram_eigenvectors(work, rank, metric)[0][..., :rank]
    # The weight meets only the small matrix that is final: its error is that of its own dtype.
    if n <= m:  # W̃ V Vᵀ with V (N, r): U = L_R⁻ᵀ W̃ V = W L_K V, V = Vᵀ L_K⁻¹
        left = work @ _left_times(metric.right, basis).to(work.dtype)
        right = solve_root(metric.right, basis).mT
    else:  # Q Qᵀ W̃ with Q (M, r): U = L_R⁻ᵀ Q, V = Qᵀ L_Rᵀ W
        left = solve_root(metric.left, basis)
        right = _left_times(metric.left, basis).mT.to(work.dtype) @ work
    return _balanced(left.to(work.dtype), right.to(work.dtype))


def _left_times(root: Tensor | None, basis: Tensor) -> Tensor:
    """L B."""
    if root is None:
        return basis
    root = root.to(basis)
    return root.unsqueeze(-1) * basis if root.dim() == 1 else root @ basis


def _summed_tails(
    weight: Tensor, metrics: Sequence[Metric], left: Tensor, right: Tensor, largest: int
) -> Tensor:
    """What every rank loses in a sum of metrics.

    With W − U_r V_r = D + Σ_{i>r} u_i v_i over the stored components, and D what they leave, the
    loss is quadratic: the sums of the trailing blocks of one Gram matrix of components.
    """
    stored = left.shape[-1]
    rest = (weight - left @ right).double()
    total = torch.zeros(stored + 1, dtype=torch.float64, device=left.device)
    for metric in metrics:
        u = root_times(metric.left, left.double())
        v = times_root(right.double(), metric.right)
        whitened_rest = metric.whiten(rest)
        # Experts, where there are several, are summed over: they are cut at one rank.
        blocks = ((u.mT @ u) * (v @ v.mT)).reshape(-1, stored, stored).sum(0)
        cross = ((u.mT @ whitened_rest) * v).sum(-1).reshape(-1, stored).sum(0)
        trailing = blocks.flip(0, 1).cumsum(0).cumsum(1).diagonal().flip(0)
        cross_tail = torch.cat([cross.flip(0).cumsum(0).flip(0), cross.new_zeros(1)])
        own = torch.cat([trailing, trailing.new_zeros(1)])
        total += metric.scale * (own + 2 * cross_tail + whitened_rest.square().sum())
    # Beyond the stored ranks no factorization pays; min(M, N) is exact.
    padding = total.new_full((largest - stored,), float(total[-1]))
    tails = torch.cat([total, padding])
    tails[-1] = 0.0
    return tails.clamp_min(0)


def _balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Each component's two vectors brought to the same length.

    Laid out as they are once they were kept on disk: how a matmul rounds hangs on it.
    """
    a, b = left.norm(dim=-2), right.norm(dim=-1)
    ratio = (b / a.clamp_min(1e-30)).clamp(1e-15, 1e15).sqrt()
    left, right = left * ratio.unsqueeze(-2), right / ratio.unsqueeze(-1)
    return left.contiguous(), right.contiguous()


def formats_by_site(sites: Sequence[Site], option: FormatsOption) -> dict[str, tuple[str, ...]]:
    """The formats that each site may take: dense and low rank where nothing else is asked for."""
    default = (DENSE, LOW_RANK, SHARED)
    if option is None:
        return {site.name: default for site in sites}
    if not isinstance(option, Mapping):
        chosen = _checked(option)
        return {site.name: chosen for site in sites}
    require_match(sites, list(option), "formats")
    return {
        site.name: next(
            (_checked(f) for pattern, f in option.items() if matches(site, pattern)), default
        )
        for site in sites
    }


def _checked(names: str | Sequence[str]) -> tuple[str, ...]:
    names = (names,) if isinstance(names, str) else tuple(names)
    for name in names:
        if name not in FORMATS:
            raise AnalysisError(
                f"formats={name!r} is no format", way_out=f"one of {', '.join(FORMATS)}"
            )
    return names
