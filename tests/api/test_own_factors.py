"""A result computes with its own factors, whatever its forward is and whoever holds its weights."""

from __future__ import annotations

import copy
import functools
import pickle
import random
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import tensorize
from tensorize.base.errors import AnalysisError, TensorizeError

X = torch.randn(8, 24, generator=torch.Generator().manual_seed(1))
Weights = tuple[Tensor, Tensor, Tensor]
Oracle = Callable[[Tensor, Weights], Tensor]


class Net(nn.Module):
    """Two linears without biases, and one that no forward here calls but the class's own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Linear(24, 24, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).relu()))


def options(**more: Any) -> dict[str, Any]:
    return {"example_inputs": (X,), "metric": "frobenius", "progress": False, **more}


def formats(small: nn.Module) -> dict[str, str]:
    return {site.name[0]: site.format for site in tensorize.report(small).sites}


def weights(small: Any) -> Weights:
    """The matrices that the layers' own factors make, in float64."""
    return tuple((layer.weight + 0).detach().double() for layer in (small.a, small.b, small.c))


def then(x: Tensor, w: Weights) -> Tensor:
    return x @ w[0].T @ w[1].T


def relative(got: Tensor, want: Tensor) -> float:
    with torch.no_grad():
        return float((got.double() - want.double()).norm() / want.double().norm())


def own_forward(model: Any, forward: Callable[..., Tensor]) -> None:
    model.forward = forward.__get__(model)


# ------------------------------------------------------------------------------------- followed


def compiled(m: Any) -> Oracle:
    m.forward = torch.compile(m.forward, backend="eager")
    return lambda x, w: (x @ w[0].T).relu() @ w[1].T @ w[2].T


def compiled_layer(m: Any) -> Oracle:
    m.a.forward = torch.compile(m.a.forward, backend="eager")
    return lambda x, w: (x @ w[0].T).relu() @ w[1].T @ w[2].T


def partial(m: Any) -> Oracle:
    m.forward = functools.partial(lambda m, k, x: k * m.b(m.a(x)), m, 2.0)
    return lambda x, w: 2 * then(x, w)


def of_another_object(m: Any) -> Oracle:
    class Runner:
        def __init__(self, model: Any) -> None:
            self.model = model

        def run(self, x: Tensor) -> Tensor:
            return self.model.b(self.model.a(x))

    m.forward = Runner(m).run
    return then


def closure(m: Any) -> Oracle:
    m.forward = lambda x: m.b(m.a(x))
    return then


def closure_of_a_weight(m: Any) -> Oracle:
    weight = m.a.weight
    m.forward = lambda x: m.b(F.linear(x, weight))
    return then


def hook(m: Any) -> Oracle:
    weight = m.b.weight
    m.c.register_forward_hook(lambda module, inputs, output: F.linear(output, weight))
    own_forward(m, lambda self, x: self.c(x))
    return lambda x, w: x @ w[2].T @ w[1].T


def list_of_weights(m: Any) -> Oracle:
    m.kept = [m.a.weight, m.b.weight]
    own_forward(m, lambda self, x: functools.reduce(F.linear, self.kept, x))
    return then


def dict_of_tuples(m: Any) -> Oracle:
    m.kept = {"first": (m.a.weight, None), "then": {"it": m.b.weight}}
    own_forward(m, lambda s, x: F.linear(F.linear(x, *s.kept["first"]), s.kept["then"]["it"]))
    return then


def attribute_of_a_layer(m: Any) -> Oracle:
    object.__setattr__(m.c, "other", m.a.weight)
    own_forward(m, lambda self, x: self.b(x @ self.c.other.T))
    return then


def without_gradients(m: Any) -> Oracle:
    m.kept = [m.a.weight.data, m.b.weight.detach()]
    own_forward(m, lambda self, x: functools.reduce(F.linear, self.kept, x))
    return then


def checkpointed(m: Any) -> Oracle:
    def forward(self: Any, x: Tensor) -> Tensor:
        inner = checkpoint(lambda y: F.linear(y, self.a.weight), x, use_reentrant=False)
        return self.b(inner)

    own_forward(m, forward)
    return then


