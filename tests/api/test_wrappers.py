"""Models in wrappers: torch's own are looked into, a user's class is kept whole."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import tensorize
from tensorize.base.dynamo import nothing_compiled
from tensorize.capture.forward import untouched
from tests import models


def two() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).eval()


X = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))


def relative(got: Tensor, want: Tensor) -> float:
    return models.relative(got.detach(), want.detach())


class Soft(nn.Module):
    """Has one child of the name that wrappers give theirs, and does something of its own."""

    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.module = inner or two()

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x).softmax(-1)


class Original(nn.Module):
    """As ``Soft``, with the name that torch.compile gives."""

    def __init__(self) -> None:
        super().__init__()
        self._orig_mod = two()

    def forward(self, x: Tensor) -> Tensor:
        return -self._orig_mod(x)


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


def distributed(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


WRAPPERS = [
    compiled,
    nn.DataParallel,
    distributed,
    lambda model: nn.DataParallel(compiled(model)),
    lambda model: compiled(nn.DataParallel(model)),
]
IDS = ["compiled", "DataParallel", "DDP", "both", "both, the other way"]


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path) -> object:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("wrap", WRAPPERS, ids=IDS)
@pytest.mark.parametrize(
    "options", [{"example_inputs": (X,), "metric": "frobenius"}, {"calibration": [X, X + 1]}]
)
def test_what_comes_back_is_the_model_inside(
    wrap: Callable[[nn.Module], nn.Module], options: dict
) -> None:
    usual = tensorize.compile(two(), 0.5, **options)
    small = tensorize.compile(wrap(two()), 0.5, **options)
    assert type(small) is nn.Sequential
    for one, other in zip(usual.parameters(), small.parameters(), strict=True):
        assert torch.equal(one, other)
    (note,) = [n for n in tensorize.report(small).notes if "the model inside" in n]
    assert type(wrap(two())).__name__ in note


@pytest.mark.parametrize("wrap", WRAPPERS, ids=IDS)
def test_every_verb_takes_a_wrapped_model(
    wrap: Callable[[nn.Module], nn.Module], tmp_path: Path
) -> None:
    data, wrapped = [X, X + 1], wrap(two())
    plan = tensorize.analyze(wrapped, calibration=data).plan(0.5)
    small = tensorize.apply(two(), plan)  # a plan of the wrapped model is one of the model
    assert relative(tensorize.apply(wrapped, plan)(X), small(X)) == 0
    result = wrap(small)
    assert tensorize.report(result).sites == tensorize.report(small).sites
    assert relative(tensorize.densify(result)(X), small(X)) < 1e-5
    tensorize.save(result, tmp_path / "out")
    assert relative(tensorize.load(tmp_path / "out", two())(X), small(X)) == 0
    tensorize.evaluate(result, wrapped, data, time=False)
    assert tensorize.heal(result, wrapped, data, steps=2).steps == 2
    assert type(tensorize.initialize(wrap(two()), 0.5)) is nn.Sequential


@pytest.mark.parametrize("kind", [Soft, Original])
def test_a_class_of_the_users_own_is_kept_whole(kind: type[nn.Module], tmp_path: Path) -> None:
    small = tensorize.compile(kind(), 0.5, example_inputs=(X,), metric="frobenius")
    assert type(small) is kind
    dense = tensorize.densify(small)
    assert type(dense) is kind
    assert relative(dense(X), small(X)) < 1e-5
    assert all("." in site.name for site in tensorize.report(small).sites)
    tensorize.save(small, tmp_path / "out")
    assert relative(tensorize.load(tmp_path / "out", kind())(X), small(X)) == 0
    tensorize.graphs(small, (X,))


def test_a_wrapper_around_a_result_is_no_result_and_says_where_it_is(tmp_path: Path) -> None:
    model = Soft(tensorize.compile(two(), 0.5, example_inputs=(X,), metric="frobenius"))
    for look, kind in (
        (tensorize.report, tensorize.TensorizeError),
        (lambda m: tensorize.save(m, tmp_path / "out"), tensorize.CheckpointError),
    ):
        with pytest.raises(kind) as caught:
            look(model)
        names = {"model": model, "tensorize": tensorize, "directory": tmp_path / "out"}
        eval(str(caught.value.way_out), names)  # what it says works as it stands
    dense = tensorize.densify(model)
    assert type(dense) is Soft
    with pytest.raises(tensorize.TensorizeError, match=r"not made by tensorize\n"):
        tensorize.report(dense)


def test_in_place() -> None:
    options = {"example_inputs": (X,), "metric": "frobenius", "inplace": True}
    inner = two()
    assert tensorize.compile(compiled(inner), 0.5, **options) is inner
    model = two()
    with pytest.raises(tensorize.CaptureError, match="cannot be changed in place") as caught:
        tensorize.compile(distributed(model), 0.5, **options)
    assert "model.module" in str(caught.value.way_out)
    assert tensorize.compile(distributed(model).module, 0.5, **options) is model


def test_a_part_that_is_compiled_stays_so() -> None:
    model = two()
    model[0] = compiled(model[0])
    small = tensorize.compile(model, 0.5, calibration=[X, X + 1])
    assert type(small[0]) is type(model[0])
    assert relative(small(X), tensorize.densify(small)(X)) < 1e-5


def test_what_is_timed_compiled_runs_compiled() -> None:
    """Parts are run as they were written only where they are watched."""
    seen: list[int] = []

    def note(graph: torch.fx.GraphModule, inputs: object) -> object:
        seen.append(len(graph.graph.nodes))
        return graph.forward

    with untouched(model := two()):
        torch.compile(model, backend=note)(X)  # type: ignore[arg-type]
    assert seen
    with nothing_compiled():
        torch.compile(two(), backend=note)(X)  # type: ignore[arg-type]
    assert len(seen) == 1


# ------------------------------------------------------------------------- what has no matrices


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (nn.LazyLinear(64), "0.weight"),
        (nn.LazyConv1d(4, 3), "0.weight"),
        (nn.Sequential(nn.LazyLinear(8, bias=False)), "0.0.weight"),
        (nn.LazyBatchNorm1d(), "0.weight"),
    ],
)
def test_lazy_layers_are_named_before_the_work(layer: nn.Module, name: str) -> None:
    model = nn.Sequential(layer, nn.Linear(64, 64))
    verbs = (
        lambda: tensorize.compile(model, 0.5, example_inputs=(X,)),
        lambda: tensorize.analyze(model, calibration=[X]),
        lambda: tensorize.initialize(model, 0.5),
        lambda: tensorize.densify(model),
    )
    for verb in verbs:
        with pytest.raises(tensorize.CaptureError, match=rf"^{name}: .*has no shape yet") as caught:
            verb()
        assert "model(x)" in str(caught.value.way_out)


def test_a_lazy_layer_that_was_called_is_a_layer() -> None:
    model = nn.Sequential(nn.LazyLinear(64), nn.ReLU(), nn.Linear(64, 64))
    model(X)
    small = tensorize.compile(model, 0.5, example_inputs=(X,), metric="frobenius")
    assert relative(small(X), tensorize.densify(small)(X)) < 1e-5


def test_a_model_of_quantized_layers_only() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao says that it moves to torchao
        model = torch.ao.quantization.quantize_dynamic(two(), {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(tensorize.CaptureError, match="no parameters: quantized layers") as caught:
        tensorize.compile(model, 0.5)
    assert "before it was quantized" in str(caught.value.way_out)
