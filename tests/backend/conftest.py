"""Set-up for the tests of the backend: no graph of another test, and nothing told yet."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tensorize.backend import preview


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch._dynamo.reset()
    monkeypatch.setattr(preview, "_told", False)
    yield
    torch._dynamo.reset()
