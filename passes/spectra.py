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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tensorize import tt
from tensorize.errors import AnalysisError
from tensorize.ir import DENSE, FORMATS, LOW_RANK, TT, Site, TTSpec
from tensorize.passes.pipeline import Program
from tensorize.passes.sites import matches, require_match
from tensorize.passes.statistics import Moments

# Share of the mean eigenvalue added to a second moment: between 1 % and 30 % changes little.
DAMPING = 0.05
_TT_POINTS = 12
_PROBE_RANK = 8
FormatsOption = str | Sequence[str] | Mapping[str, str | Sequence[str]] | None


@dataclass(frozen=True)
class Metric:
    """One term ``scale · ‖R^½ ΔW K^½‖²``; R and K damped, full, diagonal (1-D) or None (identity).

    ``left`` and ``right`` are L_R and L_K: Cholesky factors, or the square roots of a diagonal.
    """

    scale: float
    left: Tensor | None
    right: Tensor | None

    def whiten(self, weight: Tensor) -> Tensor:
        """L_Rᵀ W L_K."""
        return _times_root(_root_times(self.left, weight), self.right)

    def norm(self, weight: Tensor) -> float:
        """scale · ‖R^½ W K^½‖² of a matrix, or the sum over a stack of them."""
        return self.scale * float(self.whiten(weight.double()).square().sum())


@dataclass(frozen=True)
class TensorTrain:
    """The exact tensor train of a weight for one split of its modes; rounding gives the others."""

    spec: TTSpec
    cores: tuple[Tensor, ...]

    def rounded(self, ranks: Sequence[int]) -> tuple[TTSpec, list[Tensor]]:
        """The train rounded to ``ranks`` (Oseledets 2011, algorithm 2)."""
        return tt.round_tt(self.spec, list(self.cores), tuple(ranks))


@dataclass(frozen=True)
class Spectrum:
    """The curve of one weight.

    ``left`` (M, K) and ``right`` (K, N), with a leading axis of experts where there are several:
    the first r components are the best rank-r factors. ``distortion[r]`` is what is lost at rank r
    (r = 0 … min(M, N)) in the units of the metric; ``distortion[0]`` is the whole weight.
    ``trains`` are the splits tried for TT, ``train_points`` what their roundings lose.
    ``in_nats`` is False for a weight that the calibration data say nothing about.
    """

    site: Site
    formats: tuple[str, ...]
    metrics: tuple[Metric, ...]
    left: Tensor
    right: Tensor
    distortion: Tensor
    trains: tuple[TensorTrain, ...] = ()
    train_points: tuple[tuple[TTSpec, float], ...] = ()
    in_nats: bool = True

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
        delta = tt.reconstruct(*train.rounded(spec.ranks)) - weight
        return sum(metric.norm(delta) for metric in self.metrics)

    def _train(self, spec: TTSpec) -> TensorTrain:
        modes = (spec.row_modes, spec.column_modes)
        for train in self.trains:
            if (train.spec.row_modes, train.spec.column_modes) == modes:
                return train
        raise AnalysisError(
            f"the analysis holds no tensor train with the modes of {spec}",
            site=self.site.name,
            way_out="analyse with formats='tt'",
        )

    def factors(self, spec: TTSpec, weight: Tensor) -> tuple[Tensor, ...]:
        """The cores of ``spec`` for the dense weight, in the shapes that the spec stores."""
        if spec.format == LOW_RANK:
            (rank,) = spec.ranks
            if rank <= self.left.shape[-1]:
                return self.left[..., :rank], self.right[..., :rank, :]
            return exact_factors(weight)
        return tuple(self._train(spec).rounded(spec.ranks)[1])

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
        """The relative error in the metric of an approximation (M, N) of the dense weight."""
        delta = approximation.double() - weight.double()
        lost = sum(metric.norm(delta) for metric in self.metrics)
        whole = sum(metric.norm(weight.double()) for metric in self.metrics)
        return (lost / whole) ** 0.5 if whole > 0 else 0.0


@dataclass(frozen=True)
class ComputeSpectra:
    """Program with ``spectra``: the curve of every free site, in the program's metric."""

    formats: FormatsOption = None
    name: str = "spectra"

    def run(self, program: Program) -> Program:
        free = [site for site in program.sites if site.blocked is None]
        allowed = formats_by_site(free, self.formats)
        parameters = dict(program.model.named_parameters())
        spectra = {}
        for done, site in enumerate(free):
            program.progress("spectra", done, len(free))
            metrics = site_metrics(site, program.statistics.get(site.name), program.metric)
            weight = as_matrix(site, parameters[site.name].detach())
            known = bool(getattr(program.statistics.get(site.name), "terms", None))
            curve = spectrum(site, weight, metrics, allowed[site.name])
            spectra[site.name] = replace(curve, in_nats=known and program.metric == "loss")
        program.progress("spectra", len(free), len(free))
        trains = sum(bool(s.trains) for s in spectra.values())
        summary = f"{len(spectra)} curves in the {program.metric} metric, {trains} with TT points"
        return replace(program, spectra=spectra, summary=summary)


