"""Models whose inputs or weights are of rarer kinds: they work, or one true sentence is said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tensorize
from tests.marks import slow
from tests.models import relative

X = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
SPARSE = X * (X > 1)


# --------------------------------------------------------------------------------- sparse inputs


class Features(nn.Module):
    """Multiplies a sparse matrix of features by a weight, in one of the ways that there are."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w, self.l = nn.Parameter(torch.randn(64, 48) / 8), nn.Linear(64, 48)
        self.out, self.how = nn.Linear(48, 64), how

    def forward(self, x: Tensor) -> Tensor:
        first = {
            "mm": lambda: torch.mm(x, self.w),
            "matmul": lambda: x @ self.w,
            "sparse.mm": lambda: torch.sparse.mm(x, self.w),
            "linear": lambda: self.l(x),
        }[self.how]()
        return self.out(first.relu())


def coo(x: Tensor) -> Tensor:
    return x.to_sparse()


def csr(x: Tensor) -> Tensor:
    return x.to_sparse_csr()


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("layout", [coo, csr])
@pytest.mark.parametrize("how", ["mm", "sparse.mm", "linear"])
@pytest.mark.parametrize("form", ["low_rank", slow("tt")])
@pytest.mark.parametrize("metric", ["frobenius", "input", "loss"])
def test_sparse_inputs(layout: Any, how: str, form: str, metric: str) -> None:
    given = layout(SPARSE)
    how_made = {"metric": metric, "formats": form}
    model = Features(how)
    if metric == "frobenius":
        small = tensorize.compile(model, 0.7, example_inputs=(given,), **how_made)
    else:
        how_made["refine"] = "refit"
        small = tensorize.compile(model, 0.7, calibration=[given, given], **how_made)
    small.requires_grad_(False)
    assert tensorize.report(small).factorized
    assert relative(small(given), tensorize.densify(small)(SPARSE).detach()) < 1e-5
    if metric != "frobenius":  # what is learnt is what dense inputs teach
        usual = tensorize.compile(model, 0.7, calibration=[SPARSE] * 2, **how_made)
        # Rounding may choose between ranks that are as good.
        assert relative(small(given), usual(SPARSE).detach()) < 0.1


# ------------------------------------------------------------------------------ torch.vmap inside


