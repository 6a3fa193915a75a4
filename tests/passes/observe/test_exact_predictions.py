"""What the moments predict of a loss, where K-FAC is exact."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorize.capture.inputs import batch_of
from tensorize.passes.observe.loss import PreservedLoss
from tensorize.passes.observe.outputs import call
from tests.passes.observe.moments import Logits, collect, draw, predicted, the_term


def measured(model: nn.Module, name: str, delta: Tensor, batches: Sequence[Any]) -> float:
    """The rise of the preserved loss, directly."""
    given = [batch_of(value) for value in batches]
    loss = PreservedLoss.fit(model, given, None)
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.get_parameter(name).add_(delta)
        rises = [
            loss.rise(call(model, batch), call(changed, batch), batch, model) for batch in given
        ]
    return sum(total for total, _ in rises) / sum(rows for _, rows in rises)


class Softmax(nn.Module):
    """One linear layer with logits whose prediction hardly depends on the input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 5).double()
        with torch.no_grad():
            self.layer.weight.copy_(0.01 * draw((5, 6)))
            self.layer.bias.copy_(draw((5,), 1))

    def forward(self, x: Tensor) -> Logits:
        return Logits(self.layer(x))


def anisotropic(rows: int, width: int, seed: int) -> Tensor:
    """Correlated inputs of very different sizes, with a mean."""
    mixing = draw((width, width), 50) * torch.logspace(0, -1.5, width, dtype=torch.float64)
    return draw((rows, width), seed) @ mixing + 0.3


def test_kl_of_a_linear_softmax_is_predicted() -> None:
    """Labels drawn from the prediction give the Fisher, which does not depend on the input here."""
    model, batches = Softmax(), [anisotropic(4096, 6, seed) for seed in range(12)]
    term = the_term(collect(model, batches)["layer.weight"])
    for seed in range(4):
        delta = 1e-2 * draw((5, 6), 20 + seed)
        rise = measured(model, "layer.weight", delta, batches)
        # 50,000 labels: G is right to about 1 %; the third order of the KL is below that.
        assert predicted(term, delta) == pytest.approx(rise, rel=0.03)


def test_the_squared_error_of_a_linear_layer_is_predicted() -> None:
    """Gauss-Newton is exact here: of any ΔW, small or not."""
    model, batches = nn.Linear(6, 5).double(), [anisotropic(4096, 6, seed) for seed in range(12)]
    term = the_term(collect(model, batches)["weight"])
    for seed in range(4):
        delta = draw((5, 6), 20 + seed)
        rise = measured(model, "weight", delta, batches)
        assert predicted(term, delta) == pytest.approx(rise, rel=0.03)


def test_the_squared_error_of_an_embedding_is_predicted() -> None:
    model = nn.Embedding(6, 5).double()
    chance = torch.tensor([0.5, 0.3, 0.1, 0.06, 0.03, 0.01])
    generator = torch.Generator().manual_seed(0)
    batches = [
        torch.multinomial(chance, 4096, replacement=True, generator=generator) for _ in range(12)
    ]
    term = the_term(collect(model, batches)["weight"])
    assert term.rows is not None
    assert term.rows.dim() == 1
    for seed in range(4):
        delta = draw((6, 5), 20 + seed)
        rise = measured(model, "weight", delta, batches)
        assert predicted(term, delta) == pytest.approx(rise, rel=0.03)


def test_the_squared_error_of_a_convolution_of_separate_places_is_predicted() -> None:
    """Patches that do not overlap are rows of a linear layer."""
    model = nn.Conv2d(2, 5, 2, stride=2).double()
    batches = [draw((256, 2, 4, 4), seed) for seed in range(12)]
    term = the_term(collect(model, batches)["weight"])
    delta = draw((5, 8), 20)
    rise = measured(model, "weight", delta.reshape(5, 2, 2, 2), batches)
    # Rows of the output are its last axis: 8 of them, of 2 places each, for every picture.
    assert predicted(term, delta) == pytest.approx(rise, rel=0.05)


