"""What pruning does to weights, from its papers, in plain torch: to compare with at equal bytes.

=========  =======================================================================================
magnitude  the smallest entries of every weight go
Wanda      in every row those with the smallest |entry| times the norm of its input (Sun et al.
           2024)
SparseGPT  column by column in blocks of 128: those go that harm least, and the later ones take up
           what the earlier lost (Frantar & Alistarh 2023); damping .01
=========  =======================================================================================

All weights keep the same share of entries, anywhere (*unstructured*) or two in every four of a row
(*2:4*, for which some GPUs have instructions). Inputs are those of the dense model. *Ends* are the
tables and the head: they stay, as these methods leave them, or are pruned like all else, tables by
magnitude. Norms and biases stay.

A kept entry takes two bytes, and what says where it is two bits in 2:4, else a bit for every entry
or a byte for every kept one, whichever is less.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.bit_peers import DAMPING, HEAD, Changed, parts, weight_of
from tensorize.capture.inputs import batch_of

BLOCK = 128
VALUE, PATTERN_2_4 = 2.0, 0.5 * (2 + 0.25)
"""Bytes of a number, and of an entry of a 2:4 weight."""

Prune = Callable[[Tensor, Tensor, float | None], Tensor]
"""A weight (M, N), the moment of its inputs (N, N), the share to keep or None for 2:4."""


def configurations(
    method: str,
    model: nn.Module,
    calibration: Sequence[Any],
    budgets: Sequence[float],
    *,
    ends_too: bool = True,
) -> Iterator[tuple[str, Changed]]:
    """What a method makes of a model at shares of its bytes, by name, one after another.

    Args:
        method: one of ``METHODS``.
        model: in float32, with the numbers of a model in bfloat16.
        calibration: what the layers' inputs are made of.
        budgets: shares of the model's bytes in bfloat16.
        ends_too: try pruned ends as well.
    """
    layers, ends = parts(model)
    moments = second_moments(model, [*layers, *(n for n in ends if n == HEAD)], calibration)
    total = sum(2 * p.numel() for p in model.parameters())
    choices = {"ends stay": layers, "everything": [*layers, *ends]}
    for name, pruned in choices.items():
        if pruned is not layers and not ends_too:
            continue
        entries = sum(weight_of(model, each).numel() for each in pruned)
        rest = total - 2 * entries
        kept = {f"2:4, {name}": None}
        kept |= {
            f"{budget:g}, {name}": share
            for budget in budgets
            if (share := share_kept((budget * total - rest) / entries)) > 0
        }
        for title, share in kept.items():
            small = copy.deepcopy(model)
            prune_all(small, pruned, moments, METHODS[method], share)
            each = PATTERN_2_4 if share is None else bytes_an_entry(share)
            yield title, Changed(small, round(rest + entries * each))


def bytes_an_entry(share: float) -> float:
    """Of a weight of which a share of the entries is kept."""
    return VALUE * share + min(1 / 8, share)


def share_kept(size: float) -> float:
    """The share of entries that may be kept in so many bytes an entry; 0: none."""
    share = (size - 1 / 8) / VALUE
    return min(1.0, share) if share > 1 / 8 else max(0.0, size / (VALUE + 1))


# ------------------------------------------------------------------------------------- one weight


def by_magnitude(weight: Tensor, moment: Tensor, share: float | None) -> Tensor:
    """The largest entries of a weight."""
    return weight * largest(weight.abs(), share, whole=True)


def by_inputs(weight: Tensor, moment: Tensor, share: float | None) -> Tensor:
    """Wanda: in every row, the largest by entry and by input."""
    return weight * largest(weight.abs() * moment.diagonal().sqrt().float(), share, whole=False)


def with_feedback(weight: Tensor, moment: Tensor, share: float | None) -> Tensor:
    """SparseGPT: what a column loses is taken up by those after it."""
    work, done = weight.clone(), torch.empty_like(weight)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(moment)))
    upper = torch.linalg.cholesky(inverse, upper=True).to(work.dtype)
    for start in range(0, work.shape[1], BLOCK):
        stop = min(start + BLOCK, work.shape[1])
        lost = torch.zeros_like(work[:, start:stop])
        harm = (work[:, start:stop] / upper.diagonal()[start:stop]).square()
        keep = largest(harm, share, whole=True)
        for k in range(start, stop):
            if share is None and k % 4 == 0:  # of four, as the earlier columns have left them
                four = slice(k, k + 4)
                harm = (work[:, four] / upper.diagonal()[four]).square()
                keep[:, k - start : k - start + 4] = largest(harm, None, whole=False)
            done[:, k] = work[:, k] * keep[:, k - start]
            off = (work[:, k] - done[:, k]) / upper[k, k]
            work[:, k:stop] -= off[:, None] * upper[k, k:stop]
            lost[:, k - start] = off
        work[:, stop:] -= lost @ upper[start:stop, stop:]
    return done


METHODS: dict[str, Prune] = {
    "magnitude": by_magnitude,
    "Wanda": by_inputs,
    "SparseGPT": with_feedback,
}


def largest(score: Tensor, share: float | None, *, whole: bool) -> Tensor:
    """Which entries (M, N) stay: the largest share of all or of each row; None: two in four."""
    rows, columns = score.shape
    groups = score.reshape(-1, 4) if share is None else score.reshape(1 if whole else rows, -1)
    most = 2 if share is None else round(share * groups.shape[1])
    chosen = torch.zeros_like(groups, dtype=torch.bool)
    return chosen.scatter_(1, groups.topk(most, 1).indices, True).view(rows, columns)


def damped(moment: Tensor) -> Tensor:
    diagonal = moment.diagonal()
    return moment + DAMPING * diagonal.mean() * torch.eye(len(moment), dtype=moment.dtype)


# --------------------------------------------------------------------------------- a whole model


@torch.no_grad()
def prune_all(
    model: nn.Module,
    names: Sequence[str],
    moments: dict[str, Tensor],
    prune: Prune,
    share: float | None,
) -> None:
    """The weights of these modules, in place; by magnitude where nothing is known of inputs."""
    for name in names:
        weight, known = weight_of(model, name), name in moments
        moment = moments[name] if known else torch.empty(0)
        weight.copy_((prune if known else by_magnitude)(weight, moment, share))


@torch.no_grad()
def second_moments(
    model: nn.Module, names: Sequence[str], calibration: Sequence[Any]
) -> dict[str, Tensor]:
    """X Xᵀ of the inputs of layers over the calibration data, (N, N) in float64."""
    moments: dict[str, Tensor] = {}

    def add(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].flatten(0, -2)
        found = (x.mT @ x).double()
        moments[name] = moments[name] + found if name in moments else found

    hooks = [model.get_submodule(n).register_forward_pre_hook(partial(add, n)) for n in names]
    for batch in map(batch_of, calibration):
        model(*batch.args, **batch.kwargs)
    for hook in hooks:
        hook.remove()
    return moments
