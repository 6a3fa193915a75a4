"""torch.compile(model, backend="tensorize"): a lowering, and a preview for dense models."""

from __future__ import annotations

import copy
import logging
import operator
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import tensorize
from tensorize import backend as tensorize_backend
from tensorize.backend import preview
from tensorize.backend.options import read_options
from tensorize.backend.preview import _made
from tensorize.passes.lowering.cleanup import RemoveDead, RemoveIdentities
from tensorize.passes.lowering.cpu_products import ChooseProducts
from tensorize.passes.lowering.graph import (
    Lowered,
    lower,
    memory_of,
    own_graph,
    written,
)
from tensorize.passes.lowering.group import GroupProjections
from tensorize.passes.lowering.packed import with_packed
from tensorize.weight.install import factored
from tensorize.weight.onednn import onednn_linear
from tests.models import CASES, relative


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch._dynamo.reset()
    monkeypatch.setattr(preview, "_told", False)
    yield
    torch._dynamo.reset()


class Attention(nn.Module):
    """Projections of one input, as q, k, v have them."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.q(x) * self.k(x) + self.v(x))


def compressed(width: int = 32, rank: int = 4) -> nn.Module:
    return tensorize.compile(Attention(width), None, ranks={"*": rank}, example_inputs=(X,)).eval()


X = torch.randn(1, 1, 32)
EAGER = {"inner": "eager"}


def lowered_and_run(model: nn.Module, x: Tensor, *passes: Any) -> tuple[Lowered, Any]:
    """What passes make of the graph that dynamo hands a backend, and what it computes then."""
    seen: list[Lowered] = []

    def through_passes(graph: fx.GraphModule, inputs: list) -> object:
        nodes = [node for node in graph.graph.nodes if node.op == "placeholder"]
        named = zip(nodes, inputs, strict=True)
        parameters = {n.name: v for n, v in named if isinstance(v, nn.Parameter)}
        seen.append(lower(Lowered(own_graph(graph), parameters), passes))
        return with_packed(seen[0].graph.forward, seen[0], [node.name for node in nodes])

    with torch.no_grad():
        result = torch.compile(model, backend=through_passes)(x)
    return seen[0], result


def traced(model: nn.Module, x: Tensor) -> Lowered:
    """The graph that dynamo hands a backend, and the parameters behind its placeholders."""
    return lowered_and_run(model, x)[0]


def calls(graph: fx.GraphModule) -> list[str]:
    """What a graph computes, a word a node."""
    words = []
    for node in graph.graph.nodes:
        if node.op in ("call_function", "call_method", "call_module"):
            words.append(node.target if isinstance(node.target, str) else node.target.__name__)
    return words


def test_the_backend_is_found_by_its_entry_point() -> None:
    assert "tensorize" in torch._dynamo.list_backends()


MODELS = ["mlp", "gpt", "llama", "gpt2", "bert", "vit", "t5", "mixtral"]
SLOW = [pytest.param(name, "auto", marks=pytest.mark.slow) for name in MODELS if name != "llama"]


@pytest.mark.parametrize(
    ("name", "inner"), [*[(name, "eager") for name in MODELS], ("llama", "auto"), *SLOW]
)
def test_a_compressed_model_computes_the_same(name: str, inner: str) -> None:
    case = CASES[name]
    small = tensorize.compile(case.model(), budget=0.4, example_inputs=case.batch())
    lowered = torch.compile(small, backend="tensorize", options={"inner": inner})
    assert relative(case.output(lowered), case.output(small)) < 1e-5


@pytest.mark.parametrize("name", MODELS)
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


def test_projections_of_one_token_become_two_calls() -> None:
    program = traced(compressed(), X)
    assert calls(program.graph).count("linear") == 8
    lowered = lower(program, (GroupProjections(), RemoveDead()))
    # q, k and v (first and second factors) are one call; the output projection is left.
    assert calls(lowered.graph) == [
        "reshape",
        "expand",
        "bmm",
        "baddbmm",
        "unbind",
        *["getitem", "reshape"] * 3,
        "mul",
        "add",
        "linear",
        "linear",
    ]


def test_grouping_does_not_fire_for_many_rows_or_unknown_ones() -> None:
    many = traced(compressed(), torch.randn(1, 7, 32))
    assert "bmm" not in calls(lower(many, (GroupProjections(),)).graph)
    assert "bmm" in calls(lower(many, (GroupProjections(most_rows=7),)).graph)


def test_grouping_does_not_fire_where_the_input_is_written_to() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            x = x + 1
            first = self.a(x)
            x.mul_(2)
            return first + self.b(x)

    model = Writes()
    lowered = torch.compile(model, backend="tensorize", options=EAGER)
    with torch.no_grad():
        assert relative(lowered(X), model(X)) < 1e-6
    program = lower(traced(model, X), (GroupProjections(),))
    assert "bmm" not in calls(program.graph)


@pytest.mark.parametrize("rows", [1, 64])
@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_copies_are_not_taken_while_training_and_training_is_the_same(
    rows: int, inner: str
) -> None:
    model, x = compressed().train(), torch.randn(1, rows, 32)
    lowered = torch.compile(model, backend="tensorize", options={"inner": inner})
    lowered(x).square().sum().backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model(x).square().sum().backward()
    assert all(relative(got[n], p.grad) < 1e-5 for n, p in model.named_parameters())


def test_a_lowered_model_learns_as_the_model_itself_does() -> None:
    model, alone = compressed().train(), compressed().train()
    alone.load_state_dict(model.state_dict())
    lowered = torch.compile(model, backend="tensorize")
    losses = []
    for run, module in ((lowered, model), (alone, alone)):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.3)
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


def test_packed_weights_follow_changes_in_place() -> None:
    model = compressed()
    lowered = torch.compile(model, backend="tensorize", options=EAGER)
    with torch.no_grad():
        lowered(X)
        for parameter in model.parameters():
            parameter.mul_(1.5)
        assert relative(lowered(X), model(X)) < 1e-5
        other = compressed()
        model.load_state_dict(other.state_dict())
        assert relative(lowered(X), other(X)) < 1e-5


@pytest.mark.parametrize("bias", ["none", "all", "some"])
@pytest.mark.parametrize("chained", [False, True])
def test_grouped_linears_are_the_linears(bias: str, chained: bool) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            has = {"none": (False,) * 3, "all": (True,) * 3, "some": (True, False, True)}[bias]
            ranks = (4, 4, 4) if chained else (3, 5, 7)
            self.first = nn.ModuleList(nn.Linear(32, r, b) for r, b in zip(ranks, has, strict=True))
            self.second = nn.ModuleList(nn.Linear(4, 24, b) for b in has)

        def forward(self, x: Tensor) -> list[Tensor]:
            if not chained:
                return [first(x) for first in self.first]
            pairs = zip(self.first, self.second, strict=True)
            return [second(first(x)) for first, second in pairs]

    model, x = Branches(), torch.randn(1, 2, 32)
    lowered, found = lowered_and_run(model, x, GroupProjections(most_rows=2), RemoveDead())
    assert "linear" not in calls(lowered.graph)
    for got, want in zip(found, model(x), strict=True):
        assert got.shape == want.shape
        assert relative(got, want.detach()) < 1e-6


@pytest.mark.parametrize("options", [EAGER, {}, {"budget": 0.4}])
def test_layers_that_are_compiled_one_by_one_keep_their_own_weights(options: dict) -> None:
    """Dynamo gives all of them one graph: they differ in nothing but their parameters."""
    torch.manual_seed(0)
    dense = nn.Sequential(*(Attention() for _ in range(3))).eval()
    whole = {"example_inputs": (X,), "metric": "frobenius"}
    want = nn.Sequential(*(tensorize.compile(layer, 0.4, **whole) for layer in dense)).eval()
    model = copy.deepcopy(dense if "budget" in options else want)
    lowered = nn.Sequential(
        *(torch.compile(layer, backend="tensorize", options=options) for layer in model)
    )
    with torch.no_grad():
        assert relative(lowered(X), want(X)) < 1e-5


def test_a_parameter_that_takes_the_place_of_another_is_what_runs() -> None:
    model = compressed()
    lowered = torch.compile(model, backend="tensorize")
    with torch.no_grad():
        lowered(X)
        for layer in (model.q, model.out):
            layer.second.weight = nn.Parameter(torch.randn(32, 4))
            assert relative(lowered(X), model(X)) < 1e-5


def test_products_are_chosen_by_their_rows() -> None:
    """oneDNN for many or unknown rows, a transposed copy of a tall weight for one."""
    model = compressed()

    def chosen(rows: int) -> list[str]:
        torch._dynamo.reset()  # else the rows are not known the second time
        return calls(lower(traced(model, torch.randn(1, rows, 32)), (ChooseProducts(),)).graph)

    assert chosen(64).count("onednn_linear.default") == 8
    assert chosen(8).count("linear") == 8
    assert chosen(1).count("t") == 4  # the second factors: 32 x 4


def test_products_are_not_changed_where_they_are_not_in_float32_or_not_of_parameters() -> None:
    half = lower(traced(compressed().to(torch.bfloat16), X.bfloat16()), (ChooseProducts(),))
    assert set(calls(half.graph)) == {"linear", "mul", "add"}

    class Computed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, x.flatten(0, 1) + 1)

    computed = lower(traced(Computed(), torch.randn(1, 64, 32)), (ChooseProducts(),))
    assert calls(computed.graph) == ["flatten", "add", "linear"]


def test_a_vector_is_no_matrix_of_a_linear() -> None:
    class Score(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.weight = nn.Linear(32, 16), nn.Parameter(torch.randn(16))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.layer(x), self.weight)

    model, x = Score(), torch.randn(64, 32)
    lowered = torch.compile(model, backend="tensorize", options={"inner": "eager"})
    with torch.no_grad():
        assert relative(lowered(x), model(x)) < 1e-5


def test_a_weight_that_is_used_twice_has_one_copy() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.narrow = nn.Linear(32, 96), nn.Linear(96, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.wide(self.narrow(self.wide(x)))

    model = Twice()
    program, found = lowered_and_run(model, X, ChooseProducts())
    assert calls(program.graph) == ["t", "linear", "linear", "t", "linear"]
    assert len(program.packed) == 1
    assert relative(found, model(X).detach()) < 1e-6


def test_weights_that_dispatch_for_themselves_are_left_alone() -> None:
    class Own(Tensor):
        """As a quantized weight, or a shard of one, is."""

    program = traced(compressed(), torch.randn(1, 64, 32))
    before = calls(program.graph)
    own = {k: v.as_subclass(Own) for k, v in program.parameters.items()}
    changed = lower(replace(program, parameters=own), (GroupProjections(64), ChooseProducts()))
    assert calls(changed.graph) == before


def test_products_are_not_changed_under_autocast() -> None:
    class Autocast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.small = compressed()

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return self.small(x)

    model, x = Autocast(), torch.randn(1, 64, 32)
    program, _ = lowered_and_run(model, x, ChooseProducts())
    assert calls(program.graph).count("linear") == 8
    lowered = torch.compile(model, backend="tensorize", options=EAGER)
    with torch.no_grad():
        assert torch.equal(lowered(x), model(x))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("out", "into"), [(8, 32), (32, 8)])
def test_the_product_by_onednn_is_a_linear_with_its_gradients(
    bias: bool, out: int, into: int
) -> None:
    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, requires_grad=True)

    arguments = (draw(2, 3, into), draw(out, into), draw(out) if bias else None)
    plain = [a if a is None else a.detach() for a in arguments]
    torch.library.opcheck(torch.ops.tensorize.onednn_linear.default, plain)
    onednn = onednn_linear
    got, want = onednn(*arguments), F.linear(*arguments)
    assert relative(got.detach(), want.detach()) < 1e-6
    given = [a for a in arguments if a is not None]
    g = torch.randn_like(got)
    for one, other in zip(*(torch.autograd.grad(y, given, g) for y in (got, want)), strict=True):
        assert relative(one, other) < 1e-6
    # Twice differentiable: the gradient of a gradient.
    squares = [
        torch.autograd.grad(f(*arguments), arguments[0], g, create_graph=True)[0].square().sum()
        for f in (onednn, F.linear)
    ]
    one, other = (torch.autograd.grad(square, arguments[1])[0] for square in squares)
    assert relative(one, other) < 1e-6


def test_unequal_shapes_are_grouped_apart() -> None:
    """Grouped-query attention: k and v are narrower than q."""
    case = CASES["llama"]
    small = tensorize.compile(
        case.model(), None, ranks={"*self_attn*": 4}, example_inputs=case.batch()
    )
    lowered = torch.compile(small, backend="tensorize", options=EAGER)
    with torch.no_grad():
        one = torch.randint(3, 128, (1, 1))
        got = lowered(input_ids=one, use_cache=False).logits
        assert relative(got, small(input_ids=one, use_cache=False).logits) < 1e-5


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


def test_cleanup_removes_dead_views_and_keeps_writes() -> None:
    def forward(x: Tensor) -> Tensor:
        x.transpose(0, 1).reshape(-1)  # dead
        x.view(-1).add_(1)  # dead to the graph, not to x
        return x * 2

    graph = fx.symbolic_trace(forward)
    cleaned = lower(Lowered(graph, {}), (RemoveDead(),)).graph
    assert calls(cleaned) == ["view", "add_", "mul"]


def test_identities_are_removed_and_nothing_that_computes() -> None:
    def forward(x: Tensor) -> Tensor:
        x = F.dropout(x + 1, 0.5, False).to(torch.float32).contiguous()
        x = F.dropout(input=x, training=False)
        y = F.dropout(x, 0.5, True)
        return y.t().contiguous().to(torch.float64)

    program = traced(forward, torch.randn(3, 4))  # type: ignore[arg-type]
    cleaned = lower(program, (RemoveIdentities(),)).graph
    assert calls(cleaned) == ["add", "dropout", "t", "contiguous", "to"]


def test_an_identity_that_is_written_to_stays() -> None:
    def forward(x: Tensor) -> Tensor:
        x = x + 1
        y = F.dropout(x, 0.5, False)
        y.view(-1).mul_(2)
        return x

    program = traced(forward, torch.randn(3, 4))  # type: ignore[arg-type]
    assert "dropout" in calls(lower(program, (RemoveIdentities(),)).graph)


def test_what_is_written_to_is_known_through_views() -> None:
    def forward(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        x, y, z, free = x + 1, y + 1, z + 1, x + 2
        x.view(-1)[1:].mul_(2)
        F.relu(y, inplace=True)
        z[0] = 1.0
        return torch.add(x, y, out=torch.empty_like(x)) + z + free

    seen: list[list[bool]] = []

    def keep(graph: fx.GraphModule, inputs: list) -> object:
        changed = written(graph.graph)
        added = [node for node in graph.graph.nodes if node.target is operator.add][:4]
        seen.append([memory_of(node) in changed for node in added])
        return graph.forward

    torch.compile(forward, backend=keep)(X[0], X[0] + 0, X[0] * 1)
    assert seen[0] == [True, True, True, False]


# --------------------------------------------------------------------------- the option of compile


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
    small = tensorize.compile(model, 0.4, metric="frobenius")
    wrapped: Any = torch.compile(small, backend="eager")
    assert tensorize.report(wrapped) == tensorize.report(small)
    assert tensorize.kernels(wrapped).keys() == tensorize.kernels(small).keys() != set()
    assert not list(factored(tensorize.densify(wrapped)))
    tensorize.save(wrapped, tmp_path)
    again = tensorize.load(tmp_path, copy.deepcopy(model))
    x = torch.randn(2, 64)
    torch.testing.assert_close(again(x), small(x))
