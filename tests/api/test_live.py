"""A model that serves in another thread answers rightly while it is worked on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import tensorize

X = torch.randn(8, 32, generator=torch.Generator().manual_seed(1))
DATA = [X, X * 2, X - 1, X + 1]


def compiled(model: nn.Module, **options: Any) -> nn.Module:
    return tensorize.compile(model, 0.5, calibration=DATA, progress=False, **options)


WORK: dict[str, Callable[[nn.Module], Any]] = {
    "loss": compiled,
    "polish": lambda model: compiled(model, refine="polish"),
    "input": lambda model: compiled(model, metric="input"),
    "unasked": lambda model: tensorize.compile(model, 0.5, progress=False),
    "evaluate": lambda model: tensorize.evaluate(compiled(model, refine=None), model, DATA),
    "heal": lambda model: tensorize.heal(compiled(model), model, DATA, steps=8, progress=False),
}


@pytest.mark.parametrize("work", WORK.values(), ids=WORK)
def test_a_live_model_answers_with_its_own_weights(work: Callable[[nn.Module], Any]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)).eval()
    with torch.no_grad():
        wanted = model(X)
    wrong, answers, done = [], [], threading.Event()

    def serve() -> None:
        with torch.no_grad():
            while not done.is_set():
                answer = model(X)
                answers.append(1)
                if not torch.allclose(answer, wanted, atol=1e-5):
                    wrong.append(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        work(model)
    finally:
        done.set()
        thread.join()
    assert len(answers) > 10
    assert not wrong
