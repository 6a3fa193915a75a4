"""Second moments: what they are, what they leave out, and what they leave as it was.

Shapes: B batch, T time, D width, V vocabulary, M and N rows and columns of a weight.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tensorize
from tensorize.base.errors import AnalysisError, CaptureError
from tensorize.capture.batches import calibration_batches
from tensorize.capture.inputs import batch_of
from tensorize.ir.sites import Batch
from tensorize.passes.observe import moments as observe_moments
from tensorize.passes.observe.loss import PreservedLoss
from tensorize.passes.observe.moments import Moments, Term
from tensorize.passes.observe.outputs import call
from tensorize.passes.observe.sites import FindSites
from tensorize.passes.observe.statistics import CollectStatistics
from tensorize.passes.pipeline import Program


def draw(shape: Sequence[int], seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def collect(
    model: nn.Module,
    batches: Sequence[Any],
    metric: str = "loss",
    *,
    loss_fn: Any = None,
    seed: int = 0,
    by_sample: bool = True,
) -> dict[str, Moments]:
    """The moments of every site; the pipeline up to and with ``statistics``."""
    program = run(model, batches, metric, loss_fn=loss_fn, seed=seed, by_sample=by_sample)
    return dict(program.statistics)


def run(
    model: nn.Module,
    given: Sequence[Any],
    metric: str,
    *,
    loss_fn: Any = None,
    seed: int = 0,
    by_sample: bool = True,
) -> Program:
    batches = tuple(batch_of(value) for value in given)
    program = Program(model, batches[0], batches, metric, seed)
    program = FindSites().run(program)
    loss = PreservedLoss.fit(model, batches, loss_fn) if metric == "loss" else None
    return CollectStatistics(batches, loss, most_probes=1, by_sample=by_sample).run(program)


def the_term(moments: Moments) -> Term:
    (term,) = moments.terms.values()
    return term


def second_moment(rows: Tensor) -> Tensor:
    """Mean of x xᵀ, one row at a time."""
    rows = rows.double().reshape(-1, rows.shape[-1])
    return torch.stack([torch.outer(x, x) for x in rows]).mean(0)


def close(got: Tensor | None, want: Tensor | None, dtype: torch.dtype = torch.float64) -> None:
    """Equal to the rounding of sums of at most some thousands of products."""
    if want is None or got is None:
        assert got is want
        return
    assert got.shape == want.shape
    allowed = 1e4 * torch.finfo(dtype).eps * float(want.abs().max())
    assert float((got - want).abs().max()) <= allowed


def same(one: dict[str, Moments], two: dict[str, Moments], dtype: torch.dtype) -> None:
    assert one.keys() == two.keys()
    for name in one:
        assert one[name].terms.keys() == two[name].terms.keys(), name
        for contract, term in one[name].terms.items():
            other = two[name].terms[contract]
            assert term.input_rows == other.input_rows, name
            close(term.rows, other.rows, dtype)
            close(term.columns, other.columns, dtype)


# ------------------------------------------------------------------------- the inputs' moments


class Projection(nn.Module):
    """As GPT-2's Conv1D: the weight is stored (in, out)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(draw((inputs, outputs)))
        self.bias = nn.Parameter(draw((outputs,)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight)


@pytest.mark.parametrize("lead", [(7,), (2, 3), (2, 3, 4)])
def test_inputs_of_a_linear_layer_whatever_its_leading_axes(lead: tuple[int, ...]) -> None:
    model = nn.Linear(5, 3).double()
    batches = [draw((*lead, 5), seed) for seed in range(3)]
    term = the_term(collect(model, batches, "input")["weight"])
    assert term.contract == "columns"
    assert term.input_rows == 3 * math.prod(lead)
    close(term.columns, second_moment(torch.stack(batches)))
    assert term.rows is None


def test_inputs_of_a_weight_stored_turned() -> None:
    batches = [draw((2, 6, 5), seed) for seed in range(3)]
    term = the_term(collect(Projection(5, 3), batches, "input")["weight"])
    assert term.contract == "rows"
    close(term.rows, second_moment(torch.stack(batches)))
    assert term.columns is None


def test_inputs_of_an_embedding_are_the_frequencies_of_its_rows() -> None:
    ids = torch.tensor([[0, 3, 3], [5, 1, 3]])
    term = the_term(collect(nn.Embedding(7, 4).double(), [ids, ids + 1], "input")["weight"])
    assert term.contract == "lookup"
    close(term.rows, torch.tensor([1, 2, 1, 3, 3, 1, 1]).double() / 12)
    assert term.columns is None
    assert term.input_rows == 12


@pytest.mark.parametrize(
    ("stride", "padding", "dilation"), [(1, 0, 1), (2, 1, 1), ((1, 2), (2, 0), (1, 2))]
)
def test_inputs_of_a_convolution_are_its_patches(stride: Any, padding: Any, dilation: Any) -> None:
    model = nn.Conv2d(2, 3, (3, 2), stride, padding, dilation).double()
    x = draw((4, 2, 7, 8))
    # Every output is a patch times a kernel: kernels that are unit vectors give the patches back.
    units = torch.eye(12, dtype=torch.float64).reshape(12, 2, 3, 2)
    rows = F.conv2d(x, units, None, stride, padding, dilation).movedim(1, -1)
    term = the_term(collect(model, [x], "input")["weight"])
    close(term.columns, second_moment(rows))
    assert term.input_rows == rows.shape[:-1].numel()


@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, 0, 1), (2, 3, 1), (1, 2, 2)])
def test_inputs_of_a_convolution_in_one_dimension(stride: int, padding: int, dilation: int) -> None:
    model = nn.Conv1d(2, 3, 3, stride, padding, dilation).double()
    x = draw((4, 2, 11))
    units = torch.eye(6, dtype=torch.float64).reshape(6, 2, 3)
    rows = F.conv1d(x, units, None, stride, padding, dilation).movedim(1, -1)
    term = the_term(collect(model, [x], "input")["weight"])
    close(term.columns, second_moment(rows))
    assert term.input_rows == rows.shape[:-1].numel()


