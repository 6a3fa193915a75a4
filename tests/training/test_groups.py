"""Learning rates of cores: each moves the weight by its share of what the dense step would."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tensorize
from examples.gpt import GPT, GPTConfig
from tensorize import TTSpec
from tensorize.training.groups import parameter_groups
from tensorize.weight.install import factored
from tests.weight.quantized_models import Form, small_net

SPECS = (
    TTSpec.low_rank(96, 64, 16),
    TTSpec.block((24, 4), (4, 16), 8),
    TTSpec((8, 12), (8, 8), (12,)),
    TTSpec((4, 4, 6), (4, 4, 4), (8, 8)),
)
PIVOTED = tuple(
    TTSpec.low_rank(*sizes, pivoted=True) for sizes in ((96, 64, 16), (64, 96, 40), (64, 64, 60))
) + tuple(spec.in_order_of(1) for spec in SPECS[1:])


def layer(spec: TTSpec) -> tuple[nn.Linear, nn.Module]:
    torch.manual_seed(0)
    dense = nn.Linear(spec.shape[1], spec.shape[0], bias=False)
    nn.init.normal_(dense.weight, std=0.1)
    return dense, tensorize.initialize(nn.Sequential(dense), 1.0, formats=spec)


@pytest.mark.parametrize("rule", ["adam", "sgd"])
@pytest.mark.parametrize("spec", SPECS + PIVOTED, ids=str)
def test_a_step_of_each_core_moves_the_weight_by_its_share(spec: TTSpec, rule: str) -> None:
    """In the spectral norm, against the dense step for the same gradient of the outputs."""
    dense, small = layer(spec)
    (_, weight), *_ = factored(small)
    groups = parameter_groups(small, 1.0, rule=rule)
    speeds = {id(p): group["lr"] for group in groups for p in group["params"]}
    count, cores = len(weight.cores), [core.detach() for core in weight.cores]
    x, g = torch.randn(1, spec.shape[1]), torch.randn(1, spec.shape[0])

    def moved(gradient: Tensor) -> Tensor:
        return gradient.sign() if rule == "adam" else gradient

    (whole,) = torch.autograd.grad(dense(x), dense.weight, g)
    size = float(torch.linalg.matrix_norm(moved(whole), 2))
    before = weight.dense().detach()
    for k, part in enumerate(torch.autograd.grad(small(x), weight.cores, g)):
        change = list(cores)
        change[k] = cores[k] + 1e-3 * speeds[id(weight.cores[k])] * moved(part)
        delta = (weight.with_cores(tuple(change)).dense() - before) / 1e-3
        wanted = size
        if spec.pivoted and k > 0:  # it reaches the columns that are not kept
            rank, width = spec.ranks[k - 1], spec.widths[k - 1]
            others = moved(whole)[:, weight.indices[0][rank:]]
            low_rank = spec.format == "low_rank"
            wanted = float(torch.linalg.matrix_norm(others, 2)) if low_rank else size
            wanted *= 1.0 if low_rank else math.sqrt(1 - rank / width)
        ratio = count * float(torch.linalg.matrix_norm(delta, 2)) / wanted
        assert (0.1 if rule == "adam" else 0.01) < ratio <= 1.25  # a bound, and not far above


@pytest.mark.parametrize("form", [("int8", 0, False), ("int4", 0, False), ("int8", 7, False)])
def test_a_step_of_scales_moves_the_numbers_as_far_as_one_of_theirs(form: Form) -> None:
    small = small_net(form)
    weight = dict(factored(small))["up.weight"]
    groups = parameter_groups(small, 1.0, 0.1)
    rates = {
        id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]
    }
    held = weight.cores + weight.indices
    numbers = [core.detach() for core in weight.format.inside(weight.spec, held)]
    own: list[float] = [1.0]
    if form[1]:
        spec = TTSpec.low_rank(40, 24, 7)
        plain = tensorize.initialize(nn.Sequential(nn.Linear(24, 40)), 1.0, formats=spec)
        ((_, cores),) = factored(plain)
        with torch.no_grad():
            for core, values in zip(cores.cores, numbers, strict=True):
                core.copy_(values)
        speeds = {id(p): g["lr"] for g in parameter_groups(plain, 1.0) for p in g["params"]}
        own = [speeds[id(core)] for core in cores.cores]
    for k, scale in enumerate(weight.cores):
        lr, decay = rates[id(scale)]
        changed = (*weight.cores[:k], scale.detach() + lr, *weight.cores[k + 1 :])
        moved = weight.format.inside(weight.spec, changed + weight.indices)[k].detach() - numbers[k]
        assert float(moved.square().mean().sqrt()) == pytest.approx(own[k], rel=0.25)
        assert lr * decay == pytest.approx(0.1 / len(weight.cores), rel=0.1)


@pytest.mark.parametrize("spec", SPECS + PIVOTED, ids=str)
def test_decay_of_the_cores_is_decay_of_their_weight(spec: TTSpec) -> None:
    _, small = layer(spec)
    (_, weight), *_ = factored(small)
    before = weight.dense().detach()
    with torch.no_grad():
        for group in parameter_groups(small, 1e-2, 0.1):
            for parameter in group["params"]:
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
    torch.testing.assert_close(weight.dense().detach(), (1 - 1e-2 * 0.1) * before)


def test_every_parameter_is_in_one_group_and_vectors_do_not_decay() -> None:
    small = tensorize.initialize(GPT(GPTConfig(layers=2)), 0.4, exclude="*embedding*")
    small.get_parameter("norm.weight").requires_grad_(False)
    groups = parameter_groups(small, 1e-3, 0.1)
    ids = [id(p) for group in groups for p in group["params"]]
    assert sorted(ids) == sorted({id(p) for p in small.parameters() if p.requires_grad})
    by_name: dict[str, list[Any]] = {}
    for group in groups:
        by_name.setdefault(group["name"], []).append(group)
    assert by_name.keys() == {"cores", "dense", "vectors"}
    (vectors,) = by_name["vectors"]
    assert vectors["weight_decay"] == 0.0
    assert all(p.dim() == 1 for p in vectors["params"])
    (dense,) = by_name["dense"]
    assert (dense["lr"], dense["weight_decay"]) == (1e-3, 0.1)
    torch.optim.AdamW(groups)
    torch.optim.SGD(groups)


def test_a_dense_model_has_plain_groups() -> None:
    groups = parameter_groups(nn.Sequential(nn.Linear(4, 4)), 1e-3, 0.1)
    assert [(g["name"], g["lr"], g["weight_decay"]) for g in groups] == [
        ("dense", 1e-3, 0.1),
        ("vectors", 1e-3, 0.0),
    ]


def test_the_relative_step_does_not_depend_on_how_the_scale_is_split() -> None:
    _, small = layer(SPECS[0])
    (_, weight), *_ = factored(small)

    def relative() -> list[float]:
        rates = {id(p): g["lr"] for g in parameter_groups(small, 1.0) for p in g["params"]}
        return [rates[id(core)] / float(core.detach().std()) for core in weight.cores]

    before = relative()
    with torch.no_grad():
        weight.cores[0].mul_(10)
        weight.cores[1].div_(10)
    assert relative() == pytest.approx(before, rel=0.02)


@pytest.mark.parametrize("lr", [1e-3, 4e-3])
def test_at_one_rate_low_rank_learns_alike_with_and_without_an_identity(lr: float) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(128, (64, 33), generator=generator).cumsum(1) % 128
    data = [rows[torch.randint(64, (8,), generator=generator)] for _ in range(40)]
    torch.manual_seed(0)
    dense = GPT(GPTConfig(layers=2, width=64, heads=4, vocabulary=128, context=32))
    reached = []
    for pivoted in (False, True):
        how = {"ranks": {"*": 16}, "exclude": "*embedding*", "pivoted": pivoted}
        small = tensorize.initialize(dense, None, **how)
        optimizer = torch.optim.AdamW(parameter_groups(small, lr, 0.1))
        losses = []
        for ids in data:
            optimizer.zero_grad()
            loss = F.cross_entropy(small(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        reached.append(sum(losses[-10:]) / 10)
    assert reached[1] == pytest.approx(reached[0], rel=0.02)


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        ({"lr": 0.0}, "lr must be > 0"),
        ({"lr": math.nan}, "lr must be > 0"),
        ({"lr": 1e-3, "weight_decay": -1}, "weight_decay"),
        ({"lr": 1e-3, "rule": "newton"}, "is not one of"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], cause: str) -> None:
    with pytest.raises(tensorize.TensorizeError, match=cause):
        parameter_groups(nn.Linear(2, 2), **arguments)


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(tensorize.TensorizeError, match="needs a gradient"):
        parameter_groups(nn.Linear(2, 2).requires_grad_(False), 1e-3)
