"""Set-up for the tests with transformers: it is quiet."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import transformers as hf


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """No progress bars, and transformers tells of nothing but errors."""
    before = hf.utils.logging.get_verbosity()
    hf.utils.logging.set_verbosity_error()
    hf.utils.logging.disable_progress_bar()
    yield
    hf.utils.logging.set_verbosity(before)
