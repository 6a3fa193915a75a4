"""First factors that weights of one input have in common: q, k, v; gate, up.

W_k ≈ (W_k P) V: the best V in a metric is that of the whitened weights stacked on each other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tensorize.algebra.factors import gram_eigenvectors, left_times
from tensorize.algebra.metric import Metric, solve_root
from tensorize.base.progress import Progress, no_progress
from tensorize.base.tensors import at_work
from tensorize.formats.low_rank import largest_that_pays
from tensorize.passes.curves.curve import SharedFactor, Spectrum, Store, Weights
from tensorize.passes.curves.formats import joins
from tensorize.passes.curves.side_by_side import is_small, side_by_side


def with_shared_factors(
    spectra: Mapping[str, Spectrum],
    weights: Weights,
    store: Store | None = None,
    progress: Progress = no_progress,
) -> dict[str, Spectrum]:
    """The curves, with those of a common first factor where weights read the same input."""
    groups: dict[str, list[Spectrum]] = defaultdict(list)
    for curve in spectra.values():
        alone = not joins(curve.formats) or len(curve.metrics) > 1
        if curve.site.input_group is not None and not alone:
            groups[curve.site.input_group].append(curve)
    result = dict(spectra)
    alike: dict[str, list[Spectrum]] = {}
    for group, members in groups.items():
        rights = [curve.metrics[0].right for curve in _whole(members, store)]
        if len(members) > 1 and all(_alike(right, rights[0]) for right in rights):
            alike[group] = members
    kept = {} if store is None else {group: store.find_shared(group) for group in alike}
    todo = [group for group in alike if kept.get(group) is None]
    made = side_by_side(
        lambda group: _common_factors(_whole(alike[group], store), weights),
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


def _whole(members: Sequence[Spectrum], store: Store | None) -> Sequence[Spectrum]:
    return members if store is None else [store.complete(curve) for curve in members]


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
    reader, shared = left_times(root, basis), solve_root(root, basis).mT
    size = torch.stack([(w.double() @ reader).square().sum(0) for w in weights]).sum(0).sqrt()
    ratio = (shared.norm(dim=-1) / size.clamp_min(1e-30)).clamp(1e-15, 1e15).sqrt()
    return shared / ratio.unsqueeze(-1), reader * ratio


def _common_factors(members: Sequence[Spectrum], weights: Weights) -> dict[str, SharedFactor]:
    """The first factor of weights with one input, and what each of them loses with it."""
    metrics = [curve.metrics[0] for curve in members]
    matrices = [weights(curve.site.name) for curve in members]
    rows, columns = sum(len(w) for w in matrices), matrices[0].shape[1]
    pay = largest_that_pays(rows, columns)
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
