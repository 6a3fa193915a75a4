"""The kernel families that the tests emit, compile and run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tensorize.codegen.device.triton_env import interpreting
from tensorize.codegen.triton import coded, tiles
from tensorize.codegen.triton import source as triton_source
from tensorize.codegen.triton.coded import CodedProduct
from tensorize.codegen.triton.module import Source
from tensorize.ir.coded import DenseSpec, QuantizedSpec
from tensorize.ir.precision import FLOAT
from tensorize.ir.spec import TTSpec
from tensorize.ir.work import Epilogue, Norm, Work
from tests.paths import ROOT

low_rank = TTSpec.low_rank


def pivoted(m: int, n: int, rank: int, neighbours: int = 1) -> TTSpec:
    return low_rank(m, n, rank, pivoted=neighbours)


def in_codes(m: int, n: int, precision: str) -> QuantizedSpec:
    return QuantizedSpec(DenseSpec((m, n)), precision, FLOAT)


here = pytest.mark.skipif(
    not interpreting(), reason="runs under the interpreter, in a process of its own"
)
each_device = pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=here), pytest.param("cuda", marks=pytest.mark.gpu)]
)
"""Kernels as the interpreter runs them, and for real where there is a GPU (``-m gpu``)."""


WORKS: Mapping[str, Work] = {
    "pair": Work((low_rank(4096, 4096, 128),), epilogue=Epilogue(bias=True), saved=True),
    "pair of odd sizes": Work(
        (low_rank(1000, 777, 300),),
        norm=Norm("rms", 1e-6),
        epilogue=Epilogue(bias=True, activation="gelu", scale=0.5, residual=True),
    ),
    "pair back": Work((low_rank(4096, 11008, 256),), "rows", saved=True),
    "layer norm": Work(
        (low_rank(3072, 768, 64),), norm=Norm("layer", 1e-5), epilogue=Epilogue(True, "gelu_tanh")
    ),
    "gated": Work(
        (low_rank(11008, 4096, 128),) * 2, gated=True, epilogue=Epilogue(activation="silu")
    ),
    "grouped": Work(
        (low_rank(4096, 4096, 128), low_rank(1024, 4096, 64), low_rank(1024, 4096, 64)),
        norm=Norm("rms", 1e-6),
    ),
    "shared": Work(
        (low_rank(4096, 4096, 128), low_rank(1024, 4096, 128), low_rank(1000, 4096, 128)),
        shared=True,
        norm=Norm("rms", 1e-6),
    ),
    "two cores": Work((TTSpec((64, 64), (64, 64), (16,)),), epilogue=Epilogue(bias=True)),
    "three cores": Work((TTSpec((16, 16, 16), (16, 16, 16), (16, 16)),)),
    "four cores": Work((TTSpec((8, 8, 8, 8), (8, 8, 8, 8), (8, 8, 8)),)),
    "block": Work((TTSpec.block((64, 64), (64, 64), 16),), epilogue=Epilogue(bias=True)),
}
TABLES = {
    "low rank": low_rank(32000, 768, 64),
    "train": TTSpec((32, 32, 32), (8, 8, 12), (16, 16)),
}


def _forward(work: Work) -> Callable[[torch.dtype], Source]:
    return lambda dtype: triton_source.forward(work, tiles.default(work, dtype))


def _decode(work: Work) -> Callable[[torch.dtype], Source]:
    return lambda dtype: triton_source.decode(work, tiles.default_decode(work, dtype))


def _of_codes(product: CodedProduct) -> Callable[[torch.dtype], Source]:
    return lambda dtype: coded.forward(product, coded.default_tiles(product, dtype.itemsize, 4096))


def _lookup(spec: TTSpec) -> Callable[[torch.dtype], Source]:
    return lambda dtype: triton_source.lookup(spec, tiles.default_lookup(spec, dtype))


def _gradients(spec: TTSpec) -> Callable[[torch.dtype], Source]:
    return lambda dtype: triton_source.gradients(
        spec, "columns", tiles.default_gradients(spec, dtype)
    )


PIVOTED: Mapping[str, Work] = {
    "pivoted": Work(
        (pivoted(4096, 4096, 128),), norm=Norm("rms", 1e-6), epilogue=Epilogue(bias=True)
    ),
    "pivoted by groups": Work((pivoted(4096, 4096, 256, 4), pivoted(1024, 4096, 64, 4))),
    "pivoted shared": Work(
        (pivoted(4096, 4096, 128), pivoted(1024, 4096, 128)),
        shared=True,
        norm=Norm("layer", 1e-5),
    ),
}
DECODED: Mapping[str, Work] = {
    "decode": Work((low_rank(4096, 4096, 512),), epilogue=Epilogue(bias=True)),
    "decode gated": Work(
        WORKS["gated"].specs,
        gated=True,
        norm=Norm("rms", 1e-6),
        epilogue=Epilogue(activation="silu"),
    ),
    "decode grouped": WORKS["grouped"],
    "decode shared": WORKS["shared"],
}
CODED: Mapping[str, CodedProduct] = {
    "codes of eight bits": CodedProduct(in_codes(4096, 4096, "int8"), bias=True),
    "codes of four bits": CodedProduct(in_codes(4096, 4096, "int4"), added=True),
    "codes of three bits back": CodedProduct(in_codes(1000, 777, "int3"), "rows"),
}
FAMILIES: Mapping[str, Callable[[torch.dtype], Source]] = {
    **{name: _forward(work) for name, work in WORKS.items()},
    **{name: _forward(work) for name, work in PIVOTED.items()},
    **{name: _decode(work) for name, work in DECODED.items()},
    **{name: _of_codes(product) for name, product in CODED.items()},
    **{f"lookup, {name}": _lookup(spec) for name, spec in TABLES.items()},
    "gradients": _gradients(low_rank(4096, 4096, 128)),
    "gradients, two cores": _gradients(TTSpec((64, 64), (64, 64), (16,))),
    "gradients, block": _gradients(TTSpec.block((64, 64), (64, 64), 16)),
}


def _watched(work: Work) -> Work:
    return replace(work, guarded=True)


def _watched_lookup(spec: TTSpec) -> Callable[[torch.dtype], Source]:
    return lambda dtype: triton_source.lookup(spec, tiles.default_lookup(spec, dtype), guarded=True)


GUARDED: Mapping[str, Callable[[torch.dtype], Source]] = {
    **{f"{name}, guarded": _forward(_watched(work)) for name, work in WORKS.items()},
    "pivoted, guarded": _forward(_watched(PIVOTED["pivoted"])),
    **{f"{name}, guarded": _decode(_watched(work)) for name, work in DECODED.items()},
    **{f"lookup, {name}, guarded": _watched_lookup(spec) for name, spec in TABLES.items()},
}
"""Every family with its check."""

_small, _odd = low_rank(30, 24, 8), low_rank(7, 24, 20)
SMALL: Mapping[str, Callable[[torch.dtype], Source]] = {
    "pair": _forward(Work((_small,), epilogue=Epilogue(bias=True), saved=True)),
    "pair back": _forward(Work((_odd,), "rows", norm=Norm("layer", 1e-5))),
    "gated": _forward(Work((_small, low_rank(30, 24, 40)), gated=True, norm=Norm("rms", 1e-6))),
    "grouped": _forward(Work((_small, _odd))),
    "shared": _forward(Work((_small, low_rank(7, 24, 8), low_rank(300, 24, 8)), shared=True)),
    "shared, gated": _forward(Work((_small, _small), shared=True, gated=True)),
    "decode shared, gated": _decode(Work((_small, _small), shared=True, gated=True)),
    "decode": _decode(Work((_small,), epilogue=Epilogue(bias=True))),
    "decode back": _decode(Work((_odd,), "rows", norm=Norm("rms", 1e-6))),
    "decode gated": _decode(Work((_small, low_rank(30, 24, 40)), gated=True)),
    "decode grouped": _decode(Work((_small, _odd), norm=Norm("rms", 1e-6))),
    "two cores": _forward(Work((TTSpec((3, 5), (2, 4), (6,)),), saved=True)),
    "three cores": _forward(Work((TTSpec((3, 2, 2), (2, 4, 40), (6, 5)),))),
    "absent indices": _forward(Work((TTSpec((1, 3, 2), (1, 1, 2), (2, 3)),))),
    "four cores": _forward(Work((TTSpec((2, 1, 3, 2), (2, 2, 1, 3), (3, 2, 2)),), "rows")),
    "block": _forward(Work((TTSpec.block((3, 2), (2, 40), 6),))),
    "lookup, low rank": _lookup(low_rank(30, 100, 8)),
    "lookup, train": _lookup(TTSpec((3, 2, 2), (1, 4, 3), (6, 5))),
    "gradients": _gradients(_small),
    "gradients, block": _gradients(TTSpec.block((3, 2), (2, 40), 6)),
}


def holds_under_the_interpreter(*files: str | Path, marks: str = "not slow") -> None:
    """Run the tests of files in a process of its own, in which triton interprets kernels."""
    if interpreting():
        pytest.skip("this is that process")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", marks, *files],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTEST_XDIST_WORKER": ""},
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