@pytest.mark.parametrize("kernel", [(3, 3), (2, 4)])
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_inputs_of_a_convolution_padded_by_a_word(padding: str, kernel: tuple[int, int]) -> None:
    model = nn.Conv2d(2, 3, kernel, padding=padding, dilation=(1, 2)).double()
    x, width = draw((4, 2, 7, 8)), 2 * math.prod(kernel)
    units = torch.eye(width, dtype=torch.float64).reshape(width, 2, *kernel)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch copies to pad unevenly
        rows = F.conv2d(x, units, None, 1, padding, (1, 2)).movedim(1, -1)
        term = the_term(collect(model, [x], "input")["weight"])
    close(term.columns, second_moment(rows))


def test_inputs_of_a_convolution_in_groups_are_pooled() -> None:
    model = nn.Conv2d(4, 6, (3, 2), groups=2).double()
    x = draw((4, 4, 7, 8))
    units = torch.eye(12, dtype=torch.float64).reshape(12, 2, 3, 2)
    rows = [F.conv2d(part, units).movedim(1, -1).flatten(0, -2) for part in x.chunk(2, 1)]
    term = the_term(collect(model, [x], "input")["weight"])
    close(term.columns, second_moment(torch.cat(rows)))


def test_inputs_of_a_transposed_convolution_are_its_pixels() -> None:
    model = nn.ConvTranspose2d(3, 2, (3, 2), stride=2).double()
    x = draw((4, 3, 5, 4))
    term = the_term(collect(model, [x], "input")["weight"])
    assert term.contract == "rows"
    close(term.rows, second_moment(x.movedim(1, -1)))


def test_inputs_of_a_convolution_in_three_dimensions_are_known_by_their_size() -> None:
    model, x = nn.Conv3d(2, 3, 3, padding=1).double(), draw((4, 2, 5, 6, 7))
    term = the_term(collect(model, [x, 3 * x], "input")["weight"])
    close(term.columns, 5 * x.square().mean() * torch.ones(54, dtype=torch.float64))


