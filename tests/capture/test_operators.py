"""Layers of neural operators and of vector models: what is found in them, and what is said."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tensorize
from tensorize.base.errors import BudgetError
from tensorize.base.tensors import parameter_of, reals


class Spherical(nn.Module):
    """A complex matrix for every degree of a spherical harmonic transform, whose Legendre part is
    a fixed matrix (Bonev et al. 2023): the layer of an SFNO."""

    def __init__(self, width: int = 24, degrees: int = 8, rows: int = 16) -> None:
        super().__init__()
        self.legendre = nn.Buffer(torch.linalg.qr(torch.randn(rows, degrees))[0])
        shape = width, width, degrees
        self.weight = nn.Parameter(torch.randn(shape, dtype=torch.cfloat) / width)

    def forward(self, field: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(field, dim=-1)[..., :8]
        harmonics = torch.einsum("bihm,hl->bilm", spectrum, self.legendre.cfloat())
        mixed = torch.einsum("bilm,iol->bolm", harmonics, self.weight)
        rows = torch.einsum("bolm,hl->bohm", mixed, self.legendre.cfloat())
        return field + torch.fft.irfft(rows, n=field.shape[-1])


class BlockDiagonal(nn.Module):
    """A complex two-layer network on the modes, in blocks, as pairs of real stacks (Guibas et al.
    2021): the layer of an AFNO, of which FourCastNet is made."""

    def __init__(self, width: int = 24, blocks: int = 2) -> None:
        super().__init__()
        side = width // blocks
        self.first = nn.Parameter(torch.randn(2, blocks, side, side) / side)
        self.second = nn.Parameter(torch.randn(2, blocks, side, side) / side)

    def forward(self, field: Tensor) -> Tensor:
        spectrum = torch.fft.rfft2(field.movedim(1, -1), dim=(1, 2))
        x = spectrum.unflatten(-1, (self.first.shape[1], -1))
        y = _product(x, self.first)
        y = torch.complex(F.relu(y.real), F.relu(y.imag))
        mixed = _product(y, self.second).flatten(-2)
        return field + torch.fft.irfft2(mixed, dim=(1, 2), s=field.shape[-2:]).movedim(-1, 1)


def _product(x: Tensor, pair: Tensor) -> Tensor:
    def one(part: Tensor, k: int) -> Tensor:
        return torch.einsum("...bi,bio->...bo", part, pair[k])

    return torch.complex(
        one(x.real, 0) - one(x.imag, 1),
        one(x.imag, 0) + one(x.real, 1),
    )


class Slices(nn.Module):
    """Attention between slices that points belong to in parts (Wu et al. 2024): a Transolver's."""

    def __init__(self, width: int = 24, heads: int = 2, slices: int = 6) -> None:
        super().__init__()
        side = width // heads
        self.heads = heads
        self.points, self.belongs = nn.Linear(width, width), nn.Linear(side, slices)
        self.query, self.key, self.value = (nn.Linear(side, side) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, field: Tensor) -> Tensor:
        x = self.points(field.flatten(2).mT).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        share = self.belongs(x).softmax(-1)
        tokens = share.mT @ x / (share.sum(-2).unsqueeze(-1) + 1e-5)
        q, k, v = self.query(tokens), self.key(tokens), self.value(tokens)
        tokens = F.scaled_dot_product_attention(q, k, v)
        return field + self.out((share @ tokens).transpose(1, 2).flatten(2)).mT.view_as(field)


@pytest.mark.slow
@pytest.mark.parametrize("layer", [Spherical, BlockDiagonal, Slices])
def test_layers_of_operators_come_to_a_quarter(layer: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 24, 1), layer(), nn.GELU(), layer(), nn.Conv2d(24, 1, 1))
    data = [torch.randn(4, 1, 16, 16) for _ in range(4)]
    analysis = tensorize.analyze(model.eval(), calibration=data, refine=None)
    whole = sum(map(reals, model.parameters()))
    lost = []
    for budget in (0.5, 0.25):
        plan = analysis.plan(budget, refine=None)
        small = tensorize.apply(model, plan)
        assert sum(map(reals, small.parameters())) <= budget * whole
        with torch.no_grad():
            outputs, wanted = small(data[0]), model(data[0])
            torch.testing.assert_close(
                tensorize.densify(small)(data[0]), outputs, atol=1e-4, rtol=0
            )
        lost.append(float((outputs - wanted).square().mean() / wanted.var()))
    assert lost[0] < lost[1] < 1


class Pairs(nn.Module):
    """tensorly-torch's way of complex tensors: pairs of reals, shown as complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_parameter("tensor", nn.Parameter(torch.randn(16, 16, 2)))

    def __getattr__(self, key: str) -> object:
        value = super().__getattr__(key)
        return torch.view_as_complex(value) if isinstance(value, nn.Parameter) else value

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,io->bo", x.cfloat(), self.tensor).real  # type: ignore[arg-type]


class Halved(nn.Module):
    """A module that gives half of what it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.register_parameter("held", nn.Parameter(torch.randn(16, 16)))

    def __getattr__(self, key: str) -> object:
        value = super().__getattr__(key)
        return 0.5 * value if key == "held" else value

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.held  # type: ignore[operator]


def test_pairs_of_reals_that_are_shown_as_complex_numbers_stay_with_that_reason() -> None:
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(16, 16), Pairs()), [torch.randn(32, 16) for _ in range(4)]
    held = parameter_of(model, "1.tensor")
    assert (held.shape, held.is_complex()) == ((16, 16, 2), False)
    small = tensorize.compile(model, 0.9, calibration=data, refine=None)
    (reason,) = [s.reason for s in tensorize.report(small).sites if s.name == "1.tensor"]
    assert "pairs of reals" in reason
    with pytest.raises(BudgetError, match="shows complex numbers in their place"):
        tensorize.compile(model, 0.25, calibration=data, refine=None)
    with pytest.raises(AttributeError, match=r"1\.none is no parameter"):
        parameter_of(model, "1.none")


def test_a_module_may_show_something_else_than_what_it_holds() -> None:
    torch.manual_seed(0)
    model, data = (
        nn.Sequential(nn.Linear(16, 16), Halved()),
        [torch.randn(32, 16) for _ in range(4)],
    )
    with torch.no_grad():
        wanted = model(data[0])
        small = tensorize.compile(model, None, ranks={"0.weight": "full"}, calibration=data)
        torch.testing.assert_close(small(data[0]), wanted, atol=1e-4, rtol=1e-4)
    half = tensorize.compile(model, 0.9, calibration=data, refine=None)
    assert sum(p.numel() for p in half.parameters()) <= 0.9 * 528
    assert torch.equal(model(data[0]), wanted)
