"""Second moments of the inputs of every kind of call.

Shapes: B batch, T time, D width, V vocabulary, M and N rows and columns of a weight.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorize.passes.observe import moments as observe_moments
from tests.passes.observe.moments import close, collect, draw, second_moment, the_term


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


@pytest.mark.parametrize(
    ("stride", "padding", "dilation"), [(1, 0, 1), ((2, 1, 3), 1, 1), (1, (2, 0, 1), (1, 2, 1))]
)
def test_inputs_of_a_convolution_in_three_dimensions(
    stride: Any, padding: Any, dilation: Any
) -> None:
    """As of videos, whose patches are read over several frames."""
    model = nn.Conv3d(2, 3, (2, 3, 1), stride, padding, dilation).double()
    x = draw((4, 2, 5, 6, 7))
    units = torch.eye(12, dtype=torch.float64).reshape(12, 2, 2, 3, 1)
    rows = F.conv3d(x, units, None, stride, padding, dilation).movedim(1, -1)
    term = the_term(collect(model, [x], "input")["weight"])
    close(term.columns, second_moment(rows))
    assert term.input_rows == rows.shape[:-1].numel()


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


def test_half_precision_is_summed_in_float32() -> None:
    model, x = nn.Linear(64, 3).bfloat16(), draw((512, 64)).bfloat16()
    term = the_term(collect(model, [x, x], "input")["weight"])
    assert term.columns is not None
    assert term.columns.dtype == torch.float32
    close(term.columns, second_moment(x), torch.float32)