def as_matrix(site: Site, weight: Tensor) -> Tensor:
    """The weight as (M, N), or (experts, M, N): a convolution's kernel is part of its columns."""
    return weight.reshape(site.matrix) if site.convolution else weight


# ------------------------------------------------------------------------------------- metrics


def site_metrics(site: Site, moments: Moments | None, metric: str) -> tuple[Metric, ...]:
    """The terms of a site's metric, damped and factored; the plain norm where there are no data."""
    terms = list(moments.terms.values()) if moments is not None else []
    if not terms:
        return (Metric(1.0, None, None),)
    scale = 0.5 if metric == "loss" else 1.0
    return tuple(Metric(scale, _root(t.rows, site), _root(t.columns, site)) for t in terms)


def _root(moment: Tensor | None, site: Site) -> Tensor | None:
    """L with L Lᵀ = moment + damping; the square root of a diagonal."""
    if moment is None:
        return None
    moment = moment.double()
    diagonal = moment if moment.dim() == 1 else moment.diagonal()
    mean = float(diagonal.mean())
    if not mean > 0:
        return torch.full_like(diagonal, 1e-12)
    if moment.dim() == 1:
        return (moment + DAMPING * mean).sqrt()
    identity = torch.eye(moment.shape[0], dtype=torch.float64, device=moment.device)
    for damping in (DAMPING, 10 * DAMPING):
        factor, info = torch.linalg.cholesky_ex(moment + damping * mean * identity)
        if int(info) == 0:
            return factor
    raise AnalysisError(
        "the second moment of its inputs or gradients is not positive semi-definite",
        site=site.name,
        way_out="check the calibration data for huge or non-finite values",
    )


def _average(metrics: Sequence[Metric]) -> Metric:
    """One metric for several: each term's two sides at unit mean, weighted by its size."""
    if len(metrics) == 1:
        return metrics[0]

    def gram(root: Tensor | None) -> Tensor | None:
        if root is None:
            return None
        return root.square() if root.dim() == 1 else root @ root.t()

    def mean(moment: Tensor | None) -> float:
        if moment is None:
            return 1.0
        return float(moment.mean() if moment.dim() == 1 else moment.diagonal().mean())

    pairs = [(gram(metric.left), gram(metric.right)) for metric in metrics]
    sizes = [m.scale * mean(a) * mean(b) for m, (a, b) in zip(metrics, pairs, strict=True)]
    total = sum(sizes)

    def side(index: int) -> Tensor | None:
        moments = [pair[index] for pair in pairs]
        if all(moment is None for moment in moments):
            return None
        known = next(m for m in moments if m is not None)
        width = known.shape[0]
        full = any(m is not None and m.dim() == 2 for m in moments)
        diagonal_only = any(m is not None and m.dim() == 1 for m in moments) and width > 4096
        summed = torch.zeros(width, dtype=torch.float64)
        dense = torch.zeros(width, width, dtype=torch.float64) if full and not diagonal_only else None
        for moment, size in zip(moments, sizes, strict=True):
            share = size / total if total > 0 else 1 / len(moments)
            part = torch.ones(width, dtype=torch.float64) if moment is None else moment
            part = part * (share / mean(moment))
            if part.dim() == 1:
                summed += part
            elif dense is not None:
                dense += part
            else:
                summed += part.diagonal()
        if dense is None:
            return summed.sqrt()
        return torch.linalg.cholesky(dense + summed.diag())

    return Metric(total, side(0), side(1))


# -------------------------------------------------------------------------------- decompositions


def exact_factors(weight: Tensor) -> tuple[Tensor, Tensor]:
    """U (M, k) and V (k, N), k = min(M, N), with U V = W to rounding."""
    m, n = weight.shape[-2:]
    basis = gram_eigenvectors(weight.double(), min(m, n))[0]
    if n <= m:
        return weight.double() @ basis, _transposed(basis)
    return basis, _transposed(basis) @ weight.double()


