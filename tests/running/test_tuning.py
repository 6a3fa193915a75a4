"""What is timed where a GPU is there: of this, only what needs none."""

from __future__ import annotations

from tensorize.codegen.device import autotune
from tensorize.running import tuning


def test_every_range_of_rows_is_timed() -> None:
    """Where one range is not known, no fused launch runs for an unknown number of rows."""
    assert {autotune.bucket(rows) for rows in tuning.ROWS} == set(autotune.BUCKETS)
