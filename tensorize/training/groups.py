"""Parameter groups whose learning rates make cores learn as fast as the dense weight would.

A step of Adam moves every entry by about its learning rate against the sign of its gradient, so to
first order it lowers the loss by lr ‖∇‖₁. With one sample or many, the gradient of core k is that
of W contracted with the other cores, over all indices that core k has not:

    rms(∇_k)² = rms(∇_W)² · Π_{i ∉ I_k} size_i · Π_{j≠k} σ_j²

for independent cores with entries of root mean square σ_j. Each of d cores is to lower the loss by
a d-th of what the dense weight with MN entries would: lr_k N_k rms(∇_k) = lr MN rms(∇_W) / d, so

    lr_k = lr · MN / (d N_k √(Π_{i ∉ I_k} size_i · Π_{j≠k} σ_j²)).

The relative step lr_k / σ_k then does not depend on how the scale of W is split among the cores;
for low rank at the scale of a layer of n inputs it is √(n/r)/2 times the dense one. SGD lowers
the loss by lr ‖∇‖₂², and the same argument gives lr_k = lr · MN / (d N_k rms(∇_k)²/rms(∇_W)²). That
is maximal update parametrisation (Yang & Hu 2021) for a weight made of cores. Decoupled weight
decay shrinks W by Σ_k lr_k wd_k a step, so wd_k = wd · lr / (d lr_k).
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

from torch import nn

from tensorize.errors import TensorizeError
from tensorize.passes.initialize import core_scales, root_mean_square
from tensorize.weight import FactoredWeight, factored

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
        raise TensorizeError(f"lr must be > 0 and weight_decay >= 0, got {lr} and {weight_decay}")
    if rule not in RULES:
        raise TensorizeError(f"rule={rule!r} is not one of {', '.join(map(repr, RULES))}")
    speeds = core_speeds(model, rule)
    groups: dict[tuple[str, float, float], list[nn.Parameter]] = defaultdict(list)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if (found := speeds.get(id(parameter))) is not None:
            speed, cores = found
            key = "cores", lr * speed, weight_decay / (cores * speed)
        elif parameter.dim() >= 2:
            key = "dense", lr, weight_decay
        else:
            key = "vectors", lr, 0.0
        groups[key].append(parameter)
    if not groups:
        raise TensorizeError("no parameter of the model needs a gradient")
    return [
        {"params": parameters, "lr": rate, "weight_decay": decay, "name": name}
        for (name, rate, decay), parameters in sorted(groups.items(), key=lambda group: group[0])
    ]


def core_speeds(model: nn.Module, rule: str = "adam") -> dict[int, tuple[float, int]]:
    """By the id of every core: its learning rate over the dense one, and how many cores there are.

    Rounded to two digits, so that weights of one shape are in one group.
    """
    speeds: dict[int, tuple[float, int]] = {}
    for _, weight in factored(model):
        for core, speed in zip(weight.cores, _speeds(weight, rule), strict=True):
            speeds.setdefault(id(core), (float(f"{speed:.2g}"), len(weight.cores)))
    return speeds


def _speeds(weight: FactoredWeight, rule: str) -> list[float]:
    spec = weight.spec.single
    scales = [root_mean_square(core.detach()) for core in weight.cores]
    if 0.0 in scales:  # a weight that starts at zero: as if it started at the usual scale
        usual = core_scales(spec, 1 / math.sqrt(spec.shape[-1]))
        scales = [own or other for own, other in zip(scales, usual, strict=True)]
    dense, count = math.prod(spec.shape), len(spec.cores)
    speeds = []
    for k, axes in enumerate(spec.cores):
        summed = math.prod(size for name, size in spec.size.items() if name not in axes)
        others = math.prod(scale for j, scale in enumerate(scales) if j != k)
        growth = math.sqrt(summed) * others
        entries = math.prod(spec.core_shapes[k])
        speeds.append(dense / (count * entries * (growth if rule == "adam" else growth**2)))
    return speeds