def gram_eigenvectors(weight: Tensor, pay: int) -> tuple[Tensor, Tensor]:
    """Right (N ≤ M) or left singular vectors of W, and all squared singular values, descending.

    Through the smaller Gram matrix, several times faster than an SVD. A Gram matrix in the
    weight's own precision loses what is below sqrt(eps) of the largest singular value, so where
    the energy beyond rank ``pay`` is too small for it, it is taken in float64, and where that is
    not enough, by a full SVD.
    """
    m, n = weight.shape[-2:]

    def decompose(matrix: Tensor) -> tuple[Tensor, Tensor]:
        gram = _transposed(matrix) @ matrix if n <= m else matrix @ _transposed(matrix)
        values, vectors = torch.linalg.eigh(gram)
        return vectors.flip(-1), values.flip(-1).clamp_min(0)

    for dtype in dict.fromkeys((weight.dtype, torch.float64)):
        vectors, values = decompose(weight.to(dtype))
        tail = values[..., pay:].sum(-1) if pay < values.shape[-1] else values[..., -1]
        reliable = tail / values.sum(-1).clamp_min(1e-300)
        # Four digits of the tail: its rounding noise is about eps of the total.
        if bool((reliable > 1e4 * torch.finfo(dtype).eps).all()):
            return vectors, values
    try:
        left, sigma, right = torch.linalg.svd(weight.double(), full_matrices=False)
    except torch.linalg.LinAlgError:
        return vectors, values  # the float64 Gram is right to sqrt(eps) of the largest
    return (_transposed(right) if n <= m else left), sigma.square()


