"""Decompositions side by side: on one thread each, in order, and to the same bits."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import tensorize
from tensorize.passes.curves.side_by_side import side_by_side


@pytest.fixture(autouse=True)
def _three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_results_come_in_order_whatever_they_take() -> None:
    def work(k: int) -> int:
        time.sleep(0.02 if k % 3 == 0 else 0.0)
        return k

    assert list(side_by_side(work, range(20), lambda k: k % 5 != 0)) == list(range(20))


def test_small_items_have_one_thread_and_others_all() -> None:
    for _ in range(200):  # a number that another thread sets meanwhile came through some times
        found = side_by_side(lambda k: torch.get_num_threads(), range(9), lambda k: k % 4 != 2)
        assert list(found) == [3 if k % 4 == 2 else 1 for k in range(9)]
    assert torch.get_num_threads() == 3


def test_few_items_are_taken_ahead() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for k in range(50):
            taken.append(k)
            yield k

    assert next(side_by_side(lambda k: k, items(), lambda k: True)) == 0
    assert len(taken) <= 5


def test_an_error_arrives_and_the_number_of_threads_is_put_back() -> None:
    def work(k: int) -> int:
        if k == 4:
            raise ValueError("the fourth")
        return k

    with pytest.raises(ValueError, match="the fourth"):
        list(side_by_side(work, range(20), lambda k: True))
    assert torch.get_num_threads() == 3


def test_a_curve_is_the_same_bits_whatever_is_analysed_beside_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(96, 96) for _ in range(5))).eval()
    x = torch.randn(4, 96)
    whole = tensorize.analyze(model, example_inputs=(x,), metric="frobenius")
    alone = tensorize.analyze(model, example_inputs=(x,), metric="frobenius", include="3.weight")
    again = tensorize.analyze(model, example_inputs=(x,), metric="frobenius")
    curves = [a.program.spectra["3.weight"].distortion for a in (whole, alone, again)]
    assert torch.equal(curves[0], curves[1])
    assert torch.equal(curves[0], curves[2])


def test_the_random_state_is_as_it_was() -> None:
    """Weights are probed with random numbers, all of them with the same ones."""
    model = nn.Sequential(*(nn.Linear(128, 128) for _ in range(16))).eval()
    for _ in range(3):
        torch.manual_seed(7)
        before = torch.get_rng_state()
        tensorize.analyze(model, example_inputs=(torch.zeros(4, 128),), metric="frobenius")
        assert torch.equal(torch.get_rng_state(), before)