def transformed(m: Any) -> Oracle:
    def forward(self: Any, x: Tensor) -> Tensor:
        return torch.func.vmap(torch.func.grad(lambda y: self.b(self.a(y)).square().sum()))(x)

    own_forward(m, forward)
    return lambda x, w: 2 * then(x, w) @ w[1] @ w[0]


FOLLOWED: tuple[Callable[[Any], Oracle], ...] = (
    *(compiled, compiled_layer, partial, of_another_object, closure, closure_of_a_weight, hook),
    *(list_of_weights, dict_of_tuples, attribute_of_a_layer, without_gradients, checkpointed),
    transformed,
)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("patch", FOLLOWED, ids=lambda patch: patch.__name__)
def test_the_result_runs_its_own_factors(patch: Callable[[Any], Oracle], inplace: bool) -> None:
    model = Net().eval()
    oracle = patch(model)
    with torch.no_grad():
        before = model(X)
    small: Any = tensorize.compile(model, 0.6, inplace=inplace, **options())
    assert set(formats(small).values()) == {"low_rank"}
    for each in (small, copy.deepcopy(small)):
        want = oracle(X.double(), weights(each))
        assert relative(each(X), want) < 1e-5
        assert relative(each(X), before) > 0.1  # else nothing is tested
    if not inplace:
        with torch.no_grad():
            assert torch.equal(model(X), before)


@pytest.mark.parametrize("patch", [list_of_weights, dict_of_tuples, closure_of_a_weight])
def test_factors_are_trained_where_weights_are_kept_aside(patch: Any) -> None:
    model = Net()
    oracle = patch(model)
    small: Any = tensorize.compile(model, 0.6, **options())
    small(X).square().sum().backward()
    found = {name: p.grad for name, p in small.a.named_parameters()}
    small.zero_grad()
    dense = [w.requires_grad_() for w in weights(small)]
    oracle(X.double(), tuple(dense)).square().sum().backward()
    small.a.weight.dense().backward(dense[0].grad.float())
    for name, p in small.a.named_parameters():
        assert relative(found[name], p.grad) < 1e-5


