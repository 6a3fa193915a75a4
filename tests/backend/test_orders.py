"""Orders that hidden units are computed in: where nothing else reads them, and the same results."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tensorize
from tensorize.passes.lowering.orders import ComputeInOrder
from tests.backend.lowered_models import EAGER, calls, lowered_and_run
from tests.models import relative
from tests.weight.gated import Gated, Mixed, ReadElsewhere

ORDER = "in_order.default"


class Broadcast(Gated):
    def hidden(self, x: Tensor) -> Tensor:
        return F.silu(self.gate(x)) * self.down.weight.cores[0].sum()


class Written(Gated):
    def hidden(self, x: Tensor) -> Tensor:
        return F.silu(self.gate(x), inplace=True)


X = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))


def small(
    kind: type[Gated],
    dtype: torch.dtype = torch.bfloat16,
    *,
    dense: bool = False,
    neighbours: bool = False,
) -> Gated:
    torch.manual_seed(0)
    ranks = {"down*": 12} if dense else {"*": 12}
    model = tensorize.compile(kind().eval(), None, ranks=ranks, metric="frobenius")
    model = tensorize.weight.plain(model).to(dtype if neighbours else torch.float32)
    model = tensorize.weight.pivoted(model)
    assert (model.down.spec.pivoted > 1) == neighbours
    return model.to(dtype)


@pytest.mark.parametrize(("dense", "neighbours"), [(False, False), (True, False), (False, True)])
def test_linears_compute_in_the_order_that_reads_them(dense: bool, neighbours: bool) -> None:
    model = small(Gated, dense=dense, neighbours=neighbours)
    with torch.no_grad():
        want = model(X.bfloat16())
    program, found = lowered_and_run(model, X.bfloat16(), ComputeInOrder())
    assert calls(program.graph).count(ORDER) == (0 if dense else 2)  # gate and up have their own
    assert len(program.packed) == 3  # two weights and a bias
    assert relative(found.float(), want.float()) < 2 * torch.finfo(torch.bfloat16).eps
    with torch.no_grad():
        compiled = torch.compile(model, backend="tensorize", options=EAGER if dense else {})
        assert relative(compiled(X.bfloat16()).float(), want.float()) < 0.02
        model.gate.bias.add_(1)  # copies follow what they are copies of
        assert relative(compiled(X.bfloat16()).float(), model(X.bfloat16()).float()) < 0.02


@pytest.mark.parametrize("kind", [ReadElsewhere, Mixed, Broadcast, Written])
def test_an_order_stays_where_anything_else_is_in_the_way(kind: type[Gated]) -> None:
    model = small(kind)
    with torch.no_grad():
        want = model(X.bfloat16())
    program, found = lowered_and_run(model, X.bfloat16(), ComputeInOrder())
    assert not program.packed
    assert relative(found.float(), want.float()) < 0.02


def test_an_order_stays_in_float32() -> None:
    program, _ = lowered_and_run(small(Gated, torch.float32), X, ComputeInOrder())
    assert calls(program.graph).count(ORDER) == 3
