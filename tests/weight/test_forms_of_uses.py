"""Low rank that stores no identity, in every way in which a model uses a weight."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import tensorize
from tensorize.formats.format import Chain
from tensorize.weight.install import factored
from tests.models import parameters, relative

OFFSETS = torch.tensor([3, 3, 9, 16], dtype=torch.int32)


class Own(nn.Module):
    """A parameter, and a function of it and of the input."""

    def __init__(self, shape: tuple[int, ...], use: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.use = nn.Parameter(torch.randn(shape) / shape[-1] ** 0.5), use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(x, self.weight)


class Owners(nn.Module):
    """One weight of two linears, a head that is a table, and one of which parts are used."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(30, 16), nn.Linear(16, 30, bias=False)
        self.one, self.two = nn.Linear(16, 16), nn.Linear(16, 16)
        self.packed = nn.Parameter(torch.randn(48, 16) / 4)
        self.head.weight, self.two.weight = self.table.weight, self.one.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        q, k, v = (F.linear(x, part) for part in self.packed.chunk(3))
        return self.head(self.two(torch.relu(self.one(q * k + v))))


class Attention(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x, x, need_weights=False)[0]


class Recurrent(nn.LSTM):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)[0]


def loop(x: Tensor, w: Tensor) -> Tensor:
    return torch.cat([F.linear(x, w[e]) for e in range(4)], dim=-1)


def several(x: Tensor, w: Tensor) -> Tensor:
    chosen = torch.tensor([2, 0, 2])
    return torch.bmm(w[chosen], x[:3].unsqueeze(-1)).squeeze(-1)


ROWS, IDS, IMAGE = (16, 16), (3, 5), (2, 8, 9, 7)
# name: a model, the shape of its input, the rank, and whether its factors are what multiplies.
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, bool]] = {
    "owners": (Owners, IDS, 7, True),
    "Conv1D": (lambda: nn.Sequential(Conv1D(24, 16)), ROWS, 9, True),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(8, 12, 3, stride=2)), (2, 8, 11), 5, True),
    "conv2d": (lambda: nn.Sequential(nn.Conv2d(8, 12, 3, padding="same")), IMAGE, 7, True),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(3, 8, 2)), (1, 3, 4, 4, 4), 5, True),
    "of size 1": (lambda: nn.Sequential(nn.Conv2d(8, 12, 1)), IMAGE, 5, True),
    "groups": (lambda: nn.Sequential(nn.Conv2d(8, 12, 3, groups=2)), IMAGE, 4, True),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(8, 6, 3, 2)), IMAGE, 5, True),
    "sum of a bag": (lambda: nn.EmbeddingBag(30, 16, mode="sum"), IDS, 7, True),
    "mean of a bag": (lambda: nn.EmbeddingBag(30, 16, padding_idx=0), IDS, 7, True),
    "attention": (lambda: Attention(16, 2, batch_first=True), (2, 5, 16), 7, True),
    "recurrent": (lambda: Recurrent(16, 12, batch_first=True), (2, 5, 16), 7, False),
    "heads": (
        lambda: Own((2, 6, 16), lambda x, w: torch.einsum("bn,hdn->bhd", x, w)),
        ROWS,
        5,
        True,
    ),
    "stack": (lambda: Own((4, 12, 16), lambda x, w: x @ w.mT), (4, 16, 16), 5, True),
    "stack, turned": (lambda: Own((4, 16, 12), torch.matmul), (4, 16, 16), 5, True),
    "stack of one x": (lambda: Own((4, 12, 16), lambda x, w: x @ w.mT), (2, 1, 5, 16), 5, True),
    "each expert": (lambda: Own((4, 12, 16), loop), ROWS, 5, True),
    "several experts": (lambda: Own((4, 12, 16), several), ROWS, 5, True),
    "grouped": (
        lambda: Own((4, 12, 16), lambda x, w: F.grouped_mm(x, w.mT, offs=OFFSETS)),
        ROWS,
        5,
        True,
    ),
    "grouped, even": (
        lambda: Own((4, 12, 16), lambda x, w: F.grouped_mm(x, w.mT, offs=OFFSETS)),
        ROWS,
        8,
        True,
    ),
    "grouped, turned": (
        lambda: Own((4, 16, 12), lambda x, w: F.grouped_mm(x, w, offs=OFFSETS)),
        ROWS,
        5,
        True,
    ),
}


def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    return CASES[name][0]().eval()


def input_of(name: str) -> Tensor:
    torch.manual_seed(1)
    shape = CASES[name][1]
    return torch.randint(0, 30, shape) if shape == IDS else torch.randn(shape)


def plain(name: str) -> nn.Module:
    """A model that stores both factors of its weights whole."""
    model, rank = model_of(name), CASES[name][2]
    ranks = {name: rank for name, p in model.named_parameters() if p.dim() > 1}
    how = {"ranks": ranks, "metric": "frobenius", "example_inputs": (input_of(name),)}
    return tensorize.weight.plain(tensorize.compile(model, None, **how))