class Field(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(2, 64), nn.Linear(64, 64), nn.Linear(64, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(lambda v: self.c(torch.sin(self.b(torch.sin(self.a(v))))))(x)


class Slopes(Field):
    def forward(self, x: Tensor) -> Tensor:
        def value(v: Tensor) -> Tensor:
            return self.c(torch.sin(self.b(torch.sin(self.a(v))))).sum()

        return torch.vmap(torch.func.grad(value))(x)


class Ensemble(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(5, 64, 64) / 8)
        self.w2 = nn.Parameter(torch.randn(5, 64, 8) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(lambda a, b: torch.tanh(x @ a) @ b)(self.w1, self.w2).mean(0)


@pytest.mark.parametrize("kind", [Field, Slopes])
@pytest.mark.parametrize("metric", [None, "loss"])
def test_weights_used_under_vmap_are_calibrated(kind: type[nn.Module], metric: str | None) -> None:
    model, x = kind(), torch.randn(32, 2)
    small = tensorize.compile(model, 0.6, calibration=[x, x], metric=metric)
    assert tensorize.report(small).factorized
    assert relative(small(x).detach(), tensorize.densify(small)(x).detach()) < 1e-4
    alone = tensorize.compile(model, 0.6, metric="frobenius", example_inputs=(x,))
    assert tensorize.report(alone).factorized


@pytest.mark.parametrize("kind", [Field, Slopes])
def test_rows_under_vmap_cannot_be_observed(kind: type[nn.Module]) -> None:
    model, x = kind(), torch.randn(32, 2)
    with pytest.raises(tensorize.CaptureError, match=r"^a\.weight: .*vmap") as caught:
        tensorize.compile(model, 0.6, calibration=[x, x], metric="input")
    assert 'metric="loss"' in str(caught.value.way_out)
    tensorize.compile(model, 0.6, calibration=[x, x], metric="loss")


@pytest.mark.own_data
def test_without_data_it_makes_its_own() -> None:
    small = tensorize.compile(Field(), 0.6, example_inputs=(torch.randn(32, 2),))
    assert tensorize.report(small).factorized


@pytest.mark.parametrize("metric", [None, "input", "frobenius"])
def test_weights_that_vmap_takes_stay_dense_for_that_reason(metric: str | None) -> None:
    options = {"example_inputs": (X,)} if metric == "frobenius" else {"calibration": [X, X]}
    with pytest.raises(tensorize.BudgetError, match=r"w1 .*: it is used by torch\.vmap"):
        tensorize.compile(Ensemble(), 0.6, metric=metric, **options)
    kept = tensorize.compile(Ensemble(), 1.0, metric=metric, **options)
    assert all("torch.vmap" in site.reason for site in tensorize.report(kept).sites)


# --------------------------------------------------------------------------------- other weights


class Complex(nn.Module):
    def __init__(self, last: torch.dtype) -> None:
        super().__init__()
        self.a = nn.Linear(64, 128, dtype=torch.cfloat)
        self.b = nn.Linear(128, 64, dtype=last)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x.to(torch.cfloat))
        return self.b(y if self.b.weight.is_complex() else y.abs()).abs()


@pytest.mark.parametrize("metric", [None, "input", "frobenius"])
@pytest.mark.parametrize("last", [torch.cfloat, torch.float32], ids=["complex", "mixed"])
def test_complex_weights_are_compressed_whatever_the_data(
    metric: str | None, last: torch.dtype
) -> None:
    options = {"example_inputs": (X,)} if metric == "frobenius" else {"calibration": [X, X]}
    small = tensorize.compile(Complex(last), 0.6, metric=metric, **options)
    report = tensorize.report(small)
    assert {site.name for site in report.factorized} == {"a.weight", "b.weight"}
    assert report.totals.share.parameters <= 0.6
    assert relative(small(X).detach(), tensorize.densify(small)(X).detach()) < 1e-5


def test_integer_weights_only() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.ones(8, 8, dtype=torch.int32), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return x[:, :8] @ self.table.to(x.dtype)

    with pytest.raises(tensorize.BudgetError, match=r"its dtype is int32"):
        tensorize.compile(Table(), 0.6, calibration=[X, X])


# ----------------------------------------------------------------- gradients of the model's own


class Product(torch.autograd.Function):
    """x Wᵀ, with a backward pass of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.t()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return gradients[0] @ w, gradients[0].t() @ x


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.l = nn.Parameter(torch.randn(96, 64) / 8), nn.Linear(96, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.l(torch.relu(Product.apply(x, self.w)))


class Frequencies(nn.Module):
    """The first linear's input carries a gradient of a parameter that no matmul uses."""

    def __init__(self, learnt: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.f, self.learnt = nn.Parameter(torch.linspace(0.1, 4, 64)), learnt
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        f = self.f if self.learnt else self.f.detach()
        return self.second(torch.tanh(self.first(torch.sin(x * f))))


class Moving(Frequencies):
    """Asks for a gradient of its own input, as force fields do."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach().requires_grad_())


def test_a_function_with_a_backward_of_its_own_hides_no_layer_behind_it() -> None:
    analysis = tensorize.analyze(Custom(), calibration=[X, X])
    assert not any(note.startswith("l.weight") for note in analysis.notes)


@pytest.mark.parametrize("kind", [lambda: Frequencies(True), lambda: Moving(False)])
def test_what_asks_for_a_gradient_beside_changes_nothing(kind: Any) -> None:
    data = [X[:8], X[8:]]
    usual = tensorize.analyze(Frequencies(False), calibration=data)
    other = tensorize.analyze(kind(), calibration=data)
    assert other.notes == usual.notes
    assert other.plan(0.5).sites == usual.plan(0.5).sites


# ------------------------------------------------------------------------------ times in notes


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e, self.h = nn.Embedding(50, 32), nn.Linear(256, 50)
        self.r = nn.GRU(32, 256, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        return self.h(self.r(self.e(ids))[0])


def test_a_recurrent_weight_is_timed_with_its_rebuilding() -> None:
    ids = torch.randint(0, 50, (4, 16))
    small = tensorize.compile(Recurrent(), 0.4, metric="frobenius", example_inputs=(ids,))
    report = tensorize.report(small)
    notes = [note for note in report.notes if note.startswith("r.weight_hh_l0")]
    (note,) = notes
    assert "rebuilt from its factors at every call" in note
    predicted, measured = note.partition(": slower")[2].split("; ")
    ours, dense = (_microseconds(part) for part in measured.split(", "))
    assert ours > 2 * dense  # a product of 768 x 256 alone would be as fast as the dense one
    assert "predicted" in predicted
    reasons = {site.name: site.reason for site in report.sites}
    assert "the budget cannot be met otherwise" in reasons["r.weight_hh_l0"]


def _microseconds(text: str) -> float:
    number, unit, *_ = text.split()
    return float(number) * {"ns": 1e-3, "µs": 1.0, "ms": 1e3}[unit]


def test_recurrent_weights_stay_dense_where_others_are_enough() -> None:
    ids = torch.randint(0, 50, (4, 16))
    small = tensorize.compile(Recurrent(), 0.98, metric="frobenius", example_inputs=(ids,))
    assert not any(site.name.startswith("r.") for site in tensorize.report(small).factorized)


def test_a_table_is_timed_by_lookups() -> None:
    model = nn.Sequential(nn.Embedding(4000, 64), nn.Linear(64, 64))
    ids = torch.randint(0, 4000, (4, 16))
    small = tensorize.compile(
        model, 0.5, metric="frobenius", example_inputs=(ids,), exclude="1.weight"
    )
    notes = [n for n in tensorize.report(small).notes if n.startswith("0.weight: slower")]
    for note in notes:  # 4000 x 64 products for 16 rows would take far longer than 16 lookups
        assert _microseconds(note.rpartition("; ")[2].split(", ")[1]) < 40
    assert F.embedding(ids, small[0].weight).shape == (4, 16, 64)
