"""What every run of the tests checks in two processes, which are spawned once for all of it."""

from __future__ import annotations

from pathlib import Path

from tests.distributed import (
    processes,
    test_checkpoints,
    test_healing,
    test_parallelize,
    test_pipeline,
    test_ranks,
)


def test_two_processes(tmp_path: Path) -> None:
    checks = *test_parallelize.IN_TWO, *test_pipeline.OFTEN_IN_TWO, *test_checkpoints.IN_TWO
    checks += *test_healing.OFTEN_IN_TWO, *test_ranks.OFTEN_IN_TWO
    processes.run(checks, 2, tmp_path)
