"""What files of weights cost, side by side: size against loss, and against the largest error.

    pip install pysz zfpy
    python -m benchmarks.files --models llama
    python -m benchmarks.files --models smollm2 minilm --parts lossless bound
    python -m benchmarks.files --models fields

The models, texts and measures are those of ``benchmarks/quality.py``, the models in bfloat16, whose
bytes sizes are shares of. ``lossless``: zstd alone, planes of bytes with zstd as ours, and what a
code of bfloat16's exponents alone comes to (DFloat11: its entropy, the other bits as they are).
``bound``: SZ3, zfp and ours at a largest error relative to each tensor's range. ``loss``: ours at
shares of the bytes, ranks and codes chosen for the file on the calibration data, and beside what
is told of codes what they add, on other files and on other text of the same. ``integers``: in
groups (RTN, which GGUF's are like, and GPTQ) as ``benchmarks/bits.py`` kept them, of the same model
and text. ``fields``: states of the flow of ``examples/science_surrogate.py``, in float32, as the
last two. Figures are kept after every row, beside those that were there.

SZ3 and zfp are asked where they are installed. Speeds are of decoded bytes and of one thread, by
its own time and not the clock's.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from torch import Tensor

import tensorize
from benchmarks import bits
from benchmarks.bits import Draw, stored_bytes
from benchmarks.record import keep, kept
from benchmarks.subjects import COMPARED, first
from examples import science_surrogate
from tensorize.base.tensors import raw_bytes
from tensorize.coding.tensors import decode, encode, range_of
from tensorize.formats.quantized import inputs_in_full
from tensorize.store.manifest import MANIFEST

RESULTS = "files"
SHARES = (0.25, 0.178, 0.135, 0.1, 0.08)
BOUNDS = (1e-3, 1e-2, 3e-2)
SIZED = 1 << 22  # entries of the tensor that speeds are measured on

PARTS = ("lossless", "loss", "integers", "bound")
FIELDS = "fields"
SIDE, TIMES = 64, 32  # of fields

Rows = Iterator[tuple[str, dict[str, float]]]
"""What a row is called, and its figures."""

Coder = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor], Callable[[Any], int]]
"""What codes a tensor, decodes it, and says its bytes."""


def lossless() -> dict[str, Coder]:
    def zstd(tensor: Tensor) -> Any:
        return zstandard.ZstdCompressor(level=3).compress(bytes(raw_bytes(tensor)))

    def unzstd(data: Any) -> Tensor:
        held = bytearray(zstandard.ZstdDecompressor().decompress(data))
        return torch.frombuffer(held, dtype=torch.uint8)

    return {"zstd": (zstd, unzstd, len), "ours, lossless": ours(lambda _: 0.0)}


def ours(bound: Callable[[Tensor], float]) -> Coder:
    return (
        lambda tensor: encode(tensor, bound(tensor)),
        lambda coded: decode(coded[0], memoryview(coded[1])),
        lambda coded: len(coded[1]),
    )


def bounded(relative: float) -> dict[str, Coder]:
    """Coders that keep a largest error relative to each tensor's range."""
    found = {"ours": ours(lambda tensor: relative * range_of(tensor))}
    if sz := _installed("pysz"):
        found["SZ3"] = _sz(sz, relative)
    if zfp := _installed("zfpy"):
        found["zfp"] = (
            lambda t: zfp.compress_numpy(_array(t), tolerance=relative * range_of(t)),
            lambda data: torch.from_numpy(zfp.decompress_numpy(data)),
            len,
        )
    return found


def _sz(sz: Any, relative: float) -> Coder:
    def coded(tensor: Tensor) -> Any:
        config = sz.szConfig()
        config.errorBoundMode = sz.szErrorBoundMode.ABS
        config.absErrorBound = relative * range_of(tensor)
        data, _ = sz.sz.compress(_array(tensor), config)
        return data, tuple(tensor.shape)

    def numbers(coded: Any) -> Tensor:
        found, _ = sz.sz.decompress(coded[0], np.float32, coded[1])
        return torch.from_numpy(found)

    return coded, numbers, lambda coded: len(coded[0])


def _array(tensor: Tensor) -> np.ndarray:
    """In float32, of four dimensions at most."""
    wide = tensor.float()
    return np.ascontiguousarray((wide.flatten(0, -4) if wide.dim() > 4 else wide).numpy())


