"""Which models are a chain of blocks, and what is said of the others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tensorize.base.errors import AnalysisError
from tensorize.capture.inputs import batch_of
from tensorize.passes.layers.chain import Back, Block, Front, find_chain
from tensorize.passes.layers.layers import Layers
from tensorize.passes.layers.work import Work
from tensorize.passes.observe.parts import Together
from tests.passes.layers.models import llama, tokens, values_of

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


class Chained(nn.Module):
    """Blocks that follow on each other."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.blocks = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return x.tanh()


class Between(Chained):
    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x).tanh()
        return x


class Twice(Chained):
    def forward(self, x: Tensor) -> Tensor:
        for block in (*self.blocks, *self.blocks):
            x = block(x)
        return x


class Given(nn.Module):
    """A block that is given something beside what the former gave."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Linear(6, 6)

    def forward(self, x: Tensor, more: object) -> Tensor:
        return self.own(x) + (more if isinstance(more, Tensor) else 0)


class HangsOnWeights(Chained):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Given(), Given()])

    def more(self, x: Tensor) -> object:
        return self.first(x)

    def forward(self, x: Tensor) -> Tensor:
        more = self.more(x)
        for block in self.blocks:
            x = block(x, more)
        return x


class HasState(HangsOnWeights):
    def more(self, x: Tensor) -> object:
        return object()


class Normed(Chained):
    """What it gives for a sample hangs on the others."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(0))


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "no list": (lambda: nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), "no list of layers"),
    "something between": (Between, "blocks.1 is not called with what blocks.0 gave"),
    "called twice": (Twice, "not called one after the other, once each"),
    "an argument of weights": (HangsOnWeights, "a tensor that hangs on weights before it"),
    "an argument with a state": (HasState, "is given a object"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_chain_is_refused_with_a_way_out(name: str) -> None:
    make, why = REFUSED[name]
    model = make()
    with pytest.raises(AnalysisError, match=why) as error:
        find_chain(model, model, batch_of(X), ())
    assert "frobenius" in str(error.value)


def test_parts_in_turn_are_the_model() -> None:
    model = llama()
    batch = batch_of({**tokens(1, hidden=4)[0], "use_cache": False})
    chain = find_chain(model, model, batch, ())
    assert chain.blocks == ("model.layers.0", "model.layers.1", "model.layers.2")
    with torch.no_grad():
        hidden, arguments = chain.arguments(batch)
        assert torch.equal(hidden, Front(chain)(**batch.kwargs))
        for k, (args, kwargs) in enumerate(arguments):
            hidden = Block(chain, k)(hidden, *args, **kwargs)
        found = Back(chain)(hidden, **batch.kwargs).logits
        assert torch.equal(found, model(**batch.kwargs).logits)
    assert all("forward" not in vars(module) for module in model.modules()), "as it was"


def test_batches_whose_samples_hang_on_each_other_are_not_cut(tmp_path: Path) -> None:
    for kind, alike in ((Chained, True), (Normed, False)):
        model = kind()
        parts, together = (batch_of(X[:2]), batch_of(X[2:])), Together(batch_of(X), (0, 1))
        chain = find_chain(model, model, parts[0], ())
        work = Work(tmp_path / kind.__name__)
        layers = Layers(chain, values_of(model), parts, work, together)
        if alike:
            layers.run(lambda *_: None)
            continue
        with pytest.raises(AnalysisError, match="hangs on the others"):
            layers.run(lambda *_: None)
