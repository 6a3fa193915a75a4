"""Hidden units in the order in which they are read: the same function without a pass over them."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tensorize
from tests.models import parameters, relative
from tests.weight.gated import Gated, Mixed, ReadElsewhere


class Plain(Gated):
    def hidden(self, x: Tensor) -> Tensor:
        return 0.5 * F.gelu(self.up(x), approximate="tanh").flatten(0, 1).view(2, -1, 64) + 1


class GivenBack(Gated):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        hidden = self.hidden(x)
        return self.down(hidden), hidden


class Scaled(Gated):
    """Each unit has a gain of its own, which would have to move as well."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(64))

    def hidden(self, x: Tensor) -> Tensor:
        return self.gain * super().hidden(x)


class Again(Gated):
    """Another linear reads the hidden units."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.hidden(x)
        return self.down(hidden) + self.other(hidden)


class AddedTo(Gated):
    def hidden(self, x: Tensor) -> Tensor:
        return super().hidden(x) + torch.cat([x, x], -1)


class Tied(Gated):
    """The rows of up are columns elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Linear(32, 64, bias=False)
        self.again.weight = self.up.weight

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.again(x)[..., :32]


X = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))


def small(kind: type[Gated], ranks: dict[str, int]) -> nn.Module:
    torch.manual_seed(0)
    model = kind().eval()
    made = tensorize.compile(model, None, ranks=ranks, metric="frobenius", example_inputs=(X,))
    return tensorize.weight.pivoted(made)


@pytest.mark.parametrize("kind", [Gated, Plain])
@pytest.mark.parametrize("ranks", [{"*": 12}, {"down*": 12}])
def test_linears_compute_in_the_order_that_reads_them(
    kind: type[Gated], ranks: dict[str, int]
) -> None:
    model = small(kind, ranks)
    want, before, dense = model(X).detach(), parameters(model), copy.deepcopy(model)
    assert tensorize.weight.aligned(model, (X,)) is model
    assert model.down.spec.pivoted == 64  # type: ignore[union-attr]
    assert model.down.order.tolist() == [0]  # type: ignore[union-attr]
    assert relative(model(X).detach(), want) < 1e-6
    assert parameters(model) == before
    assert any("down.weight: its input" in note for note in tensorize.report(model).notes)
    assert torch.equal(dense(X).detach(), want)
    with torch.no_grad():
        assert relative(tensorize.densify(model)(X), want) < 1e-5
        assert relative(tensorize.weight.plain(model)(X), want) < 1e-5


def test_the_dense_model_keeps_its_weights() -> None:
    torch.manual_seed(0)
    dense = Gated().eval()
    before = copy.deepcopy(dense.state_dict())
    model = tensorize.compile(dense, None, ranks={"down*": 12}, metric="frobenius")
    tensorize.weight.aligned(tensorize.weight.pivoted(model), (X,))
    assert all(torch.equal(dense.state_dict()[name], value) for name, value in before.items())


@pytest.mark.parametrize("kind", [ReadElsewhere, GivenBack, Mixed, Scaled, Again, AddedTo, Tied])
def test_what_is_read_elsewhere_stays_as_it_is(kind: type[Gated]) -> None:
    model = small(kind, {"down*": 12})
    before = copy.deepcopy(model.state_dict())
    tensorize.weight.aligned(model, (X,))
    assert model.down.spec.pivoted == 1  # type: ignore[union-attr]
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_hook_may_look_at_hidden_units() -> None:
    model = small(Gated, {"*": 12})
    model.up.register_forward_hook(lambda *_: None)  # type: ignore[union-attr]
    tensorize.weight.aligned(model, (X,))
    assert model.down.spec.pivoted == 1  # type: ignore[union-attr]


def test_other_dense_weights_are_loaded_into_it_as_they_stand() -> None:
    straight = small(Gated, {"*": 12})
    model = tensorize.weight.aligned(copy.deepcopy(straight), (X,))
    cores = [id(p) for p in model.parameters()]
    torch.manual_seed(1)
    other = Gated().eval().state_dict()
    for each in (straight, model):
        tensorize.load_dense(each, other, example_inputs=(X,))
    assert [id(p) for p in model.parameters()] == cores
    assert relative(model(X).detach(), straight(X).detach()) < 1e-5
    assert parameters(model) == parameters(straight)


def test_it_is_saved_trained_and_exported_like_any_other(tmp_path: Path) -> None:
    model = tensorize.weight.aligned(small(Gated, {"*": 12}), (X,))
    tensorize.save(model, tmp_path / "small")
    again = tensorize.load(tmp_path / "small", Gated())
    assert torch.equal(again(X), model(X))
    again(X).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in again.parameters())
    assert torch.export.export(model, (X,)).module()(X).allclose(model(X))
