"""Set-up for every test: no hub, no progress bars, one seed, few threads."""

from __future__ import annotations

import os

import pytest
import torch

from tensorize.capture import synthetic

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["COLUMNS"] = "100"  # of the terminal that tests are run in
os.environ["TENSORIZE_CACHE_DIR"] = "no-such-folder"  # plans are made for a machine not measured


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no GPU on this machine"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_data_of_their_own(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models calibrate themselves only where a test asks: most are about something else."""
    if request.node.get_closest_marker("own_data") is None:
        monkeypatch.setattr(synthetic, "_UNASKED_FLOPS", 0.0)