class Listed(Net):
    """What keeps its weights in a list, and can be pickled."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = [self.a.weight, self.b.weight]

    def forward(self, x: Tensor) -> Tensor:
        return functools.reduce(F.linear, self.kept, x)


def test_what_is_kept_aside_goes_with_the_model(tmp_path: Path) -> None:
    small: Any = tensorize.compile(Listed(), 0.6, **options())
    y = small(X)
    tensorize.save(small, tmp_path)
    others = pickle.loads(pickle.dumps(small)), tensorize.load(tmp_path, Listed())
    for other in others:
        assert relative(other(X), then(X.double(), weights(other))) < 1e-5
        assert relative(other(X), y) < 1e-6
    dense: Any = tensorize.densify(small)
    assert dense.kept[0] is dense.a.weight
    assert relative(dense(X), y) < 1e-5
    assert small.double()(X.double()).dtype == torch.float64
    with torch.no_grad():
        small.a.second.weight.mul_(2)
    assert relative(small(X.double()), 2 * y) < 1e-5


def test_no_dense_weight_is_kept_alive_in_place() -> None:
    model = Listed()
    dense = weakref.ref(model.a.weight)
    tensorize.compile(model, 0.6, inplace=True, **options())
    assert dense() is None


# ------------------------------------------------------- what cannot be followed stays dense


def asks_for_the_class(m: Any) -> None:
    own_forward(m, lambda s, x: s.b(s.a(x)) if isinstance(s.a, nn.Linear) else x)


def asks_for_the_type(m: Any) -> None:
    own_forward(m, lambda s, x: s.b(s.a(x)) if type(s.a) is nn.Linear else x)


def asks_for_its_name(m: Any) -> None:
    own_forward(m, lambda s, x: s.b({"Linear": s.a}.get(type(s.a).__name__, nn.Identity())(x)))


def functional(m: Any) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.b(
            functional_call(self.a, dict(self.a.named_parameters()), (x,)) + self.twice(x)
        )

    m.twice = lambda x: functional_call(m.a, {k: 2 * v for k, v in m.a.named_parameters()}, (x,))
    own_forward(m, forward)


def state_dict(m: Any) -> None:
    own_forward(m, lambda s, x: s.b(F.linear(x, s.a.state_dict()["weight"])))


def named(m: Any) -> None:
    own_forward(m, lambda s, x: s.b(F.linear(x, dict(s.named_parameters())["a.weight"])))


def get_parameter(m: Any) -> None:
    own_forward(m, lambda s, x: s.b(F.linear(x, s.get_parameter("a.weight"))))


def registry(m: Any) -> None:
    own_forward(m, lambda s, x: s.b(F.linear(x, s.a._parameters["weight"])))


def transposed_aside(m: Any) -> None:
    m.kept = m.a.weight.data.t()
    own_forward(m, lambda s, x: s.b(x @ s.kept))


def through_numpy(m: Any) -> None:
    kept = m.a.weight.detach().numpy()
    own_forward(m, lambda s, x: s.b(F.linear(x, torch.from_numpy(kept))))


def unregistered_layer(m: Any) -> None:
    other = nn.Linear(24, 24, bias=False)
    other.weight = m.a.weight
    m.kept = [other]
    own_forward(m, lambda s, x: s.b(s.kept[0](x)))


def scripted(m: Any) -> None:
    own_forward(m, lambda s, x: s.b(_scripted()(x, s.a.weight)))


@functools.cache
def _scripted() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(_multiply)


def _multiply(x: Tensor, w: Tensor) -> Tensor:
    return torch.matmul(x, w.t())


REFUSED = (
    *(asks_for_the_class, asks_for_the_type, asks_for_its_name, functional, state_dict, named),
    *(get_parameter, registry, transposed_aside, through_numpy, unregistered_layer, scripted),
)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("patch", REFUSED, ids=lambda patch: patch.__name__)
def test_a_weight_that_the_forward_needs_stays_dense(patch: Any, inplace: bool) -> None:
    model = Net().eval()
    patch(model)
    dense = copy.deepcopy(model.a.weight)
    small: Any = tensorize.compile(model, 0.7, inplace=inplace, **options())
    found = formats(small)
    assert found == {"a": "dense", "b": "low_rank", "c": "low_rank"}
    reason = {site.name: site.reason for site in tensorize.report(small).sites}["a.weight"]
    assert reason.startswith("in factors the model")
    assert torch.equal(small.a.weight, dense)
    times = 3 if patch is functional else 1
    assert relative(small(X), times * then(X.double(), weights(small))) < 1e-5


@pytest.mark.parametrize("patch", [asks_for_the_type, named, unregistered_layer])
def test_no_work_is_done_where_all_weights_must_stay(
    patch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the weight, and its way out works."""
    model = Net().eval()
    patch(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(TensorizeError, match=r"a\.weight.*in factors the model") as caught:
        tensorize.compile(model, None, ranks={"a": 4}, **options())
    assert "way out" in str(caught.value)
    small = tensorize.compile(model, 0.7, exclude=["a"], **options())
    assert formats(small)["a"] == "dense"
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_what_cannot_be_copied_is_rehearsed_too() -> None:
    """What was computed from a parameter: torch copies none, and in place it stays what it is."""
    model: Any = Net()
    model.kept = model.a.weight.t()
    own_forward(model, lambda s, x: s.b(x @ s.kept))
    with pytest.raises(AnalysisError, match="inplace=True"):
        tensorize.compile(model, 0.7, **options())
    small: Any = tensorize.compile(model, 0.7, inplace=True, **options())
    assert formats(small)["a"] == "dense"
    assert relative(small(X), then(X.double(), weights(small))) < 1e-5


# ----------------------------------------------------- the result beside its dense form


LATE = (asks_for_the_type, named, registry, transposed_aside, unregistered_layer, scripted)


@pytest.mark.parametrize("patch", LATE, ids=lambda patch: patch.__name__)
def test_what_no_rehearsal_saw_is_an_error_at_the_call(patch: Any) -> None:
    """A plan is made, then the forward becomes another: the error names the weight, and the model
    is as it was."""
    model = Net().eval()
    plan = tensorize.analyze(model, **options()).plan(0.6)
    patch(model)
    with torch.no_grad():
        before = model(X)
    with pytest.raises(AnalysisError, match=r"a\.weight") as caught:
        tensorize.apply(model, plan, example_inputs=(X,))
    assert caught.value.site == "a.weight"
    assert caught.value.way_out == "exclude=['a.weight']"
    with torch.no_grad():
        assert torch.equal(model(X), before)
    small: Any = tensorize.compile(model, 0.7, exclude=["a.weight"], **options())
    assert relative(small(X), then(X.double(), weights(small))) < 1e-5


def test_all_weights_to_blame_are_named() -> None:
    model: Any = Net()
    plan = tensorize.analyze(model, **options()).plan(0.6)
    own_forward(model, lambda s, x: s.b(s.a(x)) * (type(s.a) is type(s.c) is nn.Linear))
    with pytest.raises(AnalysisError) as caught:
        tensorize.apply(model, plan, example_inputs=(X,))
    assert caught.value.way_out == "exclude=['a.weight', 'c.weight']"


# ----------------------------------------------------------------------------- no false alarms


def dropout(m: Any) -> None:
    own_forward(m, lambda s, x: s.b(F.dropout(s.a(x), 0.5, training=True)))


def whole_numbers(m: Any) -> None:
    own_forward(m, lambda s, x: s.b(s.a(x)).argmax(-1))


def counting(m: Any) -> None:
    m.calls, m.seen = 0, []

    def forward(self: Any, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(self.calls)
        return self.b(self.a(x)) * sum(self.seen)

    own_forward(m, forward)


def writing_to_its_input(m: Any) -> None:
    own_forward(m, lambda s, x: s.b(s.a(x.mul_(2))))


def numbers_of_python(m: Any) -> None:
    own_forward(m, lambda s, x: s.b(s.a(x)) * random.random())


def numbers_of_numpy(m: Any) -> None:
    own_forward(m, lambda s, x: s.b(s.a(x)) * float(np.random.rand()))


def nothing_but_nan(m: Any) -> None:
    own_forward(m, lambda s, x: s.b(s.a(x)) / 0 * 0)


def no_weight(m: Any) -> None:
    own_forward(m, lambda s, x: (s.a(x) * 0).sum(-1))


def a_choice_in_half_precision(m: Any) -> None:
    """Where rounding decides who is asked, runs differ much."""
    m.to(torch.bfloat16)

    def forward(self: Any, x: Tensor) -> Tensor:
        gate = self.a(x.bfloat16())
        return torch.where(gate > gate.mean(), self.b(x.bfloat16()), -self.c(x.bfloat16()))

    own_forward(m, forward)


def views_of_one_memory(m: Any) -> None:
    """Parameters that are parts of one flat tensor."""
    flat = torch.randn(3, 24, 24)
    for layer, part in zip((m.a, m.b, m.c), flat, strict=True):
        layer.weight = nn.Parameter(part)
    m.scale = nn.Parameter(flat[0, 0, :1])


FINE = (
    *(dropout, whole_numbers, counting, writing_to_its_input, numbers_of_python, no_weight),
    *(numbers_of_numpy, nothing_but_nan, a_choice_in_half_precision, views_of_one_memory),
)


@pytest.mark.parametrize("patch", FINE, ids=lambda patch: patch.__name__)
def test_models_that_are_well_are_compressed(patch: Any) -> None:
    model = Net().eval()
    patch(model)
    small = tensorize.compile(model, 0.6, **options(example_inputs=(X.clone(),)))
    assert set(formats(small).values()) == {"low_rank"}
    steps = {stage.name: stage.summary for stage in tensorize.report(small).history}
    assert "as its dense form" in steps["compare"]