def _installed(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def exponents_alone(tensors: list[Tensor]) -> int:
    """Bytes of bfloat16 with the entropy of the exponents, and eight bits beside."""
    total = 0.0
    for tensor in tensors:
        exponents = (tensor.reshape(-1).view(torch.int16).int() >> 7) & 255
        shares = torch.bincount(exponents, minlength=256).double() / tensor.numel()
        total += tensor.numel() * (8 - float(torch.special.xlogy(shares, shares).sum()) / np.log(2))
    return round(total / 8)


def parts(draw: Draw, name: str) -> dict[str, Callable[[], Rows]]:
    """What is measured of a model, by what it is called."""
    model = draw.model
    weights = {key: p.detach() for key, p in model.named_parameters()}
    whole = stored_bytes(model)

    def within_bound() -> Rows:
        for title, figures, changed in _bounded(weights, whole):
            yield title, {**figures, **draw.unseen(_with(draw, changed))}

    def at_a_loss() -> Rows:
        for share in SHARES:
            yield f"ours, a file of {share:g}", _in_metric(draw, share)

    return {
        "lossless": lambda: _exact(weights, whole),
        "loss": at_a_loss,
        "integers": lambda: _integers(name, draw.seed),
        "bound": within_bound,
    }


def of_fields(seed: int) -> dict[str, Callable[[], Rows]]:
    """What is measured of fields: states of eight flows, at times that follow each other."""
    generator = torch.Generator().manual_seed(seed)
    solver = science_surrogate.Solver(SIDE)
    states = {"states": solver.trajectories(8, TIMES, generator).movedim(1, 0).contiguous()}
    whole = sum(field.nbytes for field in states.values())
    return {
        "lossless": lambda: _exact(states, whole),
        "bound": lambda: ((title, figures) for title, figures, _ in _bounded(states, whole)),
    }


def _exact(weights: dict[str, Tensor], whole: int) -> Rows:
    halves = [p for p in weights.values() if p.dtype == torch.bfloat16]
    if len(halves) == len(weights):
        yield "exponents alone", {"share": exponents_alone(halves) / whole}
    for method, coder in lossless().items():
        yield method, _figures(coder, weights, whole)


def _bounded(
    weights: dict[str, Tensor], whole: int
) -> Iterator[tuple[str, dict[str, float], dict[str, Tensor]]]:
    """Every coder at every bound: its figures, and what it makes of the weights."""
    for relative in BOUNDS:
        for method, coder in bounded(relative).items():
            figures = _figures(coder, weights, whole)
            changed = {key: coder[1](coder[0](p)).reshape(p.shape) for key, p in weights.items()}
            figures["largest relative error"] = max(
                float((changed[k].double() - p.double()).abs().max()) / range_of(p)
                for k, p in weights.items()
            )
            yield f"{method}, {relative:g} of the range", figures, changed


def _integers(name: str, seed: int) -> Rows:
    """All weights as integers of 4, 3 and 2 bits in groups, whose files are what memory holds."""
    known = kept(bits.RESULTS).get(name, {}).get(str(seed), {})
    for method in ("RTN", "GPTQ"):
        for setting, figures in known.get(method, {}).items():
            if setting.endswith("everything") and not setting.startswith("8"):
                yield f"{method}, {setting}", figures


def _figures(coder: Coder, weights: dict[str, Tensor], whole: int) -> dict[str, float]:
    """The share of the bytes, and speeds on the weights again and again, in megabytes a second."""
    code, numbers, size = coder
    flat = torch.cat([p.reshape(-1) for p in weights.values()])
    flat = flat.repeat(-(-SIZED // flat.numel()))[:SIZED].clone()
    began = time.process_time()
    made = code(flat)
    coded = time.process_time()
    numbers(made)
    ended = time.process_time()
    return {
        "share": sum(size(code(p)) for p in weights.values()) / whole,
        "coding MB/s": flat.nbytes / 1e6 / (coded - began),
        "decoding MB/s": flat.nbytes / 1e6 / (ended - coded),
    }


def _with(draw: Draw, changed: dict[str, Tensor]) -> torch.nn.Module:
    model = copy.deepcopy(draw.reference)
    model.load_state_dict({k: v.float() for k, v in changed.items()}, strict=False)
    return model


def _in_metric(draw: Draw, share: float) -> dict[str, float]:
    limit = tensorize.Budget(file=share)
    plan = draw.analysis.plan(limit, precision=None)
    small = tensorize.apply(draw.model, plan, progress=False)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        began = time.process_time()
        tensorize.save(small, folder, coded=limit, analysis=draw.analysis)
        saved = time.process_time()
        (weights,) = folder.glob("tensorize-*.safetensors")
        size = weights.stat().st_size
        told = json.loads((folder / MANIFEST).read_text())["coding"]
        loading = time.process_time()
        again = tensorize.load(folder, model=copy.deepcopy(draw.model))
        loaded = time.process_time() - loading
    kept_share = plan.predicted.parameters / plan.dense.parameters
    figures = {"share": size / draw.bytes, "seconds": saved - began, "loading seconds": loaded}
    figures |= {"parameters": kept_share, "predicted in memory": plan.predicted.loss or 0.0}
    if "loss" in told:
        low, high = told["loss_interval"]
        figures |= {"predicted": told["loss"], "low": low, "high": high}
    with inputs_in_full():
        whole, coded = small.float(), again.float()
        # What was told is what codes add to the loss of the model that was saved.
        for name, measure in (("added", draw.unseen), ("added, alike", draw.alike)):
            figures[name] = first(replace(measure, model=whole)(coded))
        return {**figures, **draw.unseen(coded)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Files of weights beside other ways.")
    known = [*COMPARED, FIELDS]
    parser.add_argument("--models", nargs="+", choices=known, default=known)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.models:
        for seed in options.seeds:
            made = (
                of_fields(seed) if name == FIELDS else parts(Draw(COMPARED[name](seed), seed), name)
            )
            rows = (row for part in options.parts if part in made for row in made[part]())
            for method, figures in rows:
                shown = ", ".join(f"{key} {value:.4g}" for key, value in figures.items())
                print(f"{name} {seed} {method}: {shown}", flush=True)
                _keep(name, seed, method, figures)


def _keep(name: str, seed: int, method: str, figures: dict[str, float]) -> None:
    results = kept(RESULTS)
    of_model = results.get(name, {})
    found = {**of_model.get(str(seed), {}), method: figures}
    keep(RESULTS, {**results, name: {**of_model, str(seed): found}})


if __name__ == "__main__":
    main()
