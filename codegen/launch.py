"""The only file that imports triton: loads emitted text, compiles it for a target, launches it.

Triton is imported when something is compiled or launched, and never before.
"""

from __future__ import annotations

import builtins
import hashlib
import linecache
import logging
import os
import re
import subprocess
import tempfile
import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tensorize.codegen.triton_module import Source
from tensorize.errors import TensorizeError
from tensorize.progress import announce

log = logging.getLogger("tensorize")

TARGETS = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx90a", "hip:gfx942")
SHARED_LIMIT = {
    "cuda:80": 166912,
    "cuda:90": 232448,
    "cuda:100": 232448,
    "hip:gfx90a": 65536,
    "hip:gfx942": 65536,
}
"""Bytes of shared memory that one block may have."""
DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_POINTERS = {"float32": "*fp32", "int32": "*i32", "int64": "*i64"}
_WARP = {"cuda": 32, "hip": 64}
MOST_STAGES = {"cuda": 8, "hip": 2}
"""AMD keeps fewer tiles in flight: its shared memory is a quarter of NVIDIA's."""


@dataclass(frozen=True)
class Compiled:
    """A kernel for one target, and what it needs there: all that can be known without a device.

    ``registers`` a thread (vector registers on AMD), ``spills``: what did not fit into them (bytes
    on NVIDIA, registers on AMD), ``shared_bytes`` a block; ``asm`` is PTX or AMD assembly,
    ``binary`` the cubin or hsaco.
    """

    target: str
    registers: int
    spills: int
    shared_bytes: int
    asm: str = field(repr=False)
    binary: bytes = field(repr=False)


