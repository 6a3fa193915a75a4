"""Second moments where weights are used as a whole, and samples are told apart."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import tensorize
from tensorize.passes.observe import moments as observe_moments
from tests.passes.observe.moments import close, collect, draw, the_term


class Pooled(nn.Module):
    """One output row of all positions of a sample: (B, T, 5), or (T, B, 5), to (B, 3)."""

    def __init__(self, *, time_first: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(5, 3).double()
        self.head = nn.Linear(3, 3).double()
        self.time = 0 if time_first else 1

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).tanh().sum(self.time))


def gradients_of_samples(model: nn.Module, x: Tensor) -> Tensor:
    """What autograd gives for the layer's weight, of each sample's own probe: (B, 3, 5)."""
    y = model(x)
    variance = float((y - y.mean(0)).detach().square().sum(1).mean())
    noise = torch.randn(len(y), 3, generator=torch.Generator().manual_seed(0))
    probe = (noise * y.float()).sum(1) * (2 / variance) ** 0.5
    found = [torch.autograd.grad(p, model.layer.weight, retain_graph=True)[0] for p in probe]
    return torch.stack(found)


# ----------------------------------------------------------------- weights that are used as a whole


class Both(nn.Module):
    """A weight, or a stack of them, that a matmul uses and another function as well."""

    def __init__(self, experts: int, whole: bool) -> None:
        super().__init__()
        shape = (experts, 6, 6) if experts else (6, 6)
        self.weight, self.whole = nn.Parameter(draw(shape)), whole

    def forward(self, x: Tensor) -> Tensor:
        y = (
            x @ self.weight
            if self.weight.dim() == 2
            else torch.bmm(x.expand(3, -1, -1), self.weight)
        )
        return y + self.weight.square().sum() if self.whole else y


def test_what_is_used_by_a_matmul_and_as_a_whole_counts_once() -> None:
    """The gradient of the whole weight is of both uses: no rows are added beside it."""
    model, x = Both(0, whole=True), draw((9, 6))
    term = the_term(collect(model, [x])["weight"])
    assert term.contract == "whole"
    assert term.rows is not None
    assert term.rows.shape == (6, 6)
    assert the_term(collect(Both(0, whole=False), [x])["weight"]).contract == "rows"


@pytest.mark.parametrize("budget", [0.9, 0.6])
def test_a_stack_that_is_used_in_both_ways_compiles(budget: float) -> None:
    model = nn.Sequential(nn.Linear(6, 48), nn.Linear(48, 6), Both(3, whole=True)).float()
    small = tensorize.compile(model, budget, calibration=[draw((9, 6)).float() for _ in range(4)])
    kept = sum(p.numel() for p in small.parameters())
    assert kept <= budget * sum(p.numel() for p in model.parameters())


# ------------------------------------------------------------------------------- samples as a whole


@pytest.mark.parametrize("time", [2, 4, 40], ids="{} positions".format)
def test_where_a_sample_has_one_output_row_its_positions_add_up(time: int) -> None:
    """The two sides are moments of the gradients of whole samples, by autograd."""
    model, x = Pooled(), draw((9, time, 5))
    term = the_term(collect(model, [x])["layer.weight"])
    d = gradients_of_samples(model, x)
    close(term.rows, (d @ d.mT).mean(0), torch.float32)
    close(term.columns, (d.mT @ d).sum(0) / d.square().sum(), torch.float32)
    assert term.pooled == 9
    assert term.input_rows == 9 * time


def test_their_metric_is_right_where_k_fac_is_not() -> None:
    """Gradients are the same at all positions: what an error does is ΔW times the mean input."""

    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.layer = nn.Linear(6, 200, bias=False).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).mean(1)

    model = Mean()
    x = draw((300, 8, 6)) + 0.5 * draw((300, 1, 6), 1)
    y = model(x).detach()
    variance = float((y - y.mean(0)).square().sum(1).mean())
    delta = 0.1 * draw((200, 6), 2)
    exact = float((x.mean(1) @ delta.T).square().sum(1).mean()) / variance

    def predicted(*, by_sample: bool) -> float:
        term = the_term(collect(model, [x], by_sample=by_sample)["layer.weight"])
        assert term.rows is not None
        assert term.columns is not None
        return 0.5 * float((term.rows @ delta * (delta @ term.columns)).sum())

    assert predicted(by_sample=True) == pytest.approx(exact, rel=0.05)
    assert predicted(by_sample=False) < 0.5 * exact


def test_samples_are_told_apart_whatever_comes_first() -> None:
    x = draw((9, 4, 5))
    one = the_term(collect(Pooled(), [x])["layer.weight"])
    other = the_term(collect(Pooled(time_first=True), [x.transpose(0, 1)])["layer.weight"])
    close(one.rows, other.rows)
    close(one.columns, other.columns)
    assert one.noise == pytest.approx(other.noise)


def test_what_stands_in_padding_counts_in_nothing() -> None:
    class Masked(Pooled):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
            y = torch.where(mask[..., None], self.layer(x).tanh(), 0.0)
            return self.head(y.sum(1))

    x, mask = draw((9, 4, 5)), torch.ones(9, 4, dtype=torch.bool)
    mask[3:, 2:] = False
    wild = torch.where(mask[..., None], x, 1e30)
    one, other = (
        the_term(collect(Masked(), [{"x": given, "mask": mask}])["layer.weight"])
        for given in (x, wild)
    )
    assert one.input_rows == int(mask.sum())
    close(one.rows, other.rows)
    close(one.columns, other.columns)


def test_outputs_of_every_position_are_rows_of_their_own() -> None:
    """Nothing is added up there, nor for a weight that meets one row of each sample."""

    class Positions(Pooled):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(x))

    found = collect(Positions(), [draw((9, 4, 5))])
    assert not any(term.pooled for moments in found.values() for term in moments.terms.values())
    pooled = collect(Pooled(), [draw((9, 4, 5))])
    assert the_term(pooled["layer.weight"]).pooled == 9
    assert the_term(pooled["head.weight"]).pooled == 0


def test_an_image_is_one_sample_of_a_convolution() -> None:
    class Image(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Conv2d(2, 3, 2).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).tanh().sum((2, 3))

    model, x = Image(), draw((7, 2, 4, 5))
    term = the_term(collect(model, [x])["layer.weight"])
    d = gradients_of_samples(model, x).reshape(7, 3, 8)
    close(term.rows, (d @ d.mT).mean(0), torch.float32)
    assert term.pooled == 7


@pytest.mark.parametrize("size", [(3, 2, 4), (2, 7, 5), (9, 4, 6)], ids=str)
def test_moments_of_samples_are_those_of_their_gradients(size: tuple[int, int, int]) -> None:
    """With many positions the gradients are made, with few they are not; in parts or at once."""
    time, rows, columns = size
    g, x = draw((11, time, rows)), draw((11, time, columns), 1)
    d = g.mT @ x
    want = (d @ d.mT).sum(0), (d.mT @ d).sum(0), (d @ d.mT).square().sum()
    for held in (16_000_000, 3 * rows * columns):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(observe_moments, "_ELEMENTS", held)
            got = observe_moments.sample_moments(g, x)
        close(got[0], want[0])
        close(got[1], want[1])
        assert got[2] == pytest.approx(float(want[2]))
