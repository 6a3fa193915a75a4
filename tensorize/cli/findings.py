"""What ``tensorize doctor`` looks at."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from tensorize.base import files, printer
from tensorize.codegen.device.triton_env import interpreting
from tensorize.codegen.machine import rates
from tensorize.version import __version__

_EXTRAS = {
    "transformers": "Hugging Face models",
    "tokenizers": "calibration data as text",
    "matplotlib": "Analysis.curve().plot",
    "torchao": "evaluate(quantize=)",
}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. ``advice``: what to do, where something is to be done."""

    name: str
    found: str
    advice: str | None = None


def findings() -> Iterator[Finding]:
    """What is here, what is known of this machine, and what will be fast."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    yield Finding("tensorize", f"{__version__}, Python {platform.python_version()}")
    yield Finding("torch", str(torch.__version__))
    yield _device(device)
    yield _machine(device)
    yield _triton(device)
    yield _compiler(device)
    yield _half(device)
    yield _cache()
    for name, use in _EXTRAS.items():
        version = _version(name)
        yield Finding(
            name,
            version or "not installed",
            None if version else f"pip install {name}, for {use}",
        )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _device(device: str) -> Finding:
    if device == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory
        return Finding("device", f"{rates.identity(device)}, {printer.bytes_(memory)}")
    cores, threads = os.cpu_count() or 1, torch.get_num_threads()
    advice = None
    if threads < cores:
        advice = "torch.set_num_threads, or OMP_NUM_THREADS, where the other cores are free"
    return Finding("device", f"{rates.identity(device)} of {cores}", advice)


def _machine(device: str) -> Finding:
    if rates.place(device).is_file():
        return Finding("figures", f"measured: {rates.place(device)}")
    return Finding(
        "figures",
        "times are predicted from the figures of its kind: it was not measured",
        "tensorize calibrate (some seconds); plans are then made for this machine",
    )


def _triton(device: str) -> Finding:
    version = _version("triton")
    if version is None:
        return Finding("triton", "not installed: kernels are text", "pip install triton")
    if interpreting():
        return Finding(
            "triton",
            f"{version}, interpreting: kernels run slowly, on the CPU",
            "unset TRITON_INTERPRET, but to look at kernels",
        )
    if device == "cpu":
        return Finding("triton", f"{version}: kernels compile, and need a GPU to run")
    return Finding(
        "triton",
        f"{version}: kernels run",
        "tensorize calibrate --model DIR times those of a model; it runs by those that won",
    )


def _compiler(device: str) -> Finding:
    names = (os.environ.get("CXX"), "g++", "clang++")
    found = next((path for name in names if name and (path := shutil.which(name))), None)
    if found is None and device == "cpu":
        return Finding(
            "compiler",
            "no C++ compiler: torch.compile fails on this CPU",
            "install g++ or clang++, or set CXX",
        )
    return Finding("compiler", found or "no C++ compiler, which a GPU does without")


def _half(device: str) -> Finding:
    """What low precision is worth here."""
    if device == "cuda":
        good = torch.cuda.is_bf16_supported(including_emulation=False)
        return Finding("bfloat16", "fast" if good else "not in hardware: float16 is faster")
    flags = _processor_flags()
    if not flags:
        return Finding("bfloat16", "not known: the system does not tell what the processor can")
    if flags & {"amx_bf16", "avx512_bf16", "bf16"}:
        return Finding("bfloat16", "fast: the processor multiplies it")
    return Finding("bfloat16", "slower than float32: the processor does not multiply it")


def _processor_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    known = (line.partition(":")[2] for line in lines if line.startswith(("flags", "Features")))
    return set(next(known, "").split())


def _cache() -> Finding:
    folder = files.of_this_machine("machine", "").parent
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    if place.is_dir() and os.access(place, os.W_OK):
        return Finding("cache", str(folder))
    return Finding(
        "cache",
        f"{folder} cannot be written: nothing measured is kept",
        "set TENSORIZE_CACHE_DIR to a directory that you may write to",
    )