def test_rows_of_a_packed_weight_have_their_own_gradients() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(draw((6, 5)))

        def forward(self, x: Tensor) -> Tensor:
            one, two = self.weight.split([2, 4])
            return torch.cat([F.linear(x, one), F.linear(2 * x, two)], -1)

    x = draw((9, 5))
    term = the_term(collect(Packed(), [x])["weight"])
    plain = nn.Linear(5, 6, bias=False).double()
    plain.weight = Packed().weight
    assert term.rows is not None
    assert (term.rows[:2, 2:] == 0).all()
    assert (term.rows.diagonal() > 0).all()
    close(term.columns, second_moment(torch.cat([x, 2 * x])))


def test_both_uses_of_a_tied_weight_are_kept_apart() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(7, 4).double()

        def forward(self, ids: Tensor) -> Tensor:
            return F.linear(torch.tanh(self.embedding(ids)), self.embedding.weight)

    model, ids = Tied(), torch.tensor([[0, 3, 3], [5, 1, 3]])
    terms = collect(model, [ids], "input")["embedding.weight"].terms
    assert list(terms) == ["lookup", "columns"]
    close(terms["lookup"].rows, torch.tensor([1, 1, 0, 3, 0, 1, 0]).double() / 6)
    close(terms["columns"].columns, second_moment(torch.tanh(model.embedding(ids)).detach()))


def test_two_uses_of_one_kind_are_one_sum() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 5).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(torch.tanh(self.layer(x)))

    model, x = Twice(), draw((6, 5))
    term = the_term(collect(model, [x], "input")["layer.weight"])
    assert term.input_rows == 12
    hidden = torch.tanh(model.layer(x)).detach()
    close(term.columns, second_moment(torch.cat([x, hidden])))


def test_experts_share_one_moment() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stack = nn.Parameter(draw((3, 4, 5)))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([F.linear(x[e : e + 2], self.stack[e]) for e in range(3)])

    x = draw((4, 5))
    term = the_term(collect(Experts(), [x], "input")["stack"])
    assert term.input_rows == 6
    close(term.columns, second_moment(torch.cat([x[e : e + 2] for e in range(3)])))


