"""The only file that imports triton: loads emitted text, compiles it for a target, launches it.

Triton is imported when something is compiled or launched, and never before.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tensorize.base.errors import TensorizeError
from tensorize.base.progress import announce
from tensorize.codegen.device.compiler import WARP, stages
from tensorize.codegen.device.triton_env import check_device, interpreting, load, precision
from tensorize.codegen.triton.module import Source

log = logging.getLogger("tensorize")


def run(source: Source, *tensors: Tensor) -> None:
    """Launch a kernel: its inputs, then its outputs, as ``source`` names them.

    Raises:
        TensorizeError: there is no GPU, and the interpreter is not on.
        DoesNotFit: it needs more than the device has, even with one tile in flight.
    """
    x = tensors[-1]
    check_device(x)
    launch: Callable[..., None] = load(source.text)["launch"]
    exactness = precision(x.dtype, x.device.type)
    options: dict[str, Any] = {"precision": exactness, "widen": interpreting()}
    if not x.is_cuda:
        launch(*tensors, **options)
        return
    _tell_of_first_call(source, x.dtype)
    most = stages(source, "hip" if torch.version.hip else "cuda")
    with torch.cuda.device_of(x):  # triton launches on the current one
        if source.counters:
            options["wave"] = WARP["hip" if torch.version.hip else "cuda"]
            if (zeros := _counters(source, tensors[0])) is not None:
                options["arrived"] = zeros
        fit(partial(launch, *tensors, **options), most, (source.text, x.dtype, x.device))


def rows_of(x: Tensor) -> Tensor:
    """The last axis as rows, whose entries stand together."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def fit(launch: Callable[..., None], most: int, key: Hashable) -> None:
    """Launch with as many tiles in flight as the device has room for, ``most`` at most.

    Raises:
        DoesNotFit: not even one has.
    """
    while True:
        count = _fitting.get(key, most)
        try:
            return launch(num_stages=count)
        except Exception as error:
            if type(error).__name__ not in _DOES_NOT_FIT:
                raise
            if count == 1:
                raise DoesNotFit(
                    f"a kernel does not fit on this GPU: {error}",
                    way_out='backend="aten", or backend="auto" with tensorize.tune_kernels',
                ) from error
            _fitting[key] = count - 1


_DOES_NOT_FIT = ("OutOfResources", "PTXASError")
"""What triton raises where a device has too little shared memory, or too few registers."""
_fitting: dict[Hashable, int] = {}
"""Tiles in flight of kernels that did not fit with all that were asked for."""


class DoesNotFit(TensorizeError):
    """A kernel that needs more than the device has."""


_called: set[tuple[str, torch.dtype]] = set()


def _tell_of_first_call(source: Source, dtype: torch.dtype) -> None:
    """Triton compiles a kernel when it is called first, which takes about a second."""
    if (source.text, dtype) in _called:
        return
    if not _called:
        announce(
            "Triton compiles kernels when they are first called, and keeps them; "
            "tensorize calibrate --model DIR does that ahead"
        )
    _called.add((source.text, dtype))
    log.info("first call of kernel %s of %d in %s", source.name, len(_called), dtype)


_POOL = 1 << 20
_pools: dict[torch.device, tuple[Tensor, int]] = {}
_of_stream: dict[tuple[torch.device, int], Tensor] = {}
_PER_STREAM, _ALIGNED = 4096, 32
_taking = threading.Lock()


def _fill_pool(device: torch.device) -> None:
    with _taking:
        if device not in _pools:
            _pools[device] = torch.zeros(_POOL, dtype=torch.int32, device=device), 0
            torch.cuda.synchronize(device)


def _counters(source: Source, x: Tensor) -> Tensor | None:
    """Zeros for the programs that count arrivals; a kernel leaves them zero.

    Kernels of one stream come one after the other and share theirs. A launch that a CUDA graph
    records gets its own, because the graph may be replayed on any stream: from a pool, so that
    no replay has to fill them. ``None``: the launch makes its own.
    """
    rows_blocks = -(-x.shape[0] // source.tiles.rows)
    needed = rows_blocks * source.counters
    device = x.device
    capturing = torch.cuda.is_current_stream_capturing()
    if needed > _PER_STREAM or (device not in _pools and capturing):
        return None
    if device not in _pools:
        # In a thread of its own: this one may allocate in the pool of a CUDA graph to be.
        filling = threading.Thread(target=_fill_pool, args=(device,))
        filling.start()
        filling.join()
    key = device, torch.cuda.current_stream(device).cuda_stream
    with _taking:
        if not capturing and key in _of_stream:
            return _of_stream[key]
        pool, used = _pools[device]
        # At multiples of 16 bytes: triton compiles a kernel again for a pointer that is at none.
        taken = _ALIGNED * -(-needed // _ALIGNED) if capturing else _PER_STREAM
        if used + taken > _POOL:
            return None
        _pools[device] = pool, used + taken
        zeros = pool[used : used + taken]
        if not capturing:
            _of_stream[key] = zeros
        return zeros
