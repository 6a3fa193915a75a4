"""Architectures of torch and transformers are factorized, and keep their ways to compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tensorize
from tensorize.formats.format import Chain
from tests.api.operations import operations
from tests.models import CASES, relative


@pytest.mark.parametrize("name", CASES)
def test_no_architecture_builds_a_weight(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    small = tensorize.compile(case.model(), None, ranks={"*": 4}, example_inputs=case.batch())
    want = case.output(tensorize.densify(small))
    monkeypatch.setattr(Chain, "reconstruct", None)
    assert relative(case.output(small), want) < 1e-5


@pytest.mark.parametrize("separate", [False, True], ids=["packed", "separate"])
@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
def test_multi_head_attention(separate: bool, cross: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            widths = {"kdim": 24, "vdim": 40} if separate else {}
            self.attention = nn.MultiheadAttention(32, 4, batch_first=True, **widths)

        def forward(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self.attention(x, k, v)[0]

    model = Attends().eval()
    x = torch.randn(2, 7, 32)
    k, v = (torch.randn(2, 7, w) for w in (24, 40)) if separate else (x, x)
    if cross and not separate:
        k = v = torch.randn(2, 5, 32)
    small = tensorize.compile(model, budget=0.5, example_inputs=(x, k, v), formats="low_rank")
    sites = tensorize.report(small).sites
    assert {site.format for site in sites} == {"low_rank"}
    with torch.no_grad():
        want = tensorize.densify(small)(x, k, v)
        monkeypatch.setattr(Chain, "reconstruct", None)
        assert relative(small(x, k, v), want) < 1e-5


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layers", [1, 2])
def test_transformer_encoder_and_its_fast_path(
    layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.TransformerEncoder(layer, layers).eval()
    x = torch.randn(2, 7, 32)
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[1, 5:] = True
    small = tensorize.compile(
        model, budget=0.5, calibration=[x, torch.randn(2, 7, 32)], formats="low_rank"
    )
    assert {site.format for site in tensorize.report(small).sites} == {"low_rank"}
    dense, fast = tensorize.densify(small), "_transformer_encoder_layer_fwd"
    with torch.no_grad():
        want, masked = dense(x), dense(x, src_key_padding_mask=padding)[~padding]
        assert fast in operations(lambda: dense(x))  # one kernel, that wants dense weights
        monkeypatch.setattr(Chain, "reconstruct", None)
        assert fast not in operations(lambda: small(x))
        assert relative(small(x), want) < 1e-5
        assert relative(small(x, src_key_padding_mask=padding)[~padding], masked) < 1e-5


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_every_implementation_of_experts_runs_on_factors(
    implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES["mixtral"]
    model: Any = case.model()
    model.set_experts_implementation(implementation)
    small: Any = tensorize.compile(model, None, ranks={"*": 4}, example_inputs=case.batch())
    experts = [site for site in tensorize.report(small).sites if "experts" in site.name]
    assert [site.format for site in experts] == ["low_rank"] * 4
    dense: Any = tensorize.densify(small)
    for other in ("eager", "grouped_mm", "batched_mm"):  # generate() changes it to decode
        small.set_experts_implementation(other)
        dense.set_experts_implementation(other)
        with monkeypatch.context() as patch:
            want = case.output(dense)
            patch.setattr(Chain, "reconstruct", None)
            assert relative(case.output(small), want) < 1e-5


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a .functools.lru_cache")
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@pytest.mark.slow
def test_experts_are_one_graph(implementation: str, dtype: torch.dtype) -> None:
    case = CASES["mixtral"]
    small: Any = tensorize.compile(
        case.model().to(dtype), None, ranks={"*": 4}, example_inputs=case.batch()
    )
    small.set_experts_implementation(implementation)
    torch._dynamo.reset()
    compiled = torch.compile(small, backend="eager", fullgraph=True, dynamic=True)
    assert relative(case.output(compiled), case.output(small)) < 4 * torch.finfo(dtype).eps


def test_what_transformers_does_where_there_is_no_grouped_mm(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers.integrations import moe

    monkeypatch.setattr(moe, "_can_use_grouped_mm", lambda *_: False)
    case = CASES["mixtral"]
    small = tensorize.compile(case.model(), None, ranks={"*": 4}, example_inputs=case.batch())
    kinds = {s.kind: s.format for s in tensorize.report(small).sites if "experts" in s.name}
    assert kinds == {"grouped_mm": "low_rank"}
    want = case.output(tensorize.densify(small))
    monkeypatch.setattr(Chain, "reconstruct", None)
    assert relative(case.output(small), want) < 1e-5


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("offsets", [False, True])
def test_embedding_bag(mode: str, offsets: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.EmbeddingBag(64, 24, mode=mode, padding_idx=0)
    ids = torch.randint(0, 64, (30,) if offsets else (5, 6))
    inputs = (ids, torch.tensor([0, 4, 19])) if offsets else (ids,)
    small = tensorize.compile(model, budget=0.5, calibration=[inputs] * 2)
    (site,) = tensorize.report(small).sites
    assert site.format == "low_rank"
    want = tensorize.densify(small)(*inputs)
    monkeypatch.setattr(Chain, "reconstruct", None)
    assert relative(small(*inputs).detach(), want.detach()) < 1e-5


def test_a_lookup_and_a_head_of_one_table_in_a_train(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(64, 36)

        def forward(self, ids: Tensor) -> Tensor:
            return F.linear(self.table(ids), self.table.weight)

    model, ids = Tied(), torch.randint(0, 64, (3, 5))
    small = tensorize.compile(model, budget=0.5, formats="tt", calibration=[ids] * 4)
    (site,) = tensorize.report(small).sites
    assert site.format == "tt"
    want = tensorize.densify(small)(ids)
    monkeypatch.setattr(Chain, "reconstruct", None)
    assert relative(small(ids).detach(), want.detach()) < 1e-5
