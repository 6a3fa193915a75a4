"""Complex weights: a matrix, and one for every mode of a spectral convolution."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tensorize
from tensorize.algebra.factors import best_factors
from tensorize.algebra.metric import Metric
from tensorize.algebra.pivot import pivoted, plain
from tensorize.base.tensors import doubled, reals
from tensorize.formats.als import improved
from tensorize.formats.registry import named
from tensorize.ir.spec import TTSpec

CHANNELS, MODES, SIDE = 12, 3, 8


class Spectral(nn.Module):
    """A matrix for each of the lowest modes: fields (B, C, S, S) to the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        scale = width**-0.5
        self.weight = nn.Parameter(scale * torch.randn(width, width, MODES, MODES) * (1 + 1j))

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft2(x)
        modes = min(MODES, x.shape[-1] // 2)
        kept = self.weight[:, :, :modes, :modes]
        result = torch.zeros_like(spectrum)
        low = spectrum[..., :modes, :modes]
        result[..., :modes, :modes] = torch.einsum("bixy,ioxy->boxy", low, kept)
        return torch.fft.irfft2(result, s=x.shape[-2:])


class Operator(nn.Module):
    """A small Fourier neural operator."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.down = nn.Conv2d(1, CHANNELS, 1), nn.Conv2d(CHANNELS, 1, 1)
        self.first, self.second = Spectral(CHANNELS), Spectral(CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.second(torch.tanh(self.first(self.lift(x)))))


class Rotations(nn.Module):
    """Complex linears, of which the real part is seen."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.first = nn.Linear(24, 16, dtype=dtype)
        self.second = nn.Linear(16, 20, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(torch.complex(x, x.roll(1, -1)))
        return torch.view_as_real(self.second(y / (1 + y.abs()))).flatten(-2)


@pytest.fixture
def operator() -> Operator:
    torch.manual_seed(0)
    return Operator().eval()


def fields(number: int = 8, side: int = SIDE) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(8, 1, side, side) for _ in range(number)]


@pytest.mark.parametrize("metric", ["frobenius", "input", "loss"])
def test_a_matrix_for_every_mode_is_cut_in_every_metric(operator: Operator, metric: str) -> None:
    given = {"example_inputs": (fields()[0],)}
    given = given if metric == "frobenius" else {"calibration": fields()}
    small = tensorize.compile(operator, 0.25, metric=metric, **given)
    report = tensorize.report(small)
    first = next(site for site in report.sites if site.name == "first.weight")
    assert first.format == "low_rank"
    assert first.parameters_before == 2 * CHANNELS**2 * MODES**2
    after = sum(reals(p) for p in small.parameters())
    assert after == report.totals.after.parameters <= 0.25 * report.totals.before.parameters
    dense, x = tensorize.densify(small), fields()[1]
    assert dense.first.weight.shape == operator.first.weight.shape
    torch.testing.assert_close(small(x), dense(x), atol=1e-5, rtol=1e-5)
    assert first.actual_error == pytest.approx(first.predicted_error, rel=1e-3)


def test_the_predicted_loss_is_what_is_lost(operator: Operator) -> None:
    analysis = tensorize.analyze(operator, calibration=fields(16))
    torch.manual_seed(2)
    x = torch.randn(256, 1, SIDE, SIDE)
    wanted = operator(x).detach()
    plain_loss = None
    for budget in (0.5, 0.25):
        plan = analysis.plan(budget, refine=None)
        small = tensorize.apply(operator, plan)
        rows = wanted.reshape(-1, SIDE)
        lost = (small(x).detach() - wanted).square().sum() / (rows - rows.mean(0)).square().sum()
        assert plan.predicted.loss_interval is not None
        low, high = plan.predicted.loss_interval
        assert low / 1.2 <= float(lost) <= 1.2 * high
        plain_loss = float(lost)
    blind = tensorize.compile(operator, 0.25, example_inputs=(x[:8],), metric="frobenius")
    lost = (blind(x).detach() - wanted).square().sum() / (rows - rows.mean(0)).square().sum()
    assert plain_loss is not None
    assert plain_loss < 0.5 * float(lost)


def test_every_mode_is_weighed_by_what_it_meets_itself() -> None:
    """One mode that carries nothing costs nothing, however large its matrix is."""
    torch.manual_seed(0)
    model = nn.Sequential(Spectral(6))
    with torch.no_grad():
        model[0].weight[:, :, 2, 2] *= 100
    data = []
    for x in fields(4):
        spectrum = torch.fft.rfft2(x.expand(8, 6, SIDE, SIDE) * torch.randn(8, 6, 1, 1))
        spectrum[..., 2, 2] = 0
        data.append(torch.fft.irfft2(spectrum))
    small = tensorize.compile(model, ranks={"0.weight": 3}, budget=None, calibration=data)
    site = tensorize.report(small).sites[0]
    assert site.actual_error < 0.7  # of the other modes alone
    error = (small(data[0]) - model(data[0])).norm() / model(data[0]).norm()
    assert float(error.detach()) == pytest.approx(site.actual_error, rel=0.3)


def test_gradients_are_those_of_the_dense_weight(operator: Operator) -> None:
    for parameter in operator.parameters():
        parameter.data = doubled(parameter.data)
    small = tensorize.compile(operator, 0.4, calibration=[x.double() for x in fields()])
    cores = [p for name, p in small.named_parameters() if "core" in name]
    assert cores
    assert all(core.dtype == torch.complex128 for core in cores)
    x = fields()[0].double()
    found = torch.autograd.grad(small(x).square().sum(), cores)
    step = 1e-6
    for core, gradient in zip(cores, found, strict=True):
        for phase in (1.0, 1j):
            with torch.no_grad():
                direction = torch.randn_like(core.real) * phase
                core += step * direction
                up = small(x).square().sum()
                core -= 2 * step * direction
                down = small(x).square().sum()
                core += step * direction
            slope = (gradient.conj() * direction).sum().real
            torch.testing.assert_close((up - down) / (2 * step), slope, rtol=1e-5, atol=1e-8)


def test_it_is_kept_healed_and_run_at_fewer_modes(operator: Operator, tmp_path: Path) -> None:
    small = tensorize.compile(operator, 0.25, calibration=fields())
    tensorize.save(small, tmp_path)
    loaded = tensorize.load(tmp_path, model=Operator().eval())
    x = fields()[0]
    torch.testing.assert_close(loaded(x), small(x))
    coarse = fields(1, side=4)[0]  # has two modes, of three: the dense weight serves
    torch.testing.assert_close(small(coarse), tensorize.densify(small)(coarse))
    before = (small(x) - operator(x)).square().mean()
    tensorize.heal(small, operator, fields(), steps=20)
    assert (small(x) - operator(x)).square().mean() < before
    plan = tensorize.report(small).plan
    assert tensorize.Plan.from_json(plan.to_json()) == plan


def test_what_a_module_makes_of_its_own_class_is_dense() -> None:
    """As the tensors of tensorly-torch, which an index makes a new one of."""

    class Held(nn.Module):
        def __init__(self, tensor: Tensor) -> None:
            super().__init__()
            if isinstance(tensor, nn.Parameter):
                self.tensor = tensor
            else:
                self.register_buffer("tensor", tensor)

        def __getitem__(self, index: tuple) -> Held:
            return self.__class__(self.tensor[index])

    class Indexed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = Held(nn.Parameter(torch.randn(8, 8, 4, dtype=torch.cfloat)))

        def forward(self, x: Tensor) -> Tensor:
            kept = self.weight[slice(None), slice(None), slice(0, None)].tensor
            return torch.view_as_real(torch.einsum("bix,iox->box", torch.fft.fft(x), kept))

    torch.manual_seed(0)
    model = Indexed()
    small = tensorize.compile(model, 0.5, calibration=[torch.randn(8, 8, 4) for _ in range(4)])
    assert tensorize.report(small).sites[0].format == "low_rank"


@pytest.mark.parametrize("metric", ["frobenius", "input", "loss"])
def test_a_complex_matrix_is_cut(metric: str) -> None:
    torch.manual_seed(0)
    model = Rotations(torch.complex64)
    data = [torch.randn(32, 24) * torch.linspace(0.1, 2, 24) for _ in range(8)]
    given = {"example_inputs": (data[0],)} if metric == "frobenius" else {"calibration": data}
    small = tensorize.compile(model, 0.6, metric=metric, formats="low_rank", **given)
    report = tensorize.report(small)
    assert {site.format for site in report.sites} == {"low_rank"}
    torch.testing.assert_close(small(data[0]), tensorize.densify(small)(data[0]))
    for site in report.sites:  # refitted factors are of other inputs
        assert site.actual_error == pytest.approx(site.predicted_error, rel=1e-2)


def test_factors_in_a_hermitian_metric_are_the_best() -> None:
    """Against the truncated SVD of the whitened matrix (Eckart and Young)."""
    weight = torch.randn(9, 7, dtype=torch.complex128)
    left, right = (torch.linalg.cholesky(a @ a.mH) for a in _random((9, 12), (7, 12)))
    for matrix, metric in (
        (weight, Metric(0.5, left, right)),
        (weight.mH, Metric(1.0, right, left)),
    ):
        u, v = best_factors(matrix, metric, 3)
        white = metric.left.mH @ matrix @ metric.right  # type: ignore[union-attr]
        tail = torch.linalg.svdvals(white)[3:].square().sum() * metric.scale
        assert metric.norm(u @ v - matrix) == pytest.approx(float(tail), rel=1e-9)


def test_an_identity_is_not_stored() -> None:
    left, right = _random((6, 4), (4, 9))
    found = pivoted(left, right)
    assert float(found.rest.abs().max()) <= 1.05
    u, v = plain(found.left, found.rest, found.order.long())
    torch.testing.assert_close(u @ v, left @ right)


def test_a_sum_of_metrics_is_improved_on() -> None:
    (weight,) = _random((8, 8))
    metrics = [
        Metric(1.0, *(torch.linalg.cholesky(a @ a.mH) for a in _random((8, 9), (8, 9))))
        for _ in "ab"
    ]
    form, spec = named("low_rank"), TTSpec.low_rank(8, 8, 3)
    start = best_factors(weight, Metric(1.0, None, None), 3)
    before = form.error(spec, start, weight, metrics)
    after = form.error(spec, improved(form, spec, start, weight, metrics), weight, metrics)
    assert after < 0.9 * before


def test_a_product_with_the_conjugate_rebuilds_the_weight() -> None:
    class Conjugated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8, dtype=torch.cfloat))

        def forward(self, x: Tensor) -> Tensor:
            return torch.view_as_real(F.linear(x + 0j, self.weight.conj()))

    torch.manual_seed(0)
    model, x = Conjugated(), torch.randn(4, 8)
    small = tensorize.compile(model, ranks={"weight": 2}, budget=None, calibration=[x])
    torch.testing.assert_close(small(x), tensorize.densify(small)(x))
    assert tensorize.report(small).sites[0].kind == "conj"


def _random(*shapes: tuple[int, int]) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.complex128) for shape in shapes]


def test_it_is_exported_and_compiled(operator: Operator) -> None:
    small = tensorize.compile(operator, 0.25, calibration=fields(4))
    x = fields()[0]
    exported = torch.export.export(small, (x,)).module()
    torch.testing.assert_close(exported(x), small(x))
    lowered = torch.compile(small, backend="tensorize", options={"inner": "eager"})
    torch.testing.assert_close(lowered(x), small(x))
