"""Two forms of the same low-rank weights: with what a change of basis can remove, and without."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tensorize.ir.spec import Spec, TTSpec
from tensorize.weight.install import factored, resize
from tensorize.weight.lazy import FactoredWeight


@torch.no_grad()
def to_pivoted(model: nn.Module) -> dict[str, Spec]:
    """Let plain low-rank weights store no identity, in place; their new specs by first name."""
    found = {}
    for names, weight in list(_weights(model)):
        if not weight.format.pair or weight.spec.pivoted or weight.nonlinearity is not None:
            continue
        (*experts, m, n), (rank,) = weight.spec.shape, weight.spec.ranks
        if rank < min(m, n):
            how = {"experts": sum(experts), "storage": weight.spec.storage, "pivoted": True}
            spec = TTSpec.low_rank(m, n, rank, **how)
            cores = weight.format.stored(spec, weight.cores, weight.dtype)
            found[names[0]] = _put(model, names[0], weight, spec, cores)
    return found


@torch.no_grad()
def to_plain(model: nn.Module) -> dict[str, Spec]:
    """Let every low-rank weight store both factors whole, in place; new specs by first name."""
    found = {}
    for names, weight in list(_weights(model)):
        if weight.spec.pivoted:
            found[names[0]] = _put(model, names[0], weight, weight.spec.plain, weight.plain_cores)
    return found


def _put(
    model: nn.Module, name: str, weight: FactoredWeight, spec: Spec, cores: Sequence[Tensor]
) -> Spec:
    trained = weight.requires_grad
    held: list[Any] = [nn.Parameter(c.contiguous(), trained) for c in cores[: len(weight.cores)]]
    resize(model, name, spec, [*held, *cores[len(weight.cores) :]])
    return spec


def _weights(model: nn.Module) -> Iterator[tuple[list[str], FactoredWeight]]:
    """Every weight whose cores are its own alone, under all of its names."""
    alike: dict[tuple[int, ...], list[str]] = defaultdict(list)
    weights = {}
    for name, weight in factored(model):
        key = tuple(id(core) for core in weight.cores)
        alike[key].append(name)
        weights[key] = weight
    uses = Counter(core for key in alike for core in key)
    for key, names in alike.items():
        if all(uses[core] == 1 for core in key):
            yield names, weights[key]
