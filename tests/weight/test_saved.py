"""What is saved for the backward pass stays within a limit, in whole modules as well."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tensorize
from tensorize.codegen.aten import emit as aten
from tensorize.formats import interpret
from tensorize.ir.spec import TTSpec
from tensorize.weight.contractions import contractions
from tensorize.weight.cores import Cores
from tensorize.weight.low_rank import LowRankLinear
from tensorize.weight.whole_model import limit_saved
from tests.weight.contraction_cases import (
    SIDES,
    SPECS,
    close,
    draw_cores,
    draw_x,
    gradients,
    in_use,
)

# ------------------------------------------------------------------------------------ what is saved


def saved_by(run: Any, cores: Sequence[Tensor]) -> int:
    """Elements that autograd keeps for the backward pass, parameters left out; each memory once."""
    seen: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    own = {core.untyped_storage().data_ptr() for core in cores}
    return sum(t.untyped_storage().nbytes() // t.itemsize for k, t in seen.items() if k not in own)


@pytest.mark.parametrize("contract", SIDES)
@pytest.mark.parametrize("spec", [*SPECS[1:], TTSpec.low_rank(12, 20, 5)], ids=repr)
def test_a_limit_is_kept_wherever_it_can_be(spec: TTSpec, contract: str) -> None:
    cores, plain = draw_cores(spec), aten.build(in_use(spec, contract))
    for batch in (1, 7, 50):
        x = draw_x(spec, contract, (batch,))
        autograd = saved_by(functools.partial(plain, x, cores), cores)
        for limit in (0, x.numel(), autograd - 1, autograd, 10**9):
            limited = contractions(spec, memory_limit=limit)[contract]
            measured = saved_by(functools.partial(limited, x, cores), cores)
            assert measured <= max(limit, x.numel())
            assert measured == (autograd if limit >= autograd else x.numel())


@pytest.mark.parametrize("limit", [None, 0])
def test_frozen_cores_save_nothing_of_the_rows(limit: int | None) -> None:
    spec = TTSpec((8, 9), (10, 8), (3,))
    planned = contractions(spec, memory_limit=limit)["columns"]
    cores = [core.detach() for core in draw_cores(spec)]
    few, many = (draw_x(spec, "columns", (rows,)) for rows in (50, 60))
    saved = [saved_by(functools.partial(planned, x, cores), cores) for x in (few, many)]
    assert saved[0] == saved[1]
    (dx,) = gradients(planned(few, cores), (few,))
    close(dx, gradients(interpret.apply(spec, cores, few), (few,))[0])


# ------------------------------------------------------------------------------------ whole modules


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(48, 60), nn.Linear(60, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.gelu(self.first(x)))


def small(formats: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(6, 48)
    return tensorize.compile(Two(), 0.5, formats=formats, example_inputs=(x,)), x


def each_saved(model: nn.Module, x: Tensor) -> tuple[int, dict[str, Tensor]]:
    model.zero_grad()
    parameters = list(model.parameters())
    total = saved_by(lambda: model(x), parameters)
    model(x).square().sum().backward()
    return total, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("formats", ["low_rank", "pivoted", "tt", "block"])
def test_a_model_that_recomputes_saves_less_and_learns_the_same(formats: str) -> None:
    model, x = small("low_rank" if formats == "pivoted" else formats)
    if formats == "pivoted":
        tensorize.weight.pivoted(model)
    before, want = each_saved(model, x)
    limit_saved(model)
    after, got = each_saved(model, x)
    assert after < before
    assert got.keys() == want.keys()
    for name in want:
        close(got[name], want[name], 1e-5)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert each_saved(twin, x)[0] == after
    limit_saved(model, None)
    assert each_saved(model, x)[0] == before
    tensorize.densify(model)


def test_recomputing_is_compiled_too() -> None:
    torch._dynamo.reset()
    model, x = small("low_rank")
    limit_saved(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    close(compiled(x), model(x), 1e-5)


def each_module(model: nn.Module) -> Iterator[nn.Module]:
    return (m for m in model.modules() if isinstance(m, Cores | LowRankLinear))


def test_slices_of_a_packed_weight_ignore_the_limit() -> None:
    attention = nn.MultiheadAttention(24, 4, batch_first=True)
    x = torch.randn(2, 5, 24)
    model = tensorize.compile(
        attention, None, ranks={"*": 4}, formats="low_rank", example_inputs=(x, x, x)
    ).train()
    want = model(x, x, x)[0]
    limit_saved(model)
    assert list(each_module(model))
    close(model(x, x, x)[0], want, 1e-6)
