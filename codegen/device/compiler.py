"""Compile emitted Triton source for a target, with or without its device, and read what it uses."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from tensorize.base.errors import TensorizeError
from tensorize.codegen.device.triton_env import DTYPES, interpreting, load, require_triton
from tensorize.codegen.triton.module import Source

TARGETS = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx90a", "hip:gfx942")
_POINTERS = {"float32": "*fp32", "int32": "*i32", "int64": "*i64", "int8": "*i8", "uint8": "*u8"}
WARP = {"cuda": 32, "hip": 64}
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


def check_compiler() -> None:
    """Raises TensorizeError where kernels cannot be compiled ahead: there is no triton, or it
    interprets."""
    require_triton()
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
    if vendor not in WARP or not known:
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
        known["WAVE"] = WARP[vendor]
    signature |= dict.fromkeys(known, "constexpr")
    constants: dict[tuple[int], Any] = {(count + k,): v for k, v in enumerate(known.values())}
    chip: Any = int(architecture) if vendor == "cuda" else architecture
    made = triton.compile(
        ASTSource(namespace[source.name], signature, constants, attributes),
        target=GPUTarget(vendor, chip, WARP[vendor]),
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
