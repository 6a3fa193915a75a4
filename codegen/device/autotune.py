"""Which kernel runs for how many rows: the defaults, or what was measured to win on this machine.

Nothing is timed unless ``tune`` is called, so a choice is the same every time; what it finds is
kept on disk by device, versions, dtype, work and bucket of rows. ``wins`` says whether a kernel
beat the library's matmuls there: it never did where nothing was measured, nor on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

from tensorize.base import files
from tensorize.base.records import plain, record
from tensorize.base.timer import cold_seconds_of
from tensorize.codegen.device import launch, reference, triton_env
from tensorize.codegen.triton import source as triton_source
from tensorize.codegen.triton import tiles
from tensorize.codegen.triton.module import Source
from tensorize.codegen.triton.roles import NotCovered, Tiles, is_pair
from tensorize.ir.spec import TTSpec
from tensorize.ir.work import Work, work_of
from tensorize.version import __version__

BUCKETS = (1, 16, 64, 512, 4096, 1 << 62)
"""Numbers of rows up to which one choice holds."""
FASTER = 0.97
"""A kernel wins where its time is at most this share of the library's: above the noise."""
_FLUSHED = 1 << 28


@dataclass(frozen=True)
class Choice:
    """How a work is run: ``family`` is "forward" or "decode"; ``ratio`` its time over that of the
    library's matmuls (``reference``) where that was measured."""

    family: str
    tiles: Tiles
    ratio: float | None = None

    @property
    def wins(self) -> bool:
        return self.ratio is not None and self.ratio <= FASTER


def bucket(rows: int) -> int:
    return next(most for most in BUCKETS if rows <= most)


def source(work: Work, dtype: torch.dtype, rows: int, device: str) -> Source | None:
    """The kernel for that many rows: the measured choice, else the default one; None where no
    family covers them."""
    return _source(work, dtype, bucket(rows), device, triton_env.precision(dtype, device))


@lru_cache(maxsize=4096)
def _source(
    work: Work, dtype: torch.dtype, most: int, device: str, precision: str
) -> Source | None:
    chosen = _recorded(work, dtype, most, device, precision)
    try:
        return emit(work, chosen or next(candidates(work, dtype, most)))
    except NotCovered:
        return None


def emit(work: Work, choice: Choice) -> Source:
    make = triton_source.decode if choice.family == "decode" else triton_source.forward
    return make(work, tiles.limited(work, choice.tiles))


def candidates(work: Work, dtype: torch.dtype, rows: int) -> Iterator[Choice]:
    """What may be tried, the default first; all are emitted, which is cheap, before one is given.

    Raises:
        NotCovered: there is none.
    """
    found: list[Choice] = []
    few = rows <= tiles.FEW_ROWS
    if few and not work.saved and all(map(is_pair, work.specs)):
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
    return _wins(work, dtype, bucket(rows), device, triton_env.precision(dtype, device))


@lru_cache(maxsize=4096)
def _wins(work: Work, dtype: torch.dtype, most: int, device: str, precision: str) -> bool:
    found = _recorded(work, dtype, most, device, precision)
    return found is not None and found.wins


def runs(work: Work, dtype: torch.dtype, rows: int | None, device: str, *, measured: bool) -> bool:
    """Whether a kernel runs a work; ``measured``: only where it won, for every number of rows that
    may come (None: any)."""
    most = BUCKETS if rows is None else (bucket(rows),)
    if measured:
        return all(wins(work, dtype, count, device) for count in most)
    return all(source(work, dtype, count, device) is not None for count in most)


@lru_cache(maxsize=16)
def winners(device: str) -> frozenset[TTSpec]:
    """What won somewhere on this device, by itself or in a launch with others."""
    won = (key for key, found in _records(device).items() if record(Choice, found).wins)
    return frozenset(spec for key in won for spec in work_of(key.rsplit(" ", 3)[0]).specs)


def known(device: str) -> bool:
    """Whether anything was measured on this device."""
    return device.startswith("cuda") and bool(_records(device))


def recorded(work: Work, dtype: torch.dtype, most: int, device: str) -> Choice | None:
    """What was measured for a bucket of rows, None where nothing was."""
    return _recorded(work, dtype, most, device, triton_env.precision(dtype, device))


def _recorded(
    work: Work, dtype: torch.dtype, most: int, device: str, precision: str
) -> Choice | None:
    found = _records(device).get(_key(work, dtype, most, precision))
    return None if found is None else record(Choice, found)


def _key(work: Work, dtype: torch.dtype, most: int, precision: str) -> str:
    """Everything that the time depends on."""
    return f"{work.unguarded.to_text()} {dtype} {precision} {most}"


@lru_cache(maxsize=16)
def _records(device: str) -> dict[str, dict]:
    return files.read_records(place(device))


def place(device: str) -> Path:
    """Where the choices for a device are kept, with these versions of everything."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else device
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "none"
    return files.of_this_machine("kernels", f"{name} {__version__} {torch.__version__} {triton}")


def keep(work: Work, dtype: torch.dtype, most: int, device: str, choice: Choice) -> None:
    """Write a choice to where ``recorded`` looks for it."""
    key = _key(work, dtype, most, triton_env.precision(dtype, device))
    files.update_records(place(device), lambda kept: {**kept, key: plain(choice)})
    forget()


def forget() -> None:
    """Read what is kept again when it is next asked for."""
    _records.cache_clear()
    _source.cache_clear()
    _wins.cache_clear()
    winners.cache_clear()


# ------------------------------------------------------------------------------------- timing


def tune(work: Work, dtype: torch.dtype, rows: int, device: str) -> Choice:
    """Time the candidates and the library's matmuls for so many rows, and keep the best kernel.

    Raises:
        ValueError: the device is no GPU.
        NotCovered: no candidate runs there.
    """
    if not device.startswith("cuda"):
        raise ValueError(f"kernels are timed on a GPU, not on {device}")
    with torch.cuda.device(device):  # whose streams are timed
        return _tuned(work.unguarded, dtype, rows, device)


def _tuned(work: Work, dtype: torch.dtype, rows: int, device: str) -> Choice:
    generator = torch.Generator(device).manual_seed(0)

    def draw(shape: tuple[int, ...]) -> Tensor:
        values = torch.randn(shape, generator=generator, device=device) / shape[-1] ** 0.5
        return values.to(dtype)

    inputs = [draw(shape) for shape in work.input_shapes(rows)]
    for k in work.orders:
        inputs[k] = torch.randperm(len(inputs[k]), generator=generator, device=device).int()
    outputs = [inputs[0].new_empty(rows, width) for width in work.results]
    flush = torch.empty(_FLUSHED // 4, dtype=torch.int32, device=device)
    best: tuple[float, Choice] | None = None
    for choice in candidates(work, dtype, rows):
        made = emit(work, choice)
        try:
            seconds = cold_seconds_of(lambda made=made: launch.run(made, *inputs, *outputs), flush)
        except (launch.DoesNotFit, RuntimeError):
            continue
        if best is None or seconds < best[0]:
            best = seconds, choice
    if best is None:
        raise NotCovered("no candidate runs on this device")
    library = cold_seconds_of(lambda: reference.run(work, inputs), flush)
    choice = replace(best[1], ratio=best[0] / library)
    keep(work, dtype, bucket(rows), device, choice)
    return choice
