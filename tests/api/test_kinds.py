"""Every kind of site is really factorized: it equals its dense form, and no weight is built."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tensorize
from tensorize.formats.format import Chain
from tests.api.operations import operations
from tests.models import parameters, relative


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
    "tensordot": ((48, 32), X, lambda x, w: torch.tensordot(x, w, dims=([2], [1]))),
    "a multiple": ((48, 32), X, lambda x, w: x @ (w / 8).t()),
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
    monkeypatch.setattr(Chain, "reconstruct", None)  # the dense weight must not be built
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
