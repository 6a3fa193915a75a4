"""Set-up for the tests of kernels in use: no graph of another test."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