def spectrum(
    site: Site, weight: Tensor, metrics: tuple[Metric, ...], formats: tuple[str, ...]
) -> Spectrum:
    """The curve of one weight in its metric."""
    m, n = site.matrix
    work = weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight
    metric = _average(metrics)
    if metric.left is not None or metric.right is not None:
        work = work.double()
    white = metric.whiten(work)
    pay = max(1, (m * n - 1) // (m + n))
    vectors, values = gram_eigenvectors(white, pay)
    vectors = vectors.to(white.dtype)
    basis = vectors[..., :pay]
    if n <= m:  # W̃ V Vᵀ with V (N, r): U = L_R⁻ᵀ W̃ V = W L_K V, V = Vᵀ L_K⁻¹
        left = _times_root(work, metric.right) @ basis
        right = _transposed(_solve(metric.right, basis))
    else:  # Q Qᵀ W̃ with Q (M, r): U = L_R⁻ᵀ Q, V = Qᵀ L_Rᵀ W
        left = _solve(metric.left, basis)
        right = _transposed(basis) @ _root_times(metric.left, work)
    left, right = _balanced(left, right)
    if len(metrics) == 1:
        tails = _tails(values.double().reshape(-1, values.shape[-1]).sum(0)) * metric.scale
    else:
        tails = _summed_tails(work, metrics, left, right, min(m, n))
    dtype = torch.float32 if weight.dtype != torch.float64 else torch.float64
    curve = Spectrum(site, formats, metrics, left.to(dtype), right.to(dtype), tails)
    plain = not site.experts and not site.convolution
    return _with_trains(curve, weight) if plain else curve


def _tails(squares: Tensor) -> Tensor:
    """Σ_{i>r} squares for r = 0 … k, descending and ending in an exact zero."""
    reverse = squares.flip(0).cumsum(0).flip(0)
    return torch.cat([reverse, reverse.new_zeros(1)])


def _summed_tails(
    weight: Tensor, metrics: Sequence[Metric], left: Tensor, right: Tensor, largest: int
) -> Tensor:
    """What every rank loses in a sum of metrics.

    With W − U_r V_r = D + Σ_{i>r} u_i v_i over the stored components, and D what they leave, the
    loss is quadratic: the sums of the trailing blocks of one Gram matrix of components.
    """
    stored = left.shape[-1]
    rest = weight - left @ right
    total = torch.zeros(stored + 1, dtype=torch.float64)
    for metric in metrics:
        u = _root_times(metric.left, left.double())
        v = _times_root(right.double(), metric.right)
        blocks = (u.t() @ u) * (v @ v.t())
        trailing = blocks.flip(0, 1).cumsum(0).cumsum(1).diagonal().flip(0)
        whitened_rest = metric.whiten(rest.double())
        cross = ((u.t() @ whitened_rest) * v).sum(1)
        cross_tail = torch.cat([cross.flip(0).cumsum(0).flip(0), cross.new_zeros(1)])
        own = torch.cat([trailing, trailing.new_zeros(1)])
        total += metric.scale * (own + 2 * cross_tail + whitened_rest.square().sum())
    # Beyond the stored ranks no factorization pays; min(M, N) is exact.
    padding = torch.full((largest - stored,), float(total[-1]), dtype=torch.float64)
    tails = torch.cat([total, padding])
    tails[-1] = 0.0
    return tails.clamp_min(0)


def _balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Each component's two vectors brought to the same length."""
    a, b = left.norm(dim=-2), right.norm(dim=-1)
    ratio = (b / a.clamp_min(1e-30)).clamp(1e-15, 1e15).sqrt()
    return left * ratio.unsqueeze(-2), right / ratio.unsqueeze(-1)


def _transposed(matrix: Tensor) -> Tensor:
    return matrix.transpose(-1, -2)


def _times_root(weight: Tensor, root: Tensor | None) -> Tensor:
    """W L."""
    if root is None:
        return weight
    return weight * root if root.dim() == 1 else weight @ root


def _root_times(root: Tensor | None, weight: Tensor) -> Tensor:
    """Lᵀ W."""
    if root is None:
        return weight
    return root.unsqueeze(-1) * weight if root.dim() == 1 else root.t() @ weight


def _solve(root: Tensor | None, basis: Tensor) -> Tensor:
    """L⁻ᵀ B."""
    if root is None:
        return basis
    if root.dim() == 1:
        return basis / root.unsqueeze(-1)
    return torch.linalg.solve_triangular(root.t(), basis, upper=True)


# ----------------------------------------------------------------------------------- tensor trains


def _with_trains(curve: Spectrum, weight: Tensor) -> Spectrum:
    """TT points where asked for, or where a cheap probe finds structure that low rank misses."""
    work = weight.double() if weight.dtype == torch.float64 else weight.float()
    formats, counts = curve.formats, (2, 3)
    if TT not in formats:
        if LOW_RANK not in formats or not _has_kronecker_structure(work):
            return curve
        formats, counts = (*formats, TT), (2,)
    m, n = curve.site.matrix
    trains: list[TensorTrain] = []
    points: list[tuple[TTSpec, float]] = []
    for count in counts:
        row_modes = tt.balanced_modes(m, count)
        column_modes = tuple(reversed(tt.balanced_modes(n, count)))
        if sum(a * b > 1 for a, b in zip(row_modes, column_modes, strict=True)) < 2:
            continue  # a prime by a prime: nothing to split
        spec, cores = tt.tt_svd(work, row_modes, column_modes)
        train = TensorTrain(spec, tuple(cores))
        trains.append(train)
        for ranks in _rank_ladder(spec, m * n):
            rounded = train.rounded(ranks)
            delta = tt.reconstruct(*rounded) - work
            points.append((rounded[0], sum(metric.norm(delta) for metric in curve.metrics)))
    return replace(curve, formats=formats, trains=tuple(trains), train_points=tuple(points))


def _rank_ladder(exact: TTSpec, dense: int) -> list[tuple[int, ...]]:
    """Ranks growing geometrically from 1 as long as the cores are smaller than the weight."""
    ladder: list[tuple[int, ...]] = []
    for step in range(_TT_POINTS + 1):
        bound = max(1, round(max(exact.ranks) ** (step / _TT_POINTS)))
        ranks = tuple(min(bound, r) for r in exact.ranks)
        if ranks not in ladder and exact.with_ranks(ranks).parameters < dense:
            ladder.append(ranks)
    return ladder


def _has_kronecker_structure(weight: Tensor) -> bool:
    """Whether a few Kronecker terms hold more of W than low rank does at as many parameters.

    Compares the energy that ``_PROBE_RANK`` terms keep (randomized SVD of the rearranged weight,
    Van Loan & Pitsianis 1993) with the energy of the best low rank of the same size.
    """
    m, n = weight.shape
    (m1, m2), (n1, n2) = tt.balanced_modes(m, 2), tuple(reversed(tt.balanced_modes(n, 2)))
    if min(m1, m2, n1, n2) < 2:
        return False
    terms = min(_PROBE_RANK, m1 * n1, m2 * n2)
    rank = max(1, terms * (m1 * n1 + m2 * n2) // (m + n))
    rearranged = weight.reshape(m1, m2, n1, n2).permute(0, 2, 1, 3).reshape(m1 * n1, m2 * n2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kept_tt = torch.svd_lowrank(rearranged, q=terms, niter=2)[1].square().sum()
        kept_low = torch.svd_lowrank(weight, q=min(rank, m, n), niter=2)[1].square().sum()
    whole = weight.square().sum()
    return bool((whole - kept_tt) < 0.5 * (whole - kept_low))


def formats_by_site(sites: Sequence[Site], option: FormatsOption) -> dict[str, tuple[str, ...]]:
    """The formats that each site may take; dense is always among them."""
    default = (DENSE, LOW_RANK)
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