def interpreting() -> bool:
    """Whether kernels run in triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@lru_cache(maxsize=4096)
def load(text: str) -> dict[str, Any]:
    """What a text defines. Triton reads sources again, so they are kept where it looks for them.

    Raises:
        TensorizeError: triton is not installed.
    """
    _require_triton()
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    filename = f"<tensorize kernel {digest}>"
    # Without a modification time, linecache never drops the entry.
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    namespace: dict[str, Any] = {"__name__": f"tensorize_kernel_{digest}"}
    exec(builtins.compile(text, filename, "exec"), namespace)
    return namespace


def _require_triton() -> None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise TensorizeError(
            "kernels need triton to be compiled or run", way_out="pip install triton"
        ) from error


def check_compiler() -> None:
    """Raises TensorizeError where kernels cannot be compiled ahead: there is no triton, or it
    interprets."""
    _require_triton()
    if interpreting():
        raise TensorizeError(
            "with TRITON_INTERPRET=1 triton does not compile", way_out="unset TRITON_INTERPRET"
        )


def stages(source: Source, vendor: str) -> int:
    """Tiles in flight: as many as are asked for, where the target and its compiler can."""
    most = MOST_STAGES[vendor]
    if vendor == "hip" and _version() < (3, 7):
        most = 1  # 3.6 holds them in registers, more than there are
    return min(source.tiles.stages, most)


@lru_cache
def _version() -> tuple[int, ...]:
    """Of triton, as (major, minor)."""
    return tuple(int(part) for part in metadata.version("triton").split(".")[:2])


# ------------------------------------------------------------------------------ ahead of time


def compile(
    source: Source, target: str, dtype: torch.dtype, *, precision: str = "ieee"
) -> Compiled:
    """Compile a kernel for a target that need not be there.

    Args:
        target: ``"cuda:90"`` or ``"hip:gfx942"``: vendor and architecture.
        dtype: of x and of the cores.
        precision: of float32 dots: ``"ieee"``, or ``"tf32"`` where the target has it.

    Raises:
        TensorizeError: the target or dtype is none that triton compiles for, or the interpreter
            is on.
    """
    vendor, _, architecture = target.partition(":")
    known = architecture.isdigit() if vendor == "cuda" else bool(architecture)
    if vendor not in _WARP or not known:
        raise TensorizeError(
            f"target {target!r} is not known", way_out=f"one of {', '.join(TARGETS)}"
        )
    if dtype not in DTYPES:
        raise TensorizeError(f"kernels are for {', '.join(map(str, DTYPES))}, not {dtype}")
    check_compiler()
    namespace = load(source.text)
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, attributes = {}, {}
    for place, argument in enumerate(source.arguments):
        kind = _POINTERS.get(argument.kind, f"*{DTYPES[dtype]}")
        signature[argument.name] = "i32" if argument.kind == "size" else kind
        if argument.kind != "size" or argument.aligned:
            attributes[(place,)] = [["tt.divisibility", 16]]
    count = len(signature)
    known = {"PRECISION": precision, "WIDEN": False}
    if source.counters:
        known["WAVE"] = _WARP[vendor]
    signature |= dict.fromkeys(known, "constexpr")
    constants: dict[tuple[int], Any] = {(count + k,): v for k, v in enumerate(known.values())}
    chip: Any = int(architecture) if vendor == "cuda" else architecture
    made = triton.compile(
        ASTSource(namespace[source.name], signature, constants, attributes),
        target=GPUTarget(vendor, chip, _WARP[vendor]),
        options={"num_warps": source.tiles.warps, "num_stages": stages(source, vendor)},
    )
    assembly, binary = ("ptx", "cubin") if vendor == "cuda" else ("amdgcn", "hsaco")
    asm, code = made.asm[assembly], made.asm[binary]
    registers, spills = _nvidia_usage(code, asm) if vendor == "cuda" else _amd_usage(asm)
    return Compiled(target, registers, spills, made.metadata.shared, asm, code)


def _nvidia_tool(name: str, *arguments: str | Path) -> str:
    """What a tool that comes with triton says."""
    import triton

    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    tool = next(path for path in (folder / name, folder / name.partition("-")[0]) if path.exists())
    done = subprocess.run([tool, *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _nvidia_usage(binary: bytes, assembly: str) -> tuple[int, int]:
    """Registers, and bytes that were spilled.

    A stack alone is no spill: ptxas keeps other things there, too, and says which only on request.
    """
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder) / "kernel.cubin", Path(folder) / "kernel.ptx"
        cubin.write_bytes(binary)
        told = _nvidia_tool("cuobjdump", "-res-usage", cubin)
        usage = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", told)}
        if not usage["STACK"] + usage["LOCAL"]:
            return usage["REG"], 0
        ptx.write_text(assembly)
        chip = re.search(r"\.target (sm_(\d+)\w*)", assembly)
        assert chip is not None
        tool = "ptxas-blackwell" if int(chip[2]) >= 100 else "ptxas"
        told = _nvidia_tool(tool, "-v", f"--gpu-name={chip[1]}", ptx, "-o", Path(folder) / "again")
        spilled = re.search(r"(\d+) bytes spill stores", told)
        return usage["REG"], int(spilled[1]) if spilled else usage["STACK"]


def _amd_usage(assembly: str) -> tuple[int, int]:
    """Vector registers, and those spilled, from the kernel's own metadata."""

    def figure(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", assembly)
        return int(found[1]) if found else 0

    return figure("vgpr_count"), figure("vgpr_spill_count") + figure("sgpr_spill_count")


# ----------------------------------------------------------------------------------- launching


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
            options["wave"] = _WARP["hip" if torch.version.hip else "cuda"]
            if (zeros := _counters(source, tensors[0])) is not None:
                options["arrived"] = zeros
        fit(partial(launch, *tensors, **options), most, (source.text, x.dtype, x.device))


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


def check_device(x: Tensor) -> None:
    """Raises TensorizeError where kernels cannot run on the tensor's device."""
    if not x.is_cuda and not interpreting():
        raise TensorizeError(
            f'the model was compiled with backend="triton", whose kernels do not run on '
            f"{x.device.type}",
            way_out="move the model to a GPU, or set TRITON_INTERPRET=1 before Python starts to "
            'run the kernels (slowly) on the CPU; backend="aten" needs neither',
        )


def precision(dtype: torch.dtype, device: str) -> str:
    """Of float32 dots: what torch allows its own matmuls."""
    if dtype != torch.float32 or not device.startswith("cuda") or torch.version.hip:
        return "ieee"
    # The attribute follows both of torch's ways to say it, of which reading the older one may fail.
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


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
