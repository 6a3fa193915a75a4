"""What runs of a model change is put back, to the bit; nothing else is written to."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tensorize
from tensorize.base.errors import ModelError
from tensorize.capture.batches import calibration_batches
from tensorize.capture.forward import once, untouched
from tensorize.capture.kept import keeping, watching
from tests.marks import slow

X = torch.randn(8, 32, generator=torch.Generator().manual_seed(1))
DATA = [X, X * 2, X - 1, X + 1]
WAYS: list[dict[str, Any]] = [
    {"example_inputs": (X,), "metric": "frobenius"},
    {"calibration": DATA},
    {"calibration": DATA, "refine": "polish"},
    {"calibration": DATA, "metric": "input"},
]
by_way = pytest.mark.parametrize(
    "way",
    [WAYS[0], WAYS[1], slow(WAYS[2]), slow(WAYS[3])],
    ids=["weights", "loss", "polish", "input"],
)


class Pair(nn.Module):
    """Two linears, and what a test puts between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)

    def between(self, x: Tensor) -> Tensor:
        return torch.tanh(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x)))


class Averages(Pair):
    """Keeps a moving average of activations in a parameter and in a buffer, in every forward."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(32), requires_grad=False)
        self.register_buffer("count", torch.zeros(()))

    def between(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
            self.count += 1
        return torch.tanh(x - self.mean)


class Standardised(Pair):
    """Writes its first weight in place, and gives a third one other memory, in every forward."""

    def __init__(self) -> None:
        super().__init__()
        self.third = nn.Linear(32, 32)

    def between(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.first.weight.sub_(self.first.weight.mean(1, keepdim=True))
        self.third.weight.data = F.normalize(self.third.weight.data, dim=1)
        self.third.bias.data.mul_(0.5)
        return torch.tanh(self.third(x))


class Remembers(Pair):
    """Counts, remembers, draws numbers of its own, and hooks itself, in every forward."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.seen, self.drawn = 0, [torch.zeros(1)], torch.Generator().manual_seed(3)

    def between(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(x)
        self.last = x
        self.register_forward_hook(_nothing)
        self.first.bias.requires_grad_(False)
        noise = torch.randn(x.shape, generator=self.drawn) * random.random() * np.random.rand()
        return torch.tanh(x + 1e-3 * noise)


def _nothing(*_: Any) -> None:
    pass


class Learns(Pair):
    """A backward pass in the forward: gradients arrive at its parameters."""

    def between(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            self.second(torch.tanh(leaf)).sum().backward()
        assert leaf.grad is not None
        return torch.tanh(x) + leaf.grad


class Tables(Pair):
    """Buffers as they may come: expanded, overlapping, of inference, sparse, on meta."""

    def __init__(self) -> None:
        super().__init__()
        base = torch.linspace(0, 1, 70)
        self.register_buffer("base", base)
        self.register_buffer("overlapping", base.as_strided((8, 32), (1, 2)))
        self.register_buffer("expanded", torch.ones(1, 1).expand(8, 32))
        with torch.inference_mode():
            self.register_buffer("made_in_inference", torch.ones(32))
        self.register_buffer("sparse", torch.eye(32).to_sparse())
        self.register_buffer("nowhere", torch.zeros(3, device="meta"))

    def between(self, x: Tensor) -> Tensor:
        self.base[5] += 1
        masked = x * self.overlapping[: len(x)] * self.expanded[:1] * self.made_in_inference
        return torch.tanh(torch.sparse.mm(self.sparse, masked.t()).t())


class Merges(nn.Linear):
    """An adapter that ``train(False)`` merges into the weight, as of LoRA's first library."""

    def __init__(self) -> None:
        super().__init__(32, 32)
        self.merged = False
        self.right = nn.Parameter(torch.randn(4, 32) / 10)
        self.left = nn.Parameter(torch.randn(32, 4) / 10)

    def train(self, mode: bool = True) -> Merges:
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (-1 if mode else 1) * (self.left @ self.right).data
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        return y if self.merged else y + x @ self.right.T @ self.left.T


def _adapted() -> nn.Module:
    model = nn.Sequential(Merges(), nn.Tanh(), Merges(), *(nn.Linear(32, 32) for _ in range(3)))
    return model.train()


def _partly_training() -> nn.Module:
    model = nn.Sequential(nn.Linear(32, 32), nn.Dropout(0.5), nn.Linear(32, 32), nn.Tanh()).eval()
    model[1].train()
    return model


class FrozenNorm(nn.Sequential):
    def train(self, mode: bool = True) -> FrozenNorm:
        super().train(mode)
        self[1].eval()
        return self


def _frozen_norm() -> nn.Module:
    return FrozenNorm(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.Linear(32, 32)).train()


def _spectral() -> nn.Module:
    normed = torch.nn.utils.spectral_norm(nn.Linear(32, 32))
    return nn.Sequential(normed, nn.Tanh(), nn.Linear(32, 32), nn.Linear(32, 32)).train()


def attributes(model: nn.Module) -> list[Any]:
    found: list[Any] = []
    for module in model.modules():
        for name, value in vars(module).items():
            inside = list(value) if isinstance(value, list | dict) else []
            inside += value.values() if isinstance(value, dict) else []
            found.append((type(module), name, value, [id(each) for each in inside]))
    return found


def state(model: nn.Module) -> list[Any]:
    """Values, gradients and counts of writes of all tensors; attributes; random numbers to come."""
    tensors: list[Any] = []
    for tensor in (*model.parameters(), *model.buffers()):
        grad = None if tensor.grad is None else (id(tensor.grad), tensor.grad.tolist())
        values = None if tensor.is_meta else tensor.detach().to_dense().tolist()
        written = None if tensor.is_inference() else tensor._version
        tensors.append((id(tensor), values, written, tensor.requires_grad, grad))
    numbers = torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()
    own = [
        value.get_state().tolist()
        for _, _, value, _ in attributes(model)
        if isinstance(value, torch.Generator)
    ]
    return [tensors, attributes(model), numbers, own]


MODELS: list[Callable[[], nn.Module]] = [
    *(Averages, Standardised, Remembers, Learns, Tables),
    *(_adapted, _partly_training, _frozen_norm, _spectral),
]


@by_way
@pytest.mark.parametrize("build", MODELS)
def test_a_model_is_as_it_was_after_it_is_compiled(
    build: Callable[[], nn.Module], way: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    model = build()
    before = state(model)
    small = tensorize.compile(model, 0.9, progress=False, **way)
    assert state(model) == before
    assert any(site.format != "dense" for site in tensorize.report(small).sites)


def test_gradients_of_before_stay() -> None:
    model = Learns()
    model(X).sum().backward()
    before = state(model)
    tensorize.compile(model, 0.9, calibration=DATA, progress=False)
    assert state(model) == before


class Counts(Pair):
    """Multiplies by a buffer that it has just written to: a backward pass needs its value."""

    def __init__(self, step: float) -> None:
        super().__init__()
        self.step = step
        self.register_buffer("scale", torch.ones(32))

    def between(self, x: Tensor) -> Tensor:
        if self.step:
            self.scale += self.step
        return torch.tanh(x) * self.scale


@pytest.mark.parametrize("step", [0.0, 0.5])
@pytest.mark.parametrize("way", [{"calibration": DATA}, {"example_inputs": (X,)}])
def test_a_backward_pass_that_is_still_to_come_is_the_same(step: float, way: Any) -> None:
    """Whether or not the model writes to what the pass has saved."""
    gradients = []
    for busy in (False, True):
        torch.manual_seed(0)
        model = Counts(step)
        loss = model(X).square().sum()
        if busy:
            tensorize.analyze(model, progress=False, **way)
        loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for alone, beside in zip(*gradients, strict=True):
        assert alone is not None
        assert torch.equal(alone, beside)


def test_memory_that_may_not_be_written_is_not(tmp_path: Path) -> None:
    """A write to a read-only map ends the process."""
    np.save(tmp_path / "table.npy", np.ones((8, 32), dtype="float32"))
    table = np.load(tmp_path / "table.npy", mmap_mode="r")

    class Mapped(Pair):
        def __init__(self) -> None:
            super().__init__()
            with pytest.warns(UserWarning, match="not writable"):
                self.register_buffer("table", torch.from_numpy(table))

        def between(self, x: Tensor) -> Tensor:
            return torch.tanh(x + self.table[: len(x)])

    model = Mapped()
    small = tensorize.compile(model, 0.6, calibration=DATA, progress=False)
    tensorize.evaluate(small, model, DATA[:2])


def test_only_what_is_written_to_is_copied() -> None:
    model = Averages()
    (batch,) = calibration_batches([X], model)
    with untouched(model) as kept:
        once(model, batch)
        assert kept.written(model.mean)
        assert kept.written(model.count)
        assert not any(kept.written(p) for p in model.first.parameters())


def test_what_is_written_through_a_view_is_put_back() -> None:
    model = Pair()
    before = model.first.weight.detach().clone()
    writes = model.second.weight._version
    with keeping(model), watching(), torch.no_grad():
        model.first.weight.t()[3:5].zero_()
        torch._foreach_mul_([model.first.weight, model.first.bias], 2.0)
        torch.add(before, 1.0, out=model.second.weight.data)
    assert torch.equal(model.first.weight, before)
    assert model.second.weight._version == writes


def test_what_the_caller_means_to_change_stays_changed() -> None:
    model = Pair()
    with untouched(model, but=[model.first.weight]), watching():
        model.first.weight.zero_()
        model.second.weight.zero_()
    assert not model.first.weight.any()
    assert model.second.weight.any()


def test_what_a_model_writes_to_itself_stays_dense_with_the_reason() -> None:
    ids = [torch.arange(8)[None] + k for k in range(4)]
    limited = nn.Sequential(nn.Embedding(64, 32, max_norm=1.0), nn.Linear(32, 32))
    for model, data, names in (
        (limited, ids, {"0.weight": "when it runs"}),
        (Standardised(), DATA, {"first.weight": "when it runs", "third.weight": "when it runs"}),
        (_adapted(), DATA, {"0.weight": "train() and eval()"}),
    ):
        sites = tensorize.report(tensorize.compile(model, 0.95, calibration=data)).sites
        for name, why in names.items():
            (site,) = (site for site in sites if site.name == name)
            assert site.format == "dense"
            assert why in site.reason


@pytest.mark.parametrize("inputs", [{"example_inputs": (X,)}, {"calibration": DATA}])
def test_a_train_of_its_own_that_fails_is_told_and_the_way_out_works(inputs: Any) -> None:
    class Needs(Pair):
        def train(self, mode: bool, why: str) -> Needs:  # type: ignore[override]
            return super().train(mode)  # type: ignore[return-value]

    model = Needs()
    before = state(model)
    with pytest.raises(ModelError, match=r"model\.eval\(\) fails: TypeError.*why(.|\n)*training"):
        tensorize.compile(model, 0.6, **inputs)
    assert state(model) == before
    for module in model.modules():
        module.training = False
    tensorize.compile(model, 0.6, **inputs)
