"""What is no matmul is told as another use.

Shapes: B rows, M rows and N columns of the weight W, E experts.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.capture.calls import NO_MATMULS, M, N, draw, parameter
from tests.capture.observed import Seen, observe


@pytest.mark.parametrize("name", NO_MATMULS)
def test_what_is_no_matmul_is_told_as_another_use(name: str) -> None:
    shape, run = NO_MATMULS[name]
    weight = parameter(*shape)
    expected, seen = run(weight), observe(lambda: run(weight), weight)
    assert seen.matmuls == []
    assert seen.others
    assert isinstance(expected, Tensor)


def test_grouped_mm_of_two_matrices_is_no_matmul_against_a_stack() -> None:
    weight = parameter(16, 16, dtype=torch.float32)
    ends = torch.tensor([8, 16], dtype=torch.int32)
    seen = observe(
        lambda: F.grouped_mm(draw((16, 16), dtype=torch.float32), weight, offs=ends), weight
    )
    assert seen.matmuls == []
    assert len(seen.others) == 1


def test_asking_for_shape_dtype_and_device_is_no_use() -> None:
    weight = parameter(M, N)

    def ask() -> None:
        _ = weight.shape, weight.dtype, weight.device, weight.ndim, weight.is_contiguous()
        _ = weight.size(0), weight.dim(), len(weight), weight.requires_grad, weight.numel()

    assert observe(ask, weight) == Seen([], [])
