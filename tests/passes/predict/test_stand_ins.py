"""What stands for a weight in a trial answers whatever a model asks of the weight itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensorize.capture.observer import StandIns
from tensorize.ir.spec import TTSpec
from tensorize.passes.rewrite.factorize import stand_in

USES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": F.linear,
    "a method of the input": lambda x, w: x.matmul(w.t()),
    "transpose": lambda x, w: x @ w.transpose(0, 1),
    "an attribute that is a view": lambda x, w: x @ w.mT,
    "cast to its dtype": lambda x, w: F.linear(x.to(w.dtype), w),
    "asked for its device and shape": lambda x, w: F.linear(x.to(w.device), w)[:, : w.shape[0]],
    "dimensions": lambda x, w: F.linear(x, w) * w.dim() * w.ndim + w.size(0) + w.numel() + len(w),
    "an operator": lambda x, w: F.linear(x, w * 2.0 - 1.0),
    "a reduction": lambda x, w: F.linear(x, w) + w.sum() + w.float().mean(),
    "some rows": lambda x, w: F.linear(x, w[2:5]),
    "lookup": lambda x, w: F.embedding(torch.tensor([0, 3]), w),
    "a matrix product from the left": lambda x, w: w @ x.t(),
    "detached": lambda x, w: F.linear(x, w.detach()),
}


@pytest.mark.parametrize("use", USES)
def test_every_use_is_answered_as_by_the_matrix(use: str) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right, x = (
        torch.randn(*shape, generator=generator) for shape in ((8, 3), (3, 6), (4, 6))
    )
    weight = nn.Parameter(torch.zeros(8, 6))
    lazy = stand_in(TTSpec.low_rank(8, 6, 3), (left, right), weight)
    with torch.no_grad(), StandIns({id(weight): lazy}):
        found = USES[use](x, weight)
    torch.testing.assert_close(found, USES[use](x, left @ right), rtol=1e-5, atol=1e-5)
    assert not weight.any(), "the parameter is as it was"


def test_other_tensors_are_what_they_are() -> None:
    weight, other = nn.Parameter(torch.zeros(8, 6)), nn.Parameter(torch.ones(8, 6))
    lazy = stand_in(TTSpec.low_rank(8, 6, 1), (torch.ones(8, 1), torch.ones(1, 6)), weight)
    with torch.no_grad(), StandIns({id(weight): lazy}):
        assert other.transpose(0, 1).shape == (6, 8)
        assert torch.equal(F.linear(torch.ones(1, 6), other), torch.full((1, 8), 6.0))
