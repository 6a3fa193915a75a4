"""Every kind of site is really factorized: it equals its dense form, and no weight is built."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import tensorize
from tensorize.algebra import reconstruct
from tests.models import CASES, parameters, relative


class Uses(nn.Module):
    """One weight and one way to use it."""

    def __init__(self, shape: tuple[int, ...], use: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape) / shape[-1] ** 0.5)
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(x, self.weight)


def packed(x: Tensor, w: Tensor) -> Tensor:
    q, k, v = (F.linear(x, part) for part in w.chunk(3))
    return q * k + v


def sliced(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(x, w[:24]) * F.linear(x, w[24:])[..., :24]


def split(x: Tensor, w: Tensor) -> Tensor:
    small, large = torch.split(w, [16, 32])
    return torch.cat([x @ small.t(), x @ large.T], -1)


def routed(x: Tensor, w: Tensor) -> Tensor:
    return torch.bmm(x.unsqueeze(1), w[torch.tensor([0, 3, 3, 1, 5])]).squeeze(1)


def grouped(x: Tensor, w: Tensor) -> Tensor:
    ends = torch.tensor([3, 3, 8, 9, 12, 14], dtype=torch.int32)
    return F.grouped_mm(x, w, offs=ends)


def one_by_one(x: Tensor, w: Tensor) -> Tensor:
    return torch.stack([F.linear(x[k], w[k]) for k in range(len(w))])


X = (6, 5, 32)
KINDS: dict[str, tuple[tuple[int, ...], tuple[int, ...], Callable[[Tensor, Tensor], Tensor]]] = {
    "F.linear": ((48, 32), X, F.linear),
    "chunks of a packed projection": ((96, 32), X, packed),
    "slices": ((48, 32), X, sliced),
    "split and transposed": ((48, 32), X, split),
    "x @ W": ((32, 48), X, lambda x, w: x @ w),
    "x @ W.T": ((48, 32), X, lambda x, w: x @ w.T),
    "W @ x": ((48, 32), (6, 32, 5), lambda x, w: w @ x),
    "square W @ x": ((48, 48), (6, 48, 5), lambda x, w: w @ x),
    "W @ vector": ((48, 32), (32,), lambda x, w: w @ x),
    "mm": ((32, 48), (7, 32), torch.mm),
    "addmm": ((32, 48), (7, 32), lambda x, w: torch.addmm(torch.ones(48), x, w)),
    "matmul": ((32, 48), X, torch.matmul),
    "bmm": ((6, 32, 48), X, torch.bmm),
    "stacked matmul": ((6, 32, 48), (2, 6, 5, 32), torch.matmul),
    "per-head projection": ((6, 32, 48), (2, 1, 5, 32), torch.matmul),
    "stack @ x": ((6, 48, 32), (6, 32, 5), lambda x, w: w @ x),
    "one matrix of a stack at a time": ((6, 48, 32), X, one_by_one),
    "einsum": ((48, 32), X, lambda x, w: torch.einsum("btd,kd->btk", x, w)),
    "einsum, several heads out": ((32, 4, 12), X, lambda x, w: torch.einsum("btd,dhk->bhtk", x, w)),
    "einsum, several heads in": (
        (4, 8, 48),
        (6, 5, 4, 8),
        lambda x, w: torch.einsum("bthk,hkd->btd", x, w),
    ),
    "einsum, weight first": ((48, 32), X, lambda x, w: torch.einsum("kd,btd->btk", w, x)),
    "einsum, experts": ((6, 32, 48), X, lambda x, w: torch.einsum("ebd,edf->ebf", x, w)),
    "einsum, experts in the middle": (
        (6, 32, 48),
        (2, 5, 6, 32),
        lambda x, w: torch.einsum("bted,edf->btef", x, w),
    ),
    "einsum, per-head projection": (
        (6, 32, 48),
        (2, 5, 32),
        lambda x, w: torch.einsum("btd,hdk->bhtk", x, w),
    ),
    "einsum, dots": ((48, 32), X, lambda x, w: torch.einsum("...d,kd->...k", x, w)),
    "einsum, dots in both": (
        (6, 32, 48),
        X,
        lambda x, w: torch.einsum("...td,...dk->k...t", x, w),
    ),
    "einsum, no arrow": ((48, 32), (7, 32), lambda x, w: torch.einsum("bd,kd", x, w)),
    "einsum, dots and no arrow": ((48, 32), X, lambda x, w: torch.einsum("zk...,az", w.T, x[0])),
    "einsum, three operands": (
        (48, 32),
        X,
        lambda x, w: torch.einsum("btd,bt,kd->btk", x, x[..., 0], w),
    ),
    "grouped_mm": ((6, 32, 48), (14, 32), grouped),
    "grouped_mm, experts transposed": (
        (6, 48, 32),
        (14, 32),
        lambda x, w: grouped(x, w.transpose(-2, -1)),
    ),
    "a matrix of the stack for every row": ((6, 32, 48), (5, 32), routed),
    "conv1d": ((48, 32, 3), (2, 32, 20), lambda x, w: F.conv1d(x, w, stride=2, padding=1)),
    "conv2d": ((48, 16, 3, 3), (2, 16, 9, 9), lambda x, w: F.conv2d(x, w, None, 2, 1, 2)),
    "conv3d": ((24, 8, 3, 3, 3), (2, 8, 6, 6, 6), lambda x, w: F.conv3d(x, w, padding="same")),
    "grouped conv2d": ((48, 16, 3, 3), (2, 32, 9, 9), lambda x, w: F.conv2d(x, w, groups=2)),
    "grouped conv1d": ((48, 16, 5), (2, 32, 20), lambda x, w: F.conv1d(x, w, groups=2)),
    "grouped conv3d": (
        (48, 16, 3, 3, 3),
        (2, 32, 7, 7, 7),
        lambda x, w: F.conv3d(x, w, torch.ones(48), 2, 1, 2, groups=2),
    ),
    "conv_transpose1d": ((32, 24, 3), (2, 32, 9), lambda x, w: F.conv_transpose1d(x, w, stride=2)),
    "conv_transpose3d": (
        (32, 12, 3, 3, 3),
        (2, 32, 4, 4, 4),
        lambda x, w: F.conv_transpose3d(x, w, stride=2, padding=1, dilation=2),
    ),
    "conv_transpose2d": (
        (32, 24, 3, 3),
        (2, 32, 5, 5),
        lambda x, w: F.conv_transpose2d(x, w, torch.ones(24), 2, 1, 1),
    ),
}


@pytest.mark.parametrize("calibrated", [False, True], ids=["weights", "calibrated"])
@pytest.mark.parametrize("name", KINDS)
def test_kind(name: str, calibrated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, input_shape, use = KINDS[name]
    model, x = Uses(shape, use), torch.randn(input_shape)
    calibration = [torch.randn(input_shape) for _ in range(4)] if calibrated else None
    small = tensorize.compile(model, budget=0.5, example_inputs=(x,), calibration=calibration)
    (site,) = tensorize.report(small).sites
    assert site.format == "low_rank", site.reason
    assert parameters(small) <= 0.5 * parameters(model)
    dense = tensorize.densify(small)
    assert dense.weight.shape == model.weight.shape
    want = dense(x)
    monkeypatch.setattr(reconstruct, "reconstruct", None)  # the dense weight must not be built
    got = small(x)
    assert got.shape == want.shape
    assert relative(got.detach(), want.detach()) < 1e-5
    got.square().sum().backward()
    assert all(p.grad is not None for p in small.parameters())


@pytest.mark.parametrize("name", KINDS)
def test_kind_is_exact_at_full_rank(name: str) -> None:
    shape, input_shape, use = KINDS[name]
    model, x = Uses(shape, use), torch.randn(input_shape)
    full = tensorize.compile(model, None, ranks={"*": "full"}, example_inputs=(x,))
    assert relative(full(x).detach(), model(x).detach()) < 1e-5


@pytest.mark.parametrize("name", KINDS)
def test_kind_is_one_graph_of_torch_compile(name: str) -> None:
    shape, input_shape, use = KINDS[name]
    x = torch.randn(input_shape)
    small = tensorize.compile(Uses(shape, use), budget=0.5, example_inputs=(x,))
    torch._dynamo.reset()
    compiled = torch.compile(small, backend="eager", fullgraph=True)
    assert relative(compiled(x).detach(), small(x).detach()) < 1e-6


@pytest.mark.parametrize("name", CASES)
def test_no_architecture_builds_a_weight(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    small = tensorize.compile(case.model(), None, ranks={"*": 4}, example_inputs=case.batch())
    want = case.output(tensorize.densify(small))
    monkeypatch.setattr(reconstruct, "reconstruct", None)
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
        monkeypatch.setattr(reconstruct, "reconstruct", None)
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
        monkeypatch.setattr(reconstruct, "reconstruct", None)
        assert fast not in operations(lambda: small(x))
        assert relative(small(x), want) < 1e-5
        assert relative(small(x, src_key_padding_mask=padding)[~padding], masked) < 1e-5


def operations(run: Callable[[], object]) -> list[str]:
    """The names of the operators that a call dispatches, in order."""
    names: list[str] = []

    class Listens(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
        ) -> Any:
            names.append(func._schema.name.partition("::")[2])
            return func(*args, **(kwargs or {}))

    with Listens():
        run()
    return names


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
            patch.setattr(reconstruct, "reconstruct", None)
            assert relative(case.output(small), want) < 1e-5


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a .functools.lru_cache")
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
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
    monkeypatch.setattr(reconstruct, "reconstruct", None)
    assert relative(case.output(small), want) < 1e-5


def test_experts_and_convolutions_keep_their_kernels() -> None:
    convolution = {"conv1d", "conv2d", "conv3d", "convolution"}
    expected = {"grouped_mm": {"_grouped_mm"}, "grouped conv2d": convolution}
    for name, kernels in expected.items():
        shape, input_shape, use = KINDS[name]
        model, x = Uses(shape, use), torch.randn(input_shape)
        small = tensorize.compile(model, budget=0.5, example_inputs=(x,))
        with torch.no_grad():
            ran = [operations(partial(m, x)) for m in (model, small)]
        dense, factors = ([op for op in ops if op in (*kernels, "bmm", "mm")] for ops in ran)
        assert len(dense) == 1
        assert factors == dense * 2  # one for each factor, and nothing in their place


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
    monkeypatch.setattr(reconstruct, "reconstruct", None)
    assert relative(small(*inputs).detach(), want.detach()) < 1e-5


@pytest.mark.parametrize(
    ("model", "inputs", "reason"),
    [
        (nn.Conv1d(32, 32, 3, groups=32), (torch.randn(2, 32, 9),), "depthwise"),
        (nn.EmbeddingBag(64, 24, mode="max"), (torch.zeros(5, 6, dtype=torch.long),), "embed"),
        (nn.LSTM(16, 24), (torch.randn(5, 2, 16),), "lstm, which is no matmul"),
        (nn.GRU(16, 24), (torch.randn(5, 2, 16),), "gru, which is no matmul"),
        (nn.Bilinear(8, 8, 4), (torch.randn(3, 8), torch.randn(3, 8)), "bilinear"),
        (
            nn.ConvTranspose1d(32, 24, 3, groups=2),
            (torch.randn(2, 32, 9),),
            "conv_transpose1d, which is no matmul",
        ),
    ],
    ids=["depthwise", "bag of maxima", "LSTM", "GRU", "bilinear", "transposed in groups"],
)
def test_what_stays_dense_says_why(model: nn.Module, inputs: tuple, reason: str) -> None:
    full = tensorize.compile(model, budget=1.0, example_inputs=inputs)
    for site in tensorize.report(full).sites:
        assert site.format == "dense"
        assert reason in site.reason


class Quantized(Tensor):
    """As other libraries' quantized weights: a tensor of another class."""


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (torch.randn(48, 32).as_subclass(Quantized), "it is a Quantized, already in another form"),
        (torch.ones(48, 32, dtype=torch.int8), "its dtype is int8"),
    ],
    ids=["a class of its own", "integers"],
)
def test_weights_in_another_form_are_left_alone(weight: Tensor, reason: str) -> None:
    model = nn.Sequential(nn.Linear(32, 32), Uses((48, 32), lambda x, w: F.linear(x, w.to(x))))
    quantized = nn.Parameter(weight, requires_grad=False)
    model[1].weight = quantized
    small = tensorize.compile(model, 0.8, example_inputs=(torch.randn(5, 32),), inplace=True)
    first, second = tensorize.report(small).sites
    assert first.format == "low_rank"
    assert second.format == "dense"
    assert reason in second.reason
    assert small.get_parameter("1.weight") is quantized


