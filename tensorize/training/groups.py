"""Parameter groups whose learning rates move cores as far as the dense weight would be moved.

What decides whether a layer learns in step with others is the spectral norm of its change (Yang,
Simon & Bernstein 2023). A step of Adam moves every entry by about its learning rate, along few
directions: a dense weight (M, N) by lr √(MN) in that norm. Core k maps a_k entries to b_k (its
columns and the bond behind it, to its rows and the bond before it), so a step moves it by
lr_k √(a_k b_k), and the others carry that on by their own norms, σ_j (√a_j + √b_j) for independent
entries of root mean square σ_j. Each of d cores may move the weight by a d-th of what the dense
step does:

    lr_k = lr · √(MN) / (d √(a_k b_k) Π_{j≠k} σ_j (√a_j + √b_j)).

The relative step lr_k / σ_k then does not depend on how the scale of W is split among the cores.
A step of SGD is the gradient itself, which core k receives through the others and passes on through
them again: lr_k = lr / (d Π_{j≠k} σ_j² (√a_j + √b_j)²). Decoupled weight decay shrinks W by
Σ_k lr_k wd_k a step, so wd_k = wd · lr / (d lr_k).

Low rank that stores no identity, W = U' [I | V'] with U' (M, R) and V' (R, N - R), moves by
U' ΔV' and by ΔU' [I | V']. U' is carried on by a factor of the norm √(1 + σ² (√R + √(N - R))²),
σ that of V', in place of σ (√R + √N). A step of V' reaches N - R columns only, √(R (N - R)) large,
and is to move these as the dense step does, by √(M (N - R)): N - R cancels, and the rate is that of
V in the plain form, for the same U. Decay of U' shrinks all of W, decay of V' only the columns that
are not kept, so U' gets all of it and V' none. Trains and blocks are the same: of core k, read as
(R, N), a step reaches N - R of N columns, it carries others on by √(1 + σ² (√b + √(a (N - R)/N))²),
and the first core gets the decay.

Of integers of a few bits the scales train: a step of a scale moves the numbers of its group by
their codes, so that it is as many times smaller.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

from torch import nn

from tensorize.base.errors import TensorizeError, check_one_of
from tensorize.ir.spec import TTSpec
from tensorize.passes.rewrite.fresh_cores import core_scales, root_mean_square
from tensorize.weight.install import factored
from tensorize.weight.lazy import FactoredWeight

RULES = ("adam", "sgd")


def parameter_groups(
    model: nn.Module, lr: float, weight_decay: float = 0.0, *, rule: str = "adam"
) -> list[dict[str, Any]]:
    """Groups for any optimizer: ``torch.optim.AdamW(parameter_groups(model, 1e-3, 0.1))``.

    Cores get learning rates of their own (the module's docstring derives them), from the scale that
    they have now: make the groups before a checkpoint is read. Dense matrices get ``lr`` and
    ``weight_decay``; biases, norms and other vectors get ``lr`` and are not decayed. Parameters
    that need no gradient are left out, and each is in one group.

    Args:
        lr: what the dense model is trained with, scalar and > 0.
        weight_decay: likewise, decoupled (AdamW) for ``rule="adam"``.
        rule: ``"adam"`` for optimizers whose steps do not grow with the gradient (Adam, Lion,
            Adafactor), ``"sgd"`` for those whose do.

    Returns:
        Dicts with ``params``, ``lr``, ``weight_decay`` and ``name``.

    Raises:
        TensorizeError: an argument makes no sense, or nothing needs a gradient.
    """
    if not (lr > 0 and weight_decay >= 0):
        raise TensorizeError(
            f"lr must be > 0 and weight_decay >= 0, got {lr} and {weight_decay}",
            way_out="lr=1e-3, weight_decay=0.1",
        )
    check_one_of("rule", rule, RULES)
    speeds = core_speeds(model, rule)
    groups: dict[tuple[str, float, float], list[nn.Parameter]] = defaultdict(list)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if (found := speeds.get(id(parameter))) is not None:
            speed, share = found
            key = "cores", lr * speed, weight_decay * share / speed
        elif parameter.dim() >= 2:
            key = "dense", lr, weight_decay
        else:
            key = "vectors", lr, 0.0
        groups[key].append(parameter)
    if not groups:
        raise TensorizeError(
            "no parameter of the model needs a gradient", way_out="model.requires_grad_()"
        )
    return [
        {"params": parameters, "lr": rate, "weight_decay": decay, "name": name}
        for (name, rate, decay), parameters in sorted(groups.items(), key=lambda group: group[0])
    ]


def core_speeds(model: nn.Module, rule: str = "adam") -> dict[int, tuple[float, float]]:
    """By the id of every core: its learning rate over the dense one, and its share of the decay.

    Rates are rounded to two digits, so that weights of one shape are in one group.
    """
    speeds: dict[int, tuple[float, float]] = {}
    for _, weight in factored(model):
        numbers, steps = weight, [1.0] * len(weight.cores)
        if weight.spec.precision is not None:
            numbers, steps = _in_numbers(weight, rule)
        count = len(weight.cores)
        if count > 1 and not numbers.format.indexed:
            continue
        pivoted = numbers.spec.pivoted
        shares = (1.0, *(0.0,) * (count - 1)) if pivoted else (1 / count,) * count
        found = [1.0] if count == 1 else _speeds(numbers, rule)
        for core, speed, step, share in zip(weight.cores, found, steps, shares, strict=True):
            speeds.setdefault(id(core), (float(f"{speed * step:.2g}"), share))
    return speeds


def _in_numbers(weight: FactoredWeight, rule: str) -> tuple[FactoredWeight, list[float]]:
    """A weight whose scales train, as the numbers that its codes stand for; and of every core the
    step of a scale over that of a number.

    A number is a code times its scale: it moves as many times as far, and its scale gets as many
    times the gradient.
    """
    spec, count = weight.spec, len(weight.cores)
    form: Any = weight.format
    held = form.inside(spec, (*weight.cores, *weight.indices))
    numbers = FactoredWeight(spec.inner, held[:count], weight.frame, indices=held[count:])
    sizes = [root_mean_square(core.detach()) for core in (*weight.cores, *held[:count])]
    codes = [max(n, 1e-30) / max(s, 1e-30) for s, n in zip(sizes, sizes[count:], strict=False)]
    return numbers, [code ** (-1 if rule == "adam" else -2) for code in codes]


def _speeds(weight: FactoredWeight, rule: str) -> list[float]:
    spec = weight.spec.single
    scales = [root_mean_square(core.detach()) for core in weight.cores]
    if 0.0 in scales:  # a weight that starts at zero: as if it started at the usual scale
        usual = core_scales(spec, 1 / math.sqrt(spec.shape[-1]))
        scales = [own or other for own, other in zip(scales, usual, strict=True)]
    sides = [_sides(spec, k) for k in range(len(spec.cores))]
    norms = [
        scale * (math.sqrt(a) + math.sqrt(b)) for scale, (a, b) in zip(scales, sides, strict=True)
    ]
    if spec.pivoted:
        for k, (rank, width) in enumerate(zip(spec.ranks, spec.widths, strict=True), 1):
            a, b = sides[k]
            reached = a * (width - rank) / width
            norms[k] = math.hypot(1, scales[k] * (math.sqrt(b) + math.sqrt(reached)))
    dense, count = math.prod(spec.shape), len(norms)
    speeds = []
    for k, (a, b) in enumerate(sides):
        carried = math.prod(norm for j, norm in enumerate(norms) if j != k)
        adam = math.sqrt(dense / (a * b)) / carried
        speeds.append((adam if rule == "adam" else carried**-2) / count)
    return speeds


def _sides(spec: TTSpec, k: int) -> tuple[int, int]:
    """How many entries core k takes and gives, at each value of the indices that pass it by.

    x meets the last core first. What passes by core k are rows that a later core has given, and
    columns that an earlier core will take.
    """
    before = {axis for axes in spec.cores[:k] for axis in axes}
    after = {axis for axes in spec.cores[k + 1 :] for axis in axes}
    passing = ({*spec.rows} & after) | ({*spec.columns} & before)
    taken = {*spec.columns, f"r{k + 1}"} - passing
    given = {*spec.rows, f"r{k}"} - passing
    axes = spec.cores[k]
    a, b = (math.prod(spec.size[x] for x in axes if x in side) for side in (taken, given))
    return a, b
