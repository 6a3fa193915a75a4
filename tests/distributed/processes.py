"""Several processes that run one check after the other, spawned once for all of them."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

Check = Callable[[Path], None]


def run(checks: Sequence[Check], processes: int, folder: Path) -> None:
    """Each check is called in every process, with a folder that all of them see."""
    meeting = (folder / "meeting").as_uri()
    torch.multiprocessing.spawn(_process, (meeting, checks, folder, processes), nprocs=processes)


def _process(
    rank: int, meeting: str, checks: Sequence[Check], folder: Path, processes: int
) -> None:
    warnings.simplefilter("error")
    # FSDP2 says so of any linear with a bias on a CPU.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=processes)
    try:
        for check in checks:
            check(folder)
            gc.collect()  # what holds a process group goes before it does
            dist.barrier()
    finally:
        dist.destroy_process_group()
