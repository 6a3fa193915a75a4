"""Small models with a weight in every form, guarded, and faults in them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import tensorize
from tensorize.ir.spec import Spec, TTSpec
from tensorize.weight.install import install
from tensorize.weight.whole_model import settle
from tests.weight.factored_models import draw, grouped
from tests.weight.quantized_models import IDS

WIDTH, HIDDEN, WORDS = 24, 40, 50


class Net(nn.Module):
    """A table, two linears and a head, on word numbers (B, T)."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.mix = nn.Parameter(torch.randn(WIDTH, WIDTH) / 5)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        x = x + self.down(torch.relu(self.up(x)))
        return self.head(x + torch.nn.functional.linear(x, self.mix))


def low_rank(m: int, n: int) -> TTSpec:
    return TTSpec.low_rank(m, n, 8)


def pivoted(m: int, n: int) -> TTSpec:
    return TTSpec.low_rank(m, n, 8, pivoted=True)


def train(m: int, n: int) -> TTSpec:
    return TTSpec((m // 2, 2), (n // 2, 2), (3,))


def block(m: int, n: int) -> TTSpec:
    return TTSpec.block((m // 2, 2), (2, n // 2), 3)


FORMS: dict[str, Callable[[int, int], Spec] | None] = {
    "dense": None,
    "low rank": low_rank,
    "pivoted": pivoted,
    "train": train,
    "block": block,
}


def net(form: str, *, trains: bool = False) -> nn.Module:
    """The network with every weight in one form; "bare ...": without identities."""
    torch.manual_seed(0)
    model = Net().eval()
    make = FORMS[form.removeprefix("bare ")]
    names = ("table.weight", "up.weight", "down.weight", "mix", "head.weight")
    for name in names if make is not None else ():
        m, n = model.get_parameter(name).shape
        spec = make(m, n)  # type: ignore[misc]
        cores = [
            nn.Parameter(draw(s, k, torch.float32) / 3) for k, s in enumerate(spec.core_shapes)
        ]
        order = [torch.randperm(n).int()] if spec.indices else []
        install(model, [name], spec, [*cores, *order])
    if form.startswith("bare "):
        tensorize.weight.pivoted(model)
    settle(model)
    return model.requires_grad_(trains)


def data(count: int = 6, rows: int = 20) -> list[Tensor]:
    found = torch.Generator().manual_seed(5)
    return [torch.randint(0, WORDS, (rows, 5), generator=found) for _ in range(count)]


def guarded(form: str, *, trains: bool = False, **options: object) -> nn.Module:
    return tensorize.guard(net(form, trains=trains), calibration=data(), **options)  # type: ignore[arg-type]


def shared() -> nn.Module:
    """A model whose q, k, v have their first factor in common, guarded."""
    torch.manual_seed(0)
    x = torch.randn(30, 48)
    small = tensorize.compile(
        grouped(), 0.5, metric="frobenius", example_inputs=(x,), formats="shared"
    )
    return tensorize.guard(small.requires_grad_(False), calibration=[x])


BATCH = IDS
