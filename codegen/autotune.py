"""Which kernel runs for how many rows: the defaults, or what was measured to win on this machine.

Nothing is timed unless ``tune`` is called, so a choice is the same every time; what it finds is
kept on disk by device, versions, dtype, work and bucket of rows. ``wins`` says whether a kernel
beat the library's matmuls there: it never did where nothing was measured, nor on a CPU.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from importlib import metadata
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from tensorize.codegen import launch, tiles, triton_source
from tensorize.codegen.triton_module import Source
from tensorize.codegen.triton_work import Epilogue, NotCovered, Tiles, Work
from tensorize.ir import LOW_RANK, TTSpec
from tensorize.version import __version__

BUCKETS = (1, 16, 64, 512, 4096, 1 << 62)
"""Numbers of rows up to which one choice holds."""
FASTER = 0.97
"""A kernel wins where its time is at most this share of the library's: above the noise."""
_ROUNDS, _FLUSHED = 15, 1 << 28


@dataclass(frozen=True)
class Choice:
    """How a work is run: ``family`` is "forward" or "decode"; ``ratio`` its time over the library's
    two matmuls where that was measured."""

    family: str
    tiles: Tiles
    ratio: float | None = None


def bucket(rows: int) -> int:
    return next(most for most in BUCKETS if rows <= most)


def source(work: Work, dtype: torch.dtype, rows: int, device: str) -> Source:
    """The kernel for that many rows: the measured choice, else the default one."""
    return _source(work, dtype, bucket(rows), device)


@lru_cache(maxsize=4096)
def _source(work: Work, dtype: torch.dtype, most: int, device: str) -> Source:
    chosen = recorded(work, dtype, most, device)
    return emit(work, chosen or next(candidates(work, dtype, most)))


def emit(work: Work, choice: Choice) -> Source:
    make = triton_source.decode if choice.family == "decode" else triton_source.forward
    return make(work, choice.tiles)


def candidates(work: Work, dtype: torch.dtype, rows: int) -> Iterator[Choice]:
    """What may be tried, the default first; all are emitted, which is cheap, before one is given.

    Raises:
        NotCovered: there is none.
    """
    found: list[Choice] = []
    few = rows <= tiles.FEW_ROWS
    if few and not work.saved and all(spec.format == LOW_RANK for spec in work.specs):
        cut = tiles.default_decode(work, dtype, bucket(rows))
        found.append(Choice("decode", cut))
        found.append(Choice("decode", replace(cut, warps=8)))
        found.append(Choice("decode", replace(cut, slice=cut.slice * 2)))
        found.append(Choice("decode", replace(cut, inner_slice=cut.inner_slice * 2)))
    cut = tiles.default(work, dtype, bucket(rows))
    outputs = min(max(work.outs), cut.slice)
    found.append(Choice("forward", cut))
    if len(work.specs[0].cores) == 2:
        found.append(Choice("forward", replace(cut, slice=-(-outputs // 2))))
        found.append(Choice("forward", replace(cut, rows=max(cut.rows // 2, 16))))
    given, reason = 0, None
    for choice in dict.fromkeys(found):
        try:
            emit(work, choice)
        except NotCovered as error:
            reason = error
            continue
        given += 1
        yield choice
    if not given:
        raise reason or NotCovered("no family computes the work")


# ------------------------------------------------------------------------------------ records


def wins(work: Work, dtype: torch.dtype, rows: int, device: str) -> bool:
    """Whether a kernel was measured to beat the library there."""
    found = recorded(work, dtype, bucket(rows), device)
    return found is not None and found.ratio is not None and found.ratio <= FASTER


def known(device: str) -> bool:
    """Whether anything was measured on this device."""
    return device.startswith("cuda") and bool(_records(device))


def recorded(work: Work, dtype: torch.dtype, most: int, device: str) -> Choice | None:
    found = _records(device).get(_key(work, dtype, most))
    if found is None:
        return None
    return Choice(found["family"], Tiles(**found["tiles"]), found["ratio"])


def _key(work: Work, dtype: torch.dtype, most: int) -> str:
    """Everything that the time depends on; the notes are only text."""
    return f"{replace(work, notes=())} {dtype} {most}"


@lru_cache(maxsize=16)
def _records(device: str) -> dict[str, dict]:
    try:
        found = json.loads(place(device).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def place(device: str) -> Path:
    """Where the choices for a device are kept, with these versions of everything."""
    home = os.environ.get("TENSORIZE_CACHE_DIR") or Path.home() / ".cache" / "tensorize"
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else device
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "none"
    identity = f"{name} {__version__} {torch.__version__} {triton}"
    return Path(home) / f"kernels-{hashlib.sha256(identity.encode()).hexdigest()[:12]}.json"


def keep(work: Work, dtype: torch.dtype, most: int, device: str, choice: Choice) -> None:
    """Write a choice to where ``recorded`` looks for it."""
    path = place(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    records = {**_records(device), _key(work, dtype, most): asdict(choice)}
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    draft.write_text(json.dumps(records, indent=1))
    os.replace(draft, path)
    _records.cache_clear()
    _source.cache_clear()


# ------------------------------------------------------------------------------------- timing


def tune(work: Work, dtype: torch.dtype, rows: int, device: str) -> Choice:
    """Time the candidates and the library's matmuls for so many rows, and keep the best kernel.

    Only one plain low-rank weight is compared with the library (``ratio``).

    Raises:
        ValueError: the device is no GPU.
    """
    if not device.startswith("cuda"):
        raise ValueError(f"kernels are timed on a GPU, not on {device}")
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator, device=device) / shape[-1] ** 0.5
        return values.to(dtype)

    (spec,) = work.specs
    x, cores = draw(rows, work.into), [draw(*shape) for shape in spec.core_shapes]
    bias = [draw(work.outs[0])] if work.epilogue.bias else []
    y = x.new_empty(rows, work.outs[0])
    flush = torch.empty(_FLUSHED // 4, dtype=torch.int32, device=device)
    best: tuple[float, Choice] | None = None
    for choice in candidates(work, dtype, rows):
        made = emit(work, choice)
        try:
            seconds = _time(lambda made=made: launch.run(made, x, *cores, *bias, y), flush)
        except RuntimeError:  # it does not fit on this device
            continue
        if best is None or seconds < best[0]:
            best = seconds, choice
    if best is None:
        raise NotCovered("no candidate runs on this device")
    ratio = None
    if spec.format == LOW_RANK:
        first, second = reversed(cores) if work.contract == "columns" else (c.t() for c in cores)
        library = _time(lambda: F.linear(F.linear(x, first), second, *bias), flush)
        ratio = best[0] / library
    choice = replace(best[1], ratio=ratio)
    keep(work, dtype, bucket(rows), device, choice)
    return choice


def tune_weight(spec: TTSpec, dtype: torch.dtype, bias: bool, rows: int, device: str) -> bool:
    """``tune`` for one weight of a model; whether a kernel won."""
    work = Work((spec,), epilogue=Epilogue(bias=bias))
    try:
        choice = tune(work, dtype, rows, device)
    except NotCovered:
        return False
    return choice.ratio is not None and choice.ratio <= FASTER


def _time(call: Callable[[], object], flush: Tensor) -> float:
    """Milliseconds of a call that finds nothing in the cache: the median of some rounds."""
    for _ in range(3):
        call()
    samples = []
    for _ in range(_ROUNDS):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        samples.append(start.elapsed_time(end))
    return statistics.median(samples)
