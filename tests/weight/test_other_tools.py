"""What other tools make of a compressed model: graphs, quantized layers, TorchScript."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import tensorize
from tests.models import relative

IDS = torch.randint(0, 100, (2, 16), generator=torch.Generator().manual_seed(1))


class Mixed(nn.Module):
    """A table, linears, a weight used by functions, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.a, self.b = nn.Embedding(100, 64), nn.Linear(64, 64), nn.Linear(64, 64)
        self.w = nn.Parameter(torch.randn(64, 64) / 8)
        self.c = nn.Conv1d(64, 64, 3, padding=1)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.relu(self.a(self.e(ids)))
        x = self.b(F.linear(x, self.w) @ self.w.t())
        return self.c(x.transpose(1, 2))


def mixed(form: str) -> nn.Module:
    torch.manual_seed(0)
    formats = {**dict.fromkeys(("e*", "a*", "b*", "w"), form), "c*": "low_rank"}
    return tensorize.compile(
        Mixed().eval(), 0.5, example_inputs=(IDS,), metric="frobenius", formats=formats
    )


FORMS = pytest.mark.parametrize("form", ["low_rank", "block", "tt"])


@FORMS
def test_symbolic_trace_computes_the_same_and_trains(form: str) -> None:
    small = mixed(form)
    graph = fx.symbolic_trace(small)
    assert torch.equal(graph(IDS), small(IDS))
    assert torch.equal(graph(IDS[:1, :5]), small(IDS[:1, :5]))  # no size is fixed
    assert torch.equal(copy.deepcopy(graph)(IDS), small(IDS))
    graph(IDS).square().sum().backward()
    got = {name: p.grad for name, p in small.named_parameters()}
    small.zero_grad()
    small(IDS).square().sum().backward()
    assert got
    for name, p in small.named_parameters():
        assert got[name] is not None
        assert relative(got[name], p.grad) < 1e-4  # type: ignore[arg-type]


def test_a_graph_of_low_rank_has_two_linears_where_others_have_one() -> None:
    layers = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    small = tensorize.compile(layers, 0.5, metric="frobenius")
    graph = fx.symbolic_trace(small)
    linears = [n.target for n in graph.graph.nodes if n.op == "call_module"]
    assert linears == ["0.first", "0.second", "1", "2.first", "2.second"]
    with torch.no_grad():
        small[0].second.weight.zero_()  # the graph has the model's own factors
    assert torch.equal(graph(torch.ones(1, 64)), small(torch.ones(1, 64)))


@FORMS
def test_export_and_jit_trace(form: str) -> None:
    small = mixed(form)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        traced: Any = torch.jit.trace(small, IDS)
    for made in (torch.export.export(small, (IDS,)).module(), traced):
        assert torch.allclose(made(IDS), small(IDS), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@FORMS
def test_torchscript_is_refused_and_leaves_the_model(form: str) -> None:
    layers = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    small = tensorize.compile(layers, 0.5, metric="frobenius", formats=form)
    kinds, x = [type(m) for m in small.modules()], torch.randn(3, 64)
    with pytest.raises(tensorize.TensorizeError, match=r"torch\.jit\.script") as caught:
        torch.jit.script(small)
    assert [type(m) for m in small.modules()] == kinds
    for way in ("torch.jit.trace(model, inputs)", "torch.export.export(model, inputs)"):
        assert way in str(caught.value.way_out)
    assert torch.jit.trace(small, (x,))(x).shape == (3, 64)
    assert torch.export.export(small, (x,)).module()(x).shape == (3, 64)
    assert torch.jit.script(tensorize.densify(small))(x).shape == (3, 64)


# ------------------------------------------------------------------------------- quantized layers


def quantized(model: nn.Module) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao says that it moves to torchao
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def test_the_two_layers_are_quantized_as_any_other() -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 64)).eval()
    x = torch.randn(8, 64)
    small = tensorize.compile(layers, 0.5, metric="frobenius")
    result = quantized(small)
    assert "quantized" in type(result[0].first).__module__
    for compared in (x, x.unsqueeze(1)):
        error = (result(compared) - small(compared)).norm() / small(compared).norm()
        assert 0 < float(error.detach()) < 0.1
    text = str(tensorize.report(result))  # and a note: the parameters are others now
    assert text.startswith(str(tensorize.report(small)))
    for verb in (
        tensorize.densify,
        tensorize.kernels,
        lambda m: tensorize.save(m, "nowhere"),
        lambda m: tensorize.heal(m, layers, [x], steps=1),
    ):
        with pytest.raises(tensorize.TensorizeError, match=r"^0\.weight: .* no factors to read"):
            verb(result)
    tensorize.densify(small)  # the way out: the model from before


@pytest.mark.parametrize("form", ["block", "tt"])
def test_factors_that_are_no_layers_stay_as_they_are(form: str) -> None:
    layers = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).eval()
    small = tensorize.compile(
        layers, 0.7, metric="frobenius", formats={"0.*": form, "1.*": "dense"}
    )
    x = torch.randn(8, 64)
    assert torch.allclose(quantized(small)(x), small(x), atol=0.1)


def test_a_dense_model_with_some_quantized_layers() -> None:
    layers = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()
    layers[2] = quantized(nn.Sequential(layers[2]))[0]
    x = torch.randn(8, 64)
    small = tensorize.compile(layers, 0.6, example_inputs=(x,), metric="frobenius")
    assert [site.name for site in tensorize.report(small).sites] == ["0.weight"]
    assert torch.allclose(small(x), tensorize.densify(small)(x), atol=1e-2)