# ----------------------------------------------------------- weights that are used as a whole


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(16, 24, 2, bidirectional=True)
        self.gru = nn.GRU(48, 32)
        self.head = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(self.lstm(x)[0])[0])


class Standardized(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2), keepdim=True)
        return F.conv1d(x, weight, self.bias)


def normed() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv1d(16, 24, 5)), nn.ReLU())


WHOLE = {
    "LSTM and GRU": (Recurrent, (5, 2, 16)),
    "weight norm": (normed, (3, 16, 20)),
    "standardized": (lambda: nn.Sequential(Standardized(16, 24, 5)), (3, 16, 20)),
}
WHOLES = pytest.mark.parametrize(("make", "shape"), WHOLE.values(), ids=WHOLE)


@WHOLES
def test_a_whole_weight_is_factorized_only_where_the_budget_cannot_be_met_otherwise(
    make: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    model, x = make().eval(), torch.randn(shape)
    small = tensorize.compile(model, 0.4, example_inputs=(x,))
    assert parameters(small) <= 0.4 * parameters(model)
    rebuilt = [s for s in tensorize.report(small).sites if s.format == "low_rank"]
    assert rebuilt
    for site in rebuilt:
        assert "rebuilt from its factors at every call" in site.reason or site.name == "head.weight"
    copies = [small, copy.deepcopy(small)]
    if "parametrizations" not in rebuilt[0].name:  # torch pickles no parametrized module
        copies.append(pickle.loads(pickle.dumps(small)))
    for copied in copies:
        with torch.no_grad():
            assert relative(copied(x), tensorize.densify(copied)(x)) < 1e-5
    small.train()(x).sum().backward()
    assert all(p.grad is not None for p in small.parameters())
    double = small.double()
    with torch.no_grad():
        assert relative(double(x.double()), tensorize.densify(double)(x.double())) < 1e-12


@pytest.mark.parametrize("name", ["weight norm", "standardized"])  # dynamo takes no LSTM
def test_a_whole_weight_is_rebuilt_in_one_graph(name: str) -> None:
    make, shape = WHOLE[name]
    x = torch.randn(shape)
    small = tensorize.compile(make().eval(), 0.4, example_inputs=(x,))
    torch._dynamo.reset()
    compiled = torch.compile(small, backend="eager", fullgraph=True)
    assert relative(compiled(x).detach(), small(x).detach()) < 1e-6


def test_a_whole_weight_stays_dense_where_others_can_be_cut() -> None:
    small = tensorize.compile(Recurrent().eval(), 0.98, example_inputs=(torch.randn(5, 2, 16),))
    formats = {site.name: site.format for site in tensorize.report(small).sites}
    assert formats.pop("head.weight") == "low_rank"
    assert set(formats.values()) == {"dense"}


def test_a_recurrent_layer_holds_no_dense_weight_beside_its_cores() -> None:
    small = tensorize.compile(Recurrent().eval(), 0.4, example_inputs=(torch.randn(5, 2, 16),))
    for module in small.modules():
        lists = [value for value in vars(module).values() if isinstance(value, list)]
        assert not any(isinstance(v, Tensor) for held in lists for v in held)


@WHOLES
def test_the_loss_of_a_whole_weight_is_predicted(
    make: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    model = make().eval()
    plan = tensorize.analyze(model, calibration=[torch.randn(shape) for _ in range(12)]).plan(0.5)
    small, x = tensorize.apply(model, plan), torch.randn(64, *shape)
    with torch.no_grad():
        want, got = (torch.cat([m(part) for part in x]) for m in (model, small))
    rows, error = want.flatten(0, -2), (want - got).square().mean()
    measured = float(error / (rows - rows.mean(0)).square().mean())
    assert plan.predicted.loss == pytest.approx(measured, rel=0.35)


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
    monkeypatch.setattr(reconstruct, "reconstruct", None)
    assert relative(small(ids).detach(), want.detach()) < 1e-5
