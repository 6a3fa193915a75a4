"""Calls against a weight, read as matmuls: each one against what torch itself computes.

Shapes: B and T rows, M rows and N columns of the weight W, E experts, C channels.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorize.capture.matmul import Frame, Matmul
from tensorize.capture.observer import Observer
from tensorize.capture.uses import patches
from tests.capture.calls import CALLS, IDS, B, E, M, N, T, draw, parameter
from tests.capture.observed import check, the_matmul


@pytest.mark.parametrize("name", CALLS)
def test_a_call_is_read_as_the_matmul_that_it_is(name: str) -> None:
    call = CALLS[name]
    weight = parameter(*call.weight)
    frame, matmul, output = the_matmul(lambda: call.run(weight), weight)
    assert (matmul.kind, matmul.contract, frame) == (call.kind, call.contract, Frame())
    assert matmul.split == call.split
    check(frame, matmul, output, weight)


def test_a_transposed_convolution_is_a_matmul_of_its_pixels() -> None:
    """Each pixel times W is a patch of the output; patches that overlap are added up."""
    weight = parameter(N, M, 3, 2)
    x, size = draw((B, N, 5, 4)), (5 * 2 + 1, 4 * 2)
    frame, matmul, output = the_matmul(
        lambda: F.conv_transpose2d(x, weight, draw((M,)), stride=2), weight
    )
    assert (matmul.kind, matmul.contract, frame) == ("conv_transpose2d", "rows", Frame())
    rows = patches(matmul, (3, 2))
    assert rows is not None
    columns = (rows @ weight.detach().reshape(N, -1)).reshape(B, 20, -1).transpose(1, 2)
    expected = F.fold(columns, size, (3, 2), stride=2) + draw((M,))[:, None, None]
    torch.testing.assert_close(output.detach(), expected)


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_a_bag_is_a_lookup_of_several_rows(mode: str) -> None:
    weight, ends = parameter(M, N), torch.tensor([0, 4])
    frame, matmul, output = the_matmul(
        lambda: F.embedding_bag(IDS.flatten(), weight, ends, mode=mode, padding_idx=1), weight
    )
    assert (matmul.kind, matmul.contract, frame) == ("embedding_bag", "lookup", Frame())
    assert matmul.bag is not None
    assert torch.equal(F.embedding_bag(matmul.x, weight, **matmul.bag), output)


@pytest.mark.parametrize("separate", [False, True], ids=["packed", "separate"])
def test_attention_is_looked_into(separate: bool) -> None:
    widths = {"kdim": 6, "vdim": 10} if separate else {}
    model = nn.MultiheadAttention(8, 2, batch_first=True, **widths).double()
    x, k, v = draw((2, T, 8)), draw((2, T, 6)), draw((2, T, 10))
    given = (x, k, v) if separate else (x, x, x)
    expected, told, others = model(*given)[0], [], []

    def on_matmul(name: str, frame: Frame, matmul: Matmul, output: Tensor) -> Tensor:
        told.append(name)
        check(frame, matmul, output, dict(model.named_parameters())[name])
        return output

    with Observer(model.named_parameters(), on_matmul, lambda name, _: others.append(name)):
        got = model(*given)[0]
    torch.testing.assert_close(got, expected)
    if separate:
        inside = ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
    else:
        inside = ["in_proj_weight"]
    assert list(dict.fromkeys(told)) == [*inside, "out_proj.weight"]
    assert [name for name in others if "weight" in name] == []


def test_grouped_mm_is_read_as_one_matmul_an_expert() -> None:
    weight = parameter(E, 8, 16, dtype=torch.float32)
    x, ends = draw((10, 8), dtype=torch.float32), torch.tensor([4, 4, 10], dtype=torch.int32)
    for run in (
        lambda: F.grouped_mm(x, weight, offs=ends),
        lambda: torch._grouped_mm(x, weight, ends),
    ):
        frame, matmul, output = the_matmul(run, weight)
        assert (matmul.kind, matmul.contract, frame) == ("grouped_mm", "rows", Frame())
        check(frame, matmul, output, weight)


def test_grouped_mm_against_transposed_experts() -> None:
    weight = parameter(E, 16, 8, dtype=torch.float32)
    x, ends = draw((10, 8), dtype=torch.float32), torch.tensor([4, 4, 10], dtype=torch.int32)
    frame, matmul, output = the_matmul(
        lambda: F.grouped_mm(x, weight.transpose(-2, -1), offs=ends), weight
    )
    assert (matmul.contract, frame) == ("columns", Frame(transposed=True))
    check(frame, matmul, output, weight)


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("kernel", [(3, 3), (2, 3)])
def test_patches_of_a_padding_in_words(padding: str, kernel: tuple[int, int]) -> None:
    weight = parameter(M, 2, *kernel)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch copies to pad unevenly
        frame, matmul, output = the_matmul(
            lambda: F.conv2d(draw((B, 2, 7, 7)), weight, padding=padding, dilation=2), weight
        )
    check(frame, matmul, output, weight)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("padding", [0, (1, 0, 2), "same"])
def test_patches_in_three_dimensions(padding: Any, groups: int) -> None:
    weight = parameter(M, 4 // groups, 3, 1, 3)
    frame, matmul, output = the_matmul(
        lambda: F.conv3d(draw((B, 4, 5, 4, 6)), weight, padding=padding, groups=groups), weight
    )
    assert matmul.kind == "conv3d"
    check(frame, matmul, output, weight)