def pivoted(name: str) -> nn.Module:
    return tensorize.weight.pivoted(plain(name))


def check_gradients(small: nn.Module, whole: nn.Module) -> None:
    """Those of what is stored are those of the same factors with the identity in its place."""
    others = dict(factored(whole))
    for name, weight in factored(small):
        (order,), (rank,) = weight.indices, weight.spec.ranks
        left, right = (core.grad for core in others[name].cores)
        assert left is not None
        assert right is not None
        rest = torch.take_along_dim(right, order.long().unsqueeze(-2), dim=-1)[..., rank:]
        for core, wanted in zip(weight.cores, (left, rest), strict=True):
            assert core.grad is not None
            assert relative(core.grad, wanted) < 1e-4


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_same_model_with_fewer_numbers(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, x = plain(name), input_of(name)
    known, before = small(x).detach(), parameters(small)
    tensorize.weight.pivoted(small)
    found = dict(factored(small))
    sites = tensorize.report(small).sites
    assert found
    for site in sites:
        weight = found[site.name]
        (*stack, m, n), (rank,) = weight.spec.shape, weight.spec.ranks
        assert weight.spec.pivoted
        assert site.parameters_after == (stack or [1])[0] * rank * (m + n - rank)
    assert parameters(small) == tensorize.report(small).totals.after.parameters < before
    with torch.no_grad():
        wanted = tensorize.densify(small)(x)
        if CASES[name][3]:
            monkeypatch.setattr(Chain, "reconstruct", None)
        assert relative(small(x), wanted) < 1e-5
        assert relative(small(x), known) < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_plain_factors_of_the_same_basis(name: str) -> None:
    small, x = pivoted(name), input_of(name)
    whole = tensorize.weight.plain(copy.deepcopy(small))
    for model in (small, whole):
        model(x).square().sum().backward()
    check_gradients(small, whole)


@pytest.mark.parametrize("name", CASES)
def test_it_is_saved_and_loaded(name: str, tmp_path: Path) -> None:
    small, x = pivoted(name), input_of(name)
    tensorize.save(small, tmp_path)
    again = tensorize.load(tmp_path, model=model_of(name))
    assert {n: w.spec for n, w in factored(again)} == {n: w.spec for n, w in factored(small)}
    assert torch.equal(again(x), small(x))


@pytest.mark.parametrize("name", ["groups", "mean of a bag", "stack, turned", "grouped"])
def test_graphs_of_it_are_whole(name: str) -> None:
    small, x = pivoted(name), input_of(name)
    torch._dynamo.reset()
    graph = torch.compile(small, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert relative(graph(x), small(x)) < 1e-6


def test_what_has_a_function_between_its_factors_is_no_matrix_and_stays_plain() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    small = tensorize.initialize(model, 0.5, nonlinearity="silu")
    before = {name: weight.spec for name, weight in factored(small)}
    assert before
    tensorize.weight.pivoted(small)
    assert {name: weight.spec for name, weight in factored(small)} == before


SIZES = {
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2, "head_dim": 8},
}
EXPERTS: dict[str, Callable[[], Any]] = {
    "Mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**SIZES, num_local_experts=4)),
    "Qwen": lambda: hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(**SIZES, num_experts=4, moe_intermediate_size=24)
    ),
    "gpt-oss": lambda: hf.GptOssForCausalLM(hf.GptOssConfig(**SIZES, num_local_experts=4)),
}
FORWARDS = ("eager", "grouped_mm", "batched_mm")
TOKENS = torch.arange(14).reshape(2, 7)


def experts_of(name: str) -> Any:
    """A model of transformers whose experts store no identity."""
    torch.manual_seed(0)
    low = tensorize.compile(
        EXPERTS[name]().eval(), None, ranks={"*experts*": 5}, example_inputs=(TOKENS,)
    )
    return tensorize.weight.pivoted(low)


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_of_transformers_run_in_every_way_they_can(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = experts_of(name)
    dense: Any = tensorize.densify(small)
    weights = [weight.spec for _, weight in factored(small)]
    assert [(spec.pivoted, spec.shape[0]) for spec in weights] == [(True, 4)] * 2
    wanted = dense(TOKENS).logits.detach()
    monkeypatch.setattr(Chain, "reconstruct", None)
    for forward in FORWARDS:
        small.set_experts_implementation(forward)
        assert relative(small(TOKENS).logits.detach(), wanted) < 1e-5


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_of_transformers_are_trained_the_same_in_every_way(name: str) -> None:
    small = experts_of(name)
    whole: Any = tensorize.weight.plain(copy.deepcopy(small))
    whole(TOKENS).logits.square().sum().backward()
    for forward in FORWARDS:
        small.set_experts_implementation(forward)
        small.zero_grad()
        small(TOKENS).logits.square().sum().backward()
        check_gradients(small, whole)
