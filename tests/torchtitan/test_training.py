"""A compressed Llama trains over processes in torchtitan as it does in one."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

import pytest

from tests.distributed.processes import run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("torchtitan") is None, reason="torchtitan is not installed"
    ),
]


def quiet() -> None:
    """torch and torchtitan warn of what they do themselves."""
    for message in (
        "`torch.jit.script",
        "DTensor random operators may not have complete support",
        "`torch.distributed.\\w+` is deprecated",
    ):
        warnings.filterwarnings("ignore", message=message)


def steps(folder: Path) -> None:
    quiet()
    from tests.torchtitan import training

    training.trains_as_one_process_does(folder)


def types(folder: Path) -> None:
    quiet()
    from tests.torchtitan import training

    training.types_are_those_of_the_numbers(folder)


def test_losses_and_weights_are_those_of_one_process(tmp_path: Path) -> None:
    run([steps], 2, tmp_path)


def test_the_types_that_are_declared_are_right_and_so_are_gradients(tmp_path: Path) -> None:
    run([types], 2, tmp_path)