def test_the_squared_error_of_a_convolution_in_groups_is_predicted() -> None:
    model = nn.Conv2d(4, 6, 2, stride=2, groups=2).double()
    batches = [draw((256, 4, 4, 4), seed) for seed in range(12)]
    term = the_term(collect(model, batches)["weight"])
    delta = draw((2, 3, 8), 20)
    rise = measured(model, "weight", delta.reshape(6, 2, 2, 2), batches)
    assert predicted(term, delta) == pytest.approx(rise, rel=0.05)


@pytest.mark.parametrize("padding", [0, 1])
def test_the_squared_error_of_a_transposed_convolution_is_predicted(padding: int) -> None:
    """Pixels whose patches of the output do not overlap, some of them cut at the border."""
    model = nn.ConvTranspose2d(3, 2, 2, stride=2, padding=padding).double()
    batches = [draw((256, 3, 4, 4), seed) for seed in range(12)]
    term = the_term(collect(model, batches)["weight"])
    delta = draw((3, 8), 20)
    rise = measured(model, "weight", delta.reshape(3, 2, 2, 2), batches)
    assert predicted(term, delta) == pytest.approx(rise, rel=0.05)


class Routed(nn.Module):
    """Every row goes to the expert that its first entry names."""

    def __init__(self, loop: bool) -> None:
        super().__init__()
        self.stack, self.loop = nn.Parameter(draw((4, 5, 6))), loop

    def forward(self, x: Tensor) -> Tensor:
        if not self.loop:  # rows in equal parts
            return torch.einsum("ern,emn->erm", x.reshape(4, -1, 6), self.stack).flatten(0, 1)
        return torch.cat([F.linear(p, self.stack[e]) for e, p in enumerate(x.chunk(4))])


@pytest.mark.parametrize("loop", [True, False], ids=["one by one", "stacked"])
def test_the_squared_error_of_experts_is_predicted(loop: bool) -> None:
    """Each of them sees its own rows only."""
    model, batches = Routed(loop), [anisotropic(4096, 6, seed) for seed in range(12)]
    term = the_term(collect(model, batches)["stack"])
    delta = draw((4, 5, 6), 20)
    rise = measured(model, "stack", delta, batches)
    assert predicted(term, delta) == pytest.approx(rise, rel=0.03)


def test_the_squared_error_of_grouped_experts_is_predicted() -> None:
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stack = nn.Parameter(draw((4, 8, 16), dtype=torch.float32))

        def forward(self, x: Tensor) -> Tensor:
            ends = torch.arange(1, 5, dtype=torch.int32) * (len(x) // 4)
            return F.grouped_mm(x, self.stack, offs=ends)

    model, batches = Grouped(), [anisotropic(4096, 8, seed).float() for seed in range(12)]
    term = the_term(collect(model, batches)["stack"])
    delta = draw((4, 8, 16), 20)
    rise = measured(model, "stack", delta.float(), batches)
    assert predicted(term, delta) == pytest.approx(rise, rel=0.03)


def test_the_squared_error_of_a_packed_weight_is_predicted() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(draw((6, 6)))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([F.linear(x, part) for part in self.weight.chunk(3)], -1)

    model, batches = Packed(), [anisotropic(4096, 6, seed) for seed in range(12)]
    term = the_term(collect(model, batches)["weight"])
    delta = draw((6, 6), 20)
    rise = measured(model, "weight", delta, batches)
    assert predicted(term, delta) == pytest.approx(rise, rel=0.03)


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_the_squared_error_of_a_bag_is_predicted(mode: str) -> None:
    """Bags of different rows: of equal ones the errors would not be independent."""
    model = nn.EmbeddingBag(512, 5, mode=mode).double()
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(512, (4096, 4), generator=generator) for _ in range(12)]
    term = the_term(collect(model, batches)["weight"])
    delta = draw((512, 5), 20)
    rise = measured(model, "weight", delta, batches)
    assert predicted(term, delta) == pytest.approx(rise, rel=0.05)


def test_several_outputs_count_each_as_a_mean_over_its_own_rows() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 5).double()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.layer(x)
            return y, y[::4] * 3.0

    model, batches = Two(), [anisotropic(4096, 6, seed) for seed in range(12)]
    term = the_term(collect(model, batches)["layer.weight"])
    delta = draw((5, 6), 20)
    rise = measured(model, "layer.weight", delta, batches)
    assert predicted(term, delta) == pytest.approx(rise, rel=0.03)
