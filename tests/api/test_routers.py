"""What chooses among experts stays as it is, where it is not asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tensorize
from tests.models import CASES


def reasons(model: nn.Module, **options: Any) -> dict[str, str | None]:
    """Why weights stay dense; None where they do not."""
    given = {"metric": "frobenius", "ranks": {"*": 4}, **options}
    sites = tensorize.report(tensorize.compile(model, None, **given)).sites
    return {site.name: site.reason if site.format == "dense" else None for site in sites}


def test_routers_stay_dense_with_the_reason() -> None:
    case = CASES["mixtral"]
    found = reasons(case.model(), example_inputs=case.batch())
    kept = {name for name, reason in found.items() if reason is not None}
    assert kept == {name for name in found if name.endswith("mlp.gate.weight")} != set()
    assert all("chooses among experts" in str(found[name]) for name in kept)


def test_they_are_compressed_where_they_are_asked_for() -> None:
    case = CASES["mixtral"]
    found = reasons(case.model(), example_inputs=case.batch(), include="*")
    assert set(found.values()) == {None}


class Mixture(nn.Module):
    """A router beside a stack that is the module's own; and layers that choose nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.head = nn.Linear(16, 8), nn.Linear(16, 8)
        self.stack = nn.Parameter(torch.randn(8, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        made = torch.bmm(x.expand(8, *x.shape), self.stack)  # (experts, rows, width)
        return (self.router(x).softmax(-1).mT[..., None] * made).sum(0)


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixture, self.head = Mixture(), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mixture(x))


def test_a_stack_may_be_the_modules_own() -> None:
    found = reasons(Whole(), example_inputs=torch.randn(4, 16), ranks={"*": 3})
    assert "chooses among experts" in str(found["mixture.router.weight"])


@pytest.mark.parametrize("width", [8, 12])
def test_other_layers_of_as_many_rows_are_no_routers(width: int) -> None:
    """Elsewhere in the model, or beside a convolution of as many groups."""
    model = nn.Sequential(nn.Conv1d(width, width, 3, groups=width // 4), nn.Linear(10, width // 4))
    found = reasons(model, example_inputs=torch.randn(2, width, 12), ranks={"1.weight": 1})
    assert found["1.weight"] is None
    found = reasons(Whole(), example_inputs=torch.randn(4, 16), ranks={"head.weight": 3})
    assert found["head.weight"] is None
