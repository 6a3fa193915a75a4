"""torch.compile(model, backend="tensorize"): a lowering, and a preview for dense models."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import tensorize
from tensorize import backend as tensorize_backend
from tensorize.backend.options import read_options
from tensorize.backend.preview import _made
from tensorize.weight.install import factored
from tests.backend.lowered_models import Attention, X, compressed
from tests.marks import slow, slow_but
from tests.models import CASES, relative


def test_the_backend_is_found_by_its_entry_point() -> None:
    assert "tensorize" in torch._dynamo.list_backends()


MODELS = ["mlp", "gpt", "llama", "gpt2", "bert", "vit", "t5", "mixtral"]
FAST = {("mlp", "eager"), ("gpt", "eager"), ("gpt2", "eager"), ("llama", "auto")}


@pytest.mark.parametrize(
    ("name", "inner"),
    [
        (name, inner) if (name, inner) in FAST else slow(name, inner)
        for name in MODELS
        for inner in ("eager", "auto")
    ],
)
def test_a_compressed_model_computes_the_same(name: str, inner: str) -> None:
    case = CASES[name]
    small = tensorize.compile(case.model(), budget=0.4, example_inputs=case.batch())
    lowered = torch.compile(small, backend="tensorize", options={"inner": inner})
    assert relative(case.output(lowered), case.output(small)) < 1e-5


@pytest.mark.parametrize("name", slow_but(("mlp", "gpt", "llama"), MODELS))
def test_a_dense_model_is_previewed_with_the_numbers_of_compile(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    case = CASES[name]
    model = case.model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    small = tensorize.compile(model, budget=0.4, example_inputs=case.batch())
    with caplog.at_level(logging.WARNING, logger="tensorize"):
        preview = torch.compile(model, backend="tensorize", options={"budget": 0.4})
        assert relative(case.output(preview), case.output(small)) < 1e-5
        case.output(preview)
    told = [record for record in caplog.records if "dense weights stay" in record.message]
    assert len(told) == 1
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_lowered_model_learns_as_the_model_itself_does() -> None:
    model, alone = compressed().train(), compressed().train()
    alone.load_state_dict(model.state_dict())
    lowered = torch.compile(model, backend="tensorize")
    losses = []
    for run, module in ((lowered, model), (alone, alone)):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        losses.append([])
        for _ in range(5):
            optimizer.zero_grad()
            loss = (run(X) - 1).square().mean()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < 0.9 * losses[0][0]
    with torch.no_grad():  # and what it learned is what inference sees
        assert relative(lowered(X), model(X)) < 1e-5


def compiles(model: nn.Module, small: nn.Module, **options: Any) -> int:
    """How often dynamo calls the backend over many sizes; the outputs are those of ``small``."""
    count = 0

    def counted(graph: fx.GraphModule, inputs: list) -> object:
        nonlocal count
        count += 1
        return tensorize_backend.tensorize(graph, inputs, options=options)

    compiled = torch.compile(model, backend=counted, dynamic=True)
    with torch.no_grad():
        for rows in (1, 2, 3, 5, 16, 17, 64, 256, 300):
            x = torch.randn(1, rows, 32)
            assert relative(compiled(x), small(x)) < 1e-5
    return count


def test_dynamic_shapes_compile_at_most_three_times() -> None:
    small = compressed()
    assert compiles(small, small) <= 3


def test_a_preview_compiles_at_most_three_times_under_dynamic_shapes() -> None:
    model = Attention().eval()
    small = tensorize.compile(model, 0.5, example_inputs=(X,))
    assert compiles(model, small, budget=0.5) <= 3


def test_recompiles_of_a_preview_share_their_factors() -> None:
    model = Attention().eval()
    preview = torch.compile(model, backend="tensorize", options={"budget": 0.5}, dynamic=False)
    with torch.no_grad():
        preview(X)
        made = {id(c) for p in model.parameters() for c in _cores(p)}
        preview(torch.randn(2, 5, 32))
        assert made == {id(c) for p in model.parameters() for c in _cores(p)}
    assert made


def _cores(parameter: nn.Parameter) -> list[nn.Parameter]:
    found = _made.get(parameter) or {}
    return [core for factors in found.values() if factors for core in factors[1]]


def test_a_budget_on_a_compressed_model_is_told_and_not_used(
    caplog: pytest.LogCaptureFixture,
) -> None:
    small = compressed()
    with caplog.at_level(logging.WARNING, logger="tensorize"), torch.no_grad():
        lowered = torch.compile(small, backend="tensorize", options={"budget": 0.1})
        assert relative(lowered(X), small(X)) < 1e-5
    assert any("compressed already" in record.message for record in caplog.records)


def test_with_graph_breaks_it_says_what_it_sees(caplog: pytest.LogCaptureFixture) -> None:
    class Breaks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 32)
            self.norm = nn.LayerNorm(32)

        def forward(self, x: Tensor) -> Tensor:
            x = self.b(self.a(x))
            torch._dynamo.graph_break()
            x = self.c(x)
            torch._dynamo.graph_break()
            return self.norm(x)  # no weight to factorize, and no budget to meet

    model = Breaks().eval()
    with caplog.at_level(logging.WARNING, logger="tensorize"), torch.no_grad():
        preview = torch.compile(model, backend="tensorize", options={"budget": 0.5})
        got = preview(X)
    for seen in (2, 1):
        assert f"sees {seen} weights up to here (Call to `torch._dynamo.graph_break" in caplog.text
    parts, want = [nn.Sequential(model.a, model.b), nn.Sequential(model.c)], X
    with torch.no_grad():
        for part in parts:  # each graph by itself
            want = tensorize.compile(part, 0.5, example_inputs=(want,))(want)
        assert relative(got, model.norm(want)) < 1e-5


@pytest.mark.parametrize(
    ("options", "message"), [({"bugdet": 0.1}, "bugdet"), ({"inner": "tpu"}, "inner")]
)
def test_an_unknown_option_is_an_error_that_names_it(options: dict, message: str) -> None:
    with pytest.raises(tensorize.TensorizeError, match=message):
        read_options(options)


@pytest.mark.slow
def test_inductor_takes_what_is_left() -> None:
    small = compressed()
    lowered = torch.compile(small, backend="tensorize", options={"inner": "inductor"})
    with torch.no_grad():
        assert relative(lowered(X), small(X)) < 1e-5


def test_inductor_compiles_the_models_own_call(tmp_path: Path) -> None:
    """Its copies, its dense form and what is saved of it are plain modules."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64)).eval()
    x = torch.randn(5, 64)
    small = tensorize.compile(model, 0.4, metric="frobenius", backend="inductor")
    plain = tensorize.compile(model, 0.4, metric="frobenius", backend="aten")
    assert tensorize.report(small).backend == "inductor"
    with torch.no_grad():
        torch.testing.assert_close(small(x), plain(x))
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
        torch.testing.assert_close(copy.deepcopy(small)(x), plain(x))
        torch.testing.assert_close(tensorize.densify(small)(x), plain(x), atol=1e-5, rtol=1e-5)
        tensorize.save(small, tmp_path)
        again = tensorize.load(tmp_path, copy.deepcopy(model))
        assert tensorize.report(again).backend == "inductor"
        torch.testing.assert_close(again(x), plain(x))


def test_a_compiled_model_is_looked_at_as_what_it_was_made_of(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64)).eval()
    # Kernels take the plain form only.
    small = tensorize.weight.plain(tensorize.compile(model, 0.4, metric="frobenius"))
    wrapped: Any = torch.compile(small, backend="eager")
    assert tensorize.report(wrapped) == tensorize.report(small)
    assert tensorize.kernels(wrapped).keys() == tensorize.kernels(small).keys() != set()
    assert not list(factored(tensorize.densify(wrapped)))
    tensorize.save(wrapped, tmp_path)
    again = tensorize.load(tmp_path, copy.deepcopy(model))
    x = torch.randn(2, 64)
    torch.testing.assert_close(again(x), small(x))
