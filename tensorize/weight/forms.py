"""Two forms of the same weights: with what a change of basis can remove, and without."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tensorize.formats.low_rank import LowRank, first_time
from tensorize.formats.order import MANY, neighbours
from tensorize.ir.machine import GENERIC, Machine
from tensorize.ir.spec import Spec
from tensorize.weight.install import factored, resize
from tensorize.weight.lazy import FactoredWeight

Named = tuple[list[str], FactoredWeight]
"""A weight under all of its names."""


@torch.no_grad()
def to_pivoted(model: nn.Module, machine: Machine = GENERIC) -> dict[str, Spec]:
    """Let plain weights store no identity, in place; their new specs by first name.

    ``machine``: what says how many columns of low rank are to stay together.
    """
    found = {}
    for group in list(_groups(model)):
        if all(_may_pivot(weight) for _, weight in group) and _pays(group):
            made: tuple[Tensor, ...] = ()
            for names, weight in group:
                spec = weight.spec.in_order_of(_neighbours(weight, machine))
                cores = weight.format.stored(spec, weight.cores, weight.dtype, made)
                spec = weight.format.as_stored(spec, cores)
                made = _put(model, names[0], weight, spec, cores, made)
                found[names[0]] = spec
    return found


@torch.no_grad()
def to_plain(model: nn.Module) -> dict[str, Spec]:
    """Let every weight store all of its cores, in place; new specs by first name."""
    found = {}
    for group in list(_groups(model)):
        if all(weight.spec.pivoted for _, weight in group):
            made: tuple[Tensor, ...] = ()
            for names, weight in group:
                found[names[0]] = spec = weight.spec.plain
                made = _put(model, names[0], weight, spec, weight.plain_cores, made)
    return found


@torch.no_grad()
def to_parts(model: nn.Module, parts: int, machine: Machine = GENERIC) -> dict[str, Spec]:
    """Let weights of low rank without an identity have it in as many columns of each of so many
    equal parts of their input, in place; their new specs by first name.

    Those become plain for which that cannot be, or is slower for who holds one part.
    """
    found = {}
    for group in list(_groups(model)):
        if not all(weight.spec.pivoted for _, weight in group):
            continue
        made: tuple[Tensor, ...] = ()
        first, pays = group[0][1], _pays_in_parts(group[0][1], parts, machine)
        if pays and _is_in_parts(first, parts):
            continue
        leading = None
        if pays:
            assert isinstance(first.format, LowRank)
            leading = first.format.stored_in_parts(first.plain_cores, first.dtype, parts)
        for names, weight in group:
            spec, cores = weight.spec.plain, weight.plain_cores
            if leading is not None:
                spec = weight.spec.in_order_of(1)
                cores = weight.format.stored(spec, cores, weight.dtype, made) if made else leading
            found[names[0]] = spec
            made = _put(model, names[0], weight, spec, cores, made)
    return found


def _pays_in_parts(weight: FactoredWeight, parts: int, machine: Machine) -> bool:
    """Whether a weight can be without an identity in parts, and is no slower for who has one."""
    spec, dtype = weight.spec, str(weight.dtype).removeprefix("torch.")
    if weight.is_meta or not weight.format.pair or spec.batch:
        return False
    if any(size % parts for size in (*spec.ranks, spec.shape[-1])):
        return False
    every = spec.in_order_of(1), spec.plain
    without, plain = (first_time(each, MANY, machine, dtype, parts) for each in every)
    return bool(without <= plain)


def _is_in_parts(weight: FactoredWeight, parts: int) -> bool:
    (order,), n, (rank,) = weight.indices, weight.spec.shape[-1], weight.spec.ranks
    if len(order) != n:
        return False
    counts = torch.bincount(order[:rank] // (n // parts), minlength=parts)
    return bool((counts == rank // parts).all())


def _neighbours(weight: FactoredWeight, machine: Machine) -> int:
    """How many columns stay together: of experts and of what is made whole at every call one."""
    if weight.spec.batch or weight.frame.shape is not None or not weight.format.pair:
        return 1
    m, n = weight.spec.shape
    return neighbours(machine, m, n, MANY, str(weight.dtype).removeprefix("torch."))


def _may_pivot(weight: FactoredWeight) -> bool:
    """Whether a weight has bonds that are whole, with nothing between the cores."""
    return weight.format.indexed and not weight.spec.pivoted and weight.nonlinearity is None


def _pays(group: Sequence[Named]) -> bool:
    """Whether weights without identities are smaller: low rank, on each other, not at full rank."""
    spec, weight = group[0][1].spec, group[0][1]
    if weight.format.pair:
        rows = sum(weight.spec.shape[-2] for _, weight in group)
        return spec.ranks[0] < min(rows, spec.shape[-1])
    (names, _), *_ = group
    sizes = weight.dtype.itemsize, len(names)
    return spec.removable > 0 and spec.in_order_of(1).bytes(*sizes) < spec.bytes(*sizes)


def _put(
    model: nn.Module,
    name: str,
    weight: FactoredWeight,
    spec: Spec,
    cores: Sequence[Tensor],
    first: tuple[Tensor, ...],
) -> tuple[Tensor, ...]:
    """Give a weight other cores, ``first`` those of a first factor that another one has already;
    what it then holds of that factor."""
    count, trained = len(weight.cores), weight.requires_grad
    held: list[Any] = [nn.Parameter(core.contiguous(), trained) for core in cores[:count]]
    held = [held[0], *(first or (*held[1:], *cores[count:]))]
    resize(model, name, spec, held)
    return tuple(held[1:])


def _groups(model: nn.Module) -> Iterator[list[Named]]:
    """Weights with one first factor together, all others alone, whose cores serve nothing else."""
    alike: dict[tuple[int, ...], list[str]] = defaultdict(list)
    weights = {}
    for name, weight in factored(model):
        key = tuple(id(core) for core in weight.cores)
        alike[key].append(name)
        weights[key] = weight
    uses = Counter(core for key in alike for core in key)
    groups: dict[int, list[tuple[int, ...]]] = defaultdict(list)
    for key in alike:
        groups[key[-1]].append(key)
    for first, keys in groups.items():
        own = all(uses[core] == 1 for key in keys for core in key[:-1])
        if own and uses[first] == len(keys):
            yield [(alike[key], weights[key]) for key in keys]