def test_a_wide_side_keeps_only_its_diagonal(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Linear(5, 3).double(), draw((9, 5))
    full = the_term(collect(model, [x])["weight"])
    assert full.columns is not None
    assert full.rows is not None
    monkeypatch.setattr(observe_moments, "LARGEST_FULL_MOMENT", 4)
    wide = the_term(collect(model, [x])["weight"])
    close(wide.columns, full.columns.diagonal())
    close(wide.rows, full.rows)
    monkeypatch.setattr(observe_moments, "LARGEST_FULL_MOMENT", 2)
    close(the_term(collect(model, [x])["weight"]).rows, full.rows.diagonal())


def test_half_precision_is_summed_in_float32_and_kept_in_float64() -> None:
    model, x = nn.Linear(64, 3).bfloat16(), draw((512, 64)).bfloat16()
    term = the_term(collect(model, [x, x], "input")["weight"])
    assert term.columns is not None
    assert term.columns.dtype == torch.float64
    close(term.columns, second_moment(x), torch.float32)


# ---------------------------------------------------------------------- the gradients' moments


@dataclass
class Logits:
    logits: Tensor


class Classifier(nn.Module):
    """Two layers, and logits."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 6).double(), nn.Linear(6, 4).double()

    def forward(self, x: Tensor) -> Logits:
        return Logits(self.second(torch.tanh(self.first(x))))


def test_gradients_of_logits_are_those_of_labels_drawn_from_the_prediction() -> None:
    model, x = Classifier(), draw((9, 5))
    a = model.first(x).detach().requires_grad_()
    z = model.second(torch.tanh(a))
    z.retain_grad()
    chance = z.detach().float().softmax(-1)
    labels = torch.multinomial(chance, 1, generator=torch.Generator().manual_seed(3))
    F.cross_entropy(z, labels[:, 0], reduction="sum").backward()
    assert a.grad is not None
    assert z.grad is not None
    found = collect(model, [x], seed=3)
    # The loss is taken in float32, whatever the model's dtype.
    close(the_term(found["first.weight"]).rows, second_moment(a.grad), torch.float32)
    close(the_term(found["second.weight"]).rows, second_moment(z.grad), torch.float32)
    close(the_term(found["first.weight"]).columns, second_moment(x))


def test_gradients_of_other_outputs_are_those_of_gaussian_probes() -> None:
    model, x = nn.Linear(5, 3).double(), draw((9, 5))
    y = model(x).detach()
    variance = float((y - y.mean(0)).square().sum(1).mean())
    noise = torch.randn(9, 3, generator=torch.Generator().manual_seed(3))
    term = the_term(collect(model, [x], seed=3)["weight"])
    close(term.rows, second_moment(noise) * 2 / variance, torch.float32)


def test_gradients_of_a_loss_of_the_caller() -> None:
    model, x, target = nn.Linear(5, 3).double(), draw((9, 5)), draw((9, 3), 1)
    found = collect(
        model,
        [{"input": x}],
        loss_fn=lambda outputs, batch: (outputs - target).square().sum(1).mean(),
    )
    term = the_term(found["weight"])
    close(term.rows, second_moment(2 * (model(x) - target).detach()))


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


def test_gradients_are_summed_over_a_sites_rows_and_averaged_over_the_outputs() -> None:
    """A site that sees many rows for every row of the output matters as much more."""

    class Summed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).sum(1)

    x = draw((9, 4, 5))
    model = Summed()
    y = model(x).detach()
    variance = float((y - y.mean(0)).square().sum(1).mean())
    noise = torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
    term = the_term(collect(model, [x], by_sample=False)["layer.weight"])
    assert term.input_rows == 36
    close(term.rows, 4 * second_moment(noise) * 2 / variance, torch.float32)


def test_recurrent_layers_have_gradients_in_evaluation_mode_on_a_gpu_too() -> None:
    """Not by cuDNN, which is then left out."""
    used: list[bool] = []

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.LSTM(5, 6, batch_first=True), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            used.append(torch.backends.cudnn.enabled)
            return self.head(self.layer(x)[0])

    before = torch.backends.cudnn.enabled
    collect(Recurrent().double(), [draw((2, 4, 5))])
    assert not any(used)
    assert torch.backends.cudnn.enabled == before
    used.clear()
    plain = touchy()
    plain.register_forward_hook(lambda *_: used.append(torch.backends.cudnn.enabled))
    collect(plain, [draw((8, 5)).float()])
    assert all(seen == before for seen in used)


# ----------------------------------------------------------- weights that are used as a whole


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


# ------------------------------------------------------------------------- samples as a whole


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


def test_gradients_of_frozen_weights_are_the_same() -> None:
    x = draw((9, 5))
    torch.manual_seed(0)
    model = Classifier()
    free = collect(model, [x])
    model.requires_grad_(False)
    same(free, collect(model, [x]), torch.float64)


def test_inputs_that_carry_gradients_make_no_difference() -> None:
    model, x = Classifier(), draw((9, 5))
    plain = collect(model, [x])
    leaf = x.clone().requires_grad_()
    same(plain, collect(model, [leaf]), torch.float64)
    same(plain, collect(model, [leaf * 1.0]), torch.float64)
    assert leaf.grad is None


def test_calls_by_keyword_make_no_difference() -> None:
    class Keywords(Classifier):
        def forward(self, x: Tensor) -> Logits:
            hidden = F.linear(input=x, weight=self.first.weight, bias=self.first.bias)
            hidden = torch.tanh(hidden)
            return Logits(F.linear(hidden, bias=self.second.bias, weight=self.second.weight))

    x = draw((9, 5))
    model, twin = Classifier(), Keywords()
    twin.load_state_dict(model.state_dict())
    same(collect(model, [x]), collect(twin, [x]), torch.float64)


def test_an_output_changed_in_place_makes_no_difference() -> None:
    class InPlace(Classifier):
        def forward(self, x: Tensor) -> Logits:
            return Logits(self.second(self.first(x).tanh_()).add_(1.0))

    x = draw((9, 5))
    model, twin = Classifier(), InPlace()
    twin.load_state_dict(model.state_dict())
    same(collect(model, [x]), collect(twin, [x]), torch.float32)


def test_an_input_changed_in_place_after_its_use_makes_no_difference() -> None:
    class Residual(nn.Module):
        def __init__(self, in_place: bool) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(5, 5).double(), nn.Linear(5, 4).double()
            self.in_place = in_place

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(x)
            y = self.first(x)
            x = x.add_(y) if self.in_place else x + y
            return self.second(x)

    x = draw((9, 5))
    model, twin = Residual(False), Residual(True)
    twin.load_state_dict(model.state_dict())
    for metric in ("input", "loss"):
        same(collect(model, [x], metric), collect(twin, [x], metric), torch.float64)


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not() -> None:
    model, x = Classifier(), draw((9, 5))
    one, two = (the_term(collect(model, [x], seed=3)["first.weight"]) for _ in range(2))
    assert one.rows is not None
    assert two.rows is not None
    assert torch.equal(one.rows, two.rows)
    other = the_term(collect(model, [x], seed=4)["first.weight"]).rows
    assert other is not None
    assert not torch.equal(one.rows, other)


def test_a_weight_that_no_output_depends_on_is_left_out_with_a_note() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(5, 3).double(), nn.Linear(5, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            self.idle(x)
            return self.used(x)

    program = run(Idle(), [draw((9, 5))], "loss")
    assert program.statistics["idle.weight"].terms == {}
    assert program.statistics["used.weight"].terms
    assert any("idle.weight: no counted output depends on it" in note for note in program.notes)


def test_outputs_without_any_gradient_are_an_error_with_a_way_out() -> None:
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 3).double()

        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    with pytest.raises(AnalysisError, match="do not depend on any weight") as caught:
        collect(Detached(), [draw((9, 5))])
    assert 'metric="input"' in str(caught.value)
    term = the_term(collect(Detached(), [draw((9, 5))], "input")["layer.weight"])
    close(term.columns, second_moment(draw((9, 5))))


def test_the_frobenius_metric_runs_nothing() -> None:
    program = run(Classifier(), [draw((9, 5))], "frobenius")
    assert program.statistics == {}


# ------------------------------------------------------------------------------ masks and labels

V, D, T = 11, 8, 6


class Encoder(nn.Module):
    """Attention over what the mask shows, positions in a table, logits or hidden states."""

    def __init__(self, logits: bool, causal: bool = False) -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(V, D), nn.Embedding(16, D)
        self.qkv, self.out, self.head = nn.Linear(D, 3 * D), nn.Linear(D, D), nn.Linear(D, V)
        self.logits, self.causal = logits, causal
        self.double()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Any:
        time = input_ids.shape[1]
        x = self.table(input_ids) + self.places(torch.arange(time))
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, -1)
        shown = torch.ones(1, 1, time, time, dtype=torch.bool)
        if self.causal:
            shown = shown.tril()
        if attention_mask is not None:
            shown = shown & (attention_mask[:, None, None] != 0)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=shown).squeeze(1)
        y = self.head(torch.tanh(x + self.out(mixed)))
        return Logits(y) if self.logits else y


def ids(batch: int = 4, time: int = T, seed: int = 0) -> Tensor:
    return torch.randint(V, (batch, time), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("logits", [True, False])
@pytest.mark.parametrize("metric", ["input", "loss"])
def test_padding_on_the_right_changes_nothing(metric: str, logits: bool) -> None:
    torch.manual_seed(0)
    model = Encoder(logits)
    plain = [{"input_ids": ids(seed=s)} for s in range(3)]
    padded = []
    for seed in range(3):
        tokens = torch.cat([ids(seed=seed), ids(time=4, seed=99)], 1)
        mask = torch.ones(4, T + 4, dtype=torch.long)
        mask[:, T:] = 0
        padded.append({"input_ids": tokens, "attention_mask": mask})
    same(collect(model, padded, metric), collect(model, plain, metric), torch.float32)


@pytest.mark.parametrize("logits", [True, False])
@pytest.mark.parametrize("metric", ["input", "loss"])
def test_what_stands_at_padded_positions_changes_nothing(metric: str, logits: bool) -> None:
    torch.manual_seed(0)
    model = Encoder(logits)
    mask = torch.ones(4, T, dtype=torch.bool)
    mask[1, 4:], mask[2, :2], mask[3, 1:] = False, False, False
    one, two = ids(seed=1), ids(seed=1)
    two[~mask] = ids(seed=2)[~mask]
    assert not torch.equal(one, two)
    found = [
        collect(model, [{"input_ids": tokens, "attention_mask": mask}], metric)
        for tokens in (one, two)
    ]
    # Zero gradients are zero only up to what rounding leaves of hidden positions: nothing.
    same(*found, torch.float64)
    assert the_term(found[0]["table.weight"]).input_rows == int(mask.sum())


@pytest.mark.parametrize("causal", [True, False])
def test_positions_labelled_minus_100_count_in_nothing(causal: bool) -> None:
    """No output there is preserved; of the inputs, those count that a counted output needs."""
    torch.manual_seed(0)
    model = Encoder(logits=True, causal=True)
    if causal:
        model.loss_type = "ForCausalLM"  # type: ignore[assignment]
    tokens = ids()
    labels = tokens.clone()
    labels[:, 4:] = -100
    # In a causal language model position t predicts label t + 1.
    seen = 3 if causal else 4
    found = collect(model, [{"input_ids": tokens, "labels": labels}])
    want = collect(model, [{"input_ids": tokens[:, :seen]}])
    same(found, want, torch.float32)


@pytest.mark.parametrize("logits", [True, False])
def test_the_loss_itself_counts_neither_padding_nor_labels_of_minus_100(logits: bool) -> None:
    torch.manual_seed(0)
    model, other = Encoder(logits), Encoder(logits)
    mask = torch.ones(4, T, dtype=torch.long)
    mask[:, 5:] = 0
    labels = torch.zeros(4, T, dtype=torch.long)
    labels[:, 4] = -100
    tokens = ids()
    hidden = tokens.clone()
    hidden[:, 5] = (hidden[:, 5] + 1) % V
    rises = []
    for given in (tokens, hidden):
        kwargs = {"input_ids": given, "attention_mask": mask, "labels": labels}
        batch = batch_of(kwargs)
        loss = PreservedLoss.fit(model, [batch], None)
        with torch.no_grad():
            dense, changed = call(model, batch), call(other, batch)
            rises.append(loss.rise(dense, changed, batch, model))
    assert rises[0][1] == rises[1][1] == 4 * 4
    assert rises[0][0] == pytest.approx(rises[1][0], rel=1e-6)
    assert rises[0][0] > 0


def test_logits_of_minus_infinity_are_no_loss() -> None:
    """Forbidden classes: chance zero before and after."""
    batch, model = Batch((), {}, None), nn.Linear(1, 1)
    dense, changed = draw((5, 4)), draw((5, 4), 1)
    allowed = PreservedLoss.fit(Constant(dense), [batch], None).rise(
        Logits(dense), Logits(changed), batch, model
    )
    forbidden = torch.full((5, 2), -math.inf, dtype=torch.float64)
    wide, wide_changed = (torch.cat([z, forbidden], 1) for z in (dense, changed))
    loss = PreservedLoss.fit(Constant(wide), [batch], None)
    rise = loss.rise(Logits(wide), Logits(wide_changed), batch, model)
    assert rise == pytest.approx(allowed, rel=1e-6)
    scalar, rows = loss.probe(
        Logits(wide.requires_grad_()), batch, model, torch.Generator().manual_seed(0)
    )
    (gradient,) = torch.autograd.grad(scalar, wide)
    assert rows == 5
    assert torch.isfinite(gradient).all()


class Constant(nn.Module):
    """Logits that depend on nothing."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.value = logits

    def forward(self) -> Logits:
        return Logits(self.value)


# --------------------------------------------------------- the prediction, where K-FAC is exact


def predicted(term: Term, delta: Tensor) -> float:
    """½ tr(G ΔW C ΔWᵀ), for several matrices their sum."""

    def full(moment: Tensor | None, width: int) -> Tensor:
        if moment is None:
            return torch.eye(width, dtype=torch.float64)
        return moment.diag() if moment.dim() == 1 else moment

    rows, columns = full(term.rows, delta.shape[-2]), full(term.columns, delta.shape[-1])
    return 0.5 * float((rows @ delta * (delta @ columns)).sum())


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


# ------------------------------------------------------------------- the model stays as it was


class Touchy(nn.Module):
    """Batch norm, dropout, a buffer that counts calls, and a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(0.5)
        self.second = nn.Linear(6, 3)
        self.second.weight.requires_grad_(False)
        self.register_buffer("calls", torch.zeros(()))
        self.calls: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.second(self.drop(self.norm(self.first(x))) + 0 * torch.rand(()))


@dataclass
class State:
    """All that a calibration could change."""

    values: dict[str, Tensor]
    modes: list[bool]
    needs: list[bool]
    gradients: list[Tensor | None]
    random: Tensor

    @classmethod
    def of(cls, model: nn.Module) -> State:
        return cls(
            {key: value.clone() for key, value in model.state_dict().items()},
            [module.training for module in model.modules()],
            [p.requires_grad for p in model.parameters()],
            [None if p.grad is None else p.grad.clone() for p in model.parameters()],
            torch.get_rng_state(),
        )

    def check(self, other: State) -> None:
        assert self.modes == other.modes
        assert self.needs == other.needs
        assert torch.equal(self.random, other.random)
        assert self.values.keys() == other.values.keys()
        assert all(torch.equal(self.values[key], other.values[key]) for key in self.values)
        for a, b in zip(self.gradients, other.gradients, strict=True):
            assert (a is None) == (b is None)
            assert a is None or b is None or torch.equal(a, b)


def touchy() -> Touchy:
    model = Touchy()
    model(draw((8, 5)).float()).sum().backward()  # gradients of the caller's own
    model.train()
    model.drop.eval()
    return model


@pytest.mark.parametrize("metric", ["input", "loss"])
def test_the_model_stays_as_it_was(metric: str) -> None:
    model = touchy()
    before = State.of(model)
    collect(model, [draw((8, 5), seed).float() for seed in range(3)], metric)
    before.check(State.of(model))
    assert all(not module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("metric", ["input", "loss"])
def test_the_model_stays_as_it_was_when_a_batch_fails(metric: str) -> None:
    model = touchy()
    before = State.of(model)
    good, bad = draw((8, 5)).float(), draw((8, 7)).float()
    batches = calibration_batches((good, good, bad, good), model)
    program = FindSites().run(Program(model, batches[0], batches, metric))
    loss = PreservedLoss.fit(model, batches[:2], None) if metric == "loss" else None
    with pytest.raises(CaptureError, match="batch 2 does not fit"):
        CollectStatistics(batches, loss).run(program)
    before.check(State.of(model))


def test_the_model_stays_as_it_was_when_the_loss_of_the_caller_fails() -> None:
    model = touchy()
    before = State.of(model)

    def loss_fn(outputs: Tensor, batch: Any) -> Tensor:
        raise ZeroDivisionError("not mine")

    with pytest.raises(ZeroDivisionError):
        collect(model, [draw((8, 5)).float()], loss_fn=loss_fn)
    before.check(State.of(model))


def test_calibration_tensors_stay_as_they_were() -> None:
    model, x = Classifier(), draw((9, 5))
    before = x.clone()
    collect(model, [x])
    assert torch.equal(x, before)
    assert not x.requires_grad


# ---------------------------------------------------------------------------- how many samples


def test_rows_not_seen_yet_are_expected_as_often_as_rows_seen_once() -> None:
    """Good (1953), on draws from a known distribution: the mass of what was not drawn."""
    generator = torch.Generator().manual_seed(0)
    chance = torch.rand(2000, generator=generator).pow(6)
    chance /= chance.sum()
    drawn = torch.multinomial(chance, 600, replacement=True, generator=generator)
    counts = torch.bincount(drawn, minlength=2000).double()
    missed = float(chance[counts == 0].sum())
    assert observe_moments.unseen_share(counts, 1) == pytest.approx(missed, abs=0.05)
    assert observe_moments.unseen_share(4 * counts, 4) == observe_moments.unseen_share(counts, 1)


def test_few_output_rows_are_probed_several_times() -> None:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).mean(1)

    data = [torch.randn(4, 9, 6) for _ in range(4)]
    analysis = tensorize.analyze(Mean(), calibration=data, refine=None)
    (step,) = [s for s in analysis.program.history if s.name == "statistics"]
    assert "in 4 probes" in step.summary


def test_gradients_of_one_output_row_count_once() -> None:
    term = Term("columns", input_rows=400, output_rows=12, probes=4)
    assert term.samples == (12, 100)
    assert Term("rows", input_rows=400, output_rows=12, probes=4).samples == (100, 12)
