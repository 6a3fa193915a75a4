"""Kernels as operations of torch: with fake kernels and gradients, for any leading shape.

``TritonContraction`` is what a weight calls in place of a contraction of torch operations. What no
kernel family covers (a dtype, many rows of a high rank, training of a deeper chain) is done by
torch operations.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tensorize.base.tensors import is_index
from tensorize.codegen.device import autotune, coded, guarded, launch, reference
from tensorize.codegen.device.triton_env import DTYPES, check_device
from tensorize.codegen.triton import source as triton_source
from tensorize.codegen.triton import tiles
from tensorize.codegen.triton.roles import NotCovered, roles, sides
from tensorize.formats.registry import format_of
from tensorize.ir.spec import TTSpec
from tensorize.ir.work import Epilogue, Work, work_of
from tensorize.weight import contractions as weight_contractions
from tensorize.weight import products
from tensorize.weight.contractions import Contractions

OTHER = {"columns": "rows", "rows": "columns"}


@lru_cache(maxsize=4096)
def _spec(text: str) -> TTSpec:
    return TTSpec.from_dict(json.loads(text))


@lru_cache(maxsize=4096)
def covered(spec: TTSpec, contract: str) -> str | None:
    """The reason why no kernel computes a contraction for any number of rows, ``None`` where one
    does for some."""
    if format_of(spec).kernels is None:
        return f"kernels know no {format_of(spec).title}"
    try:
        if contract == "lookup":
            triton_source.lookup(spec, tiles.default_lookup(spec, torch.bfloat16))
        else:
            next(autotune.candidates(Work((spec,), contract), torch.bfloat16, 1))
    except NotCovered as reason:
        return str(reason)
    return None


@lru_cache(maxsize=4096)
def _has_gradients(spec: TTSpec, contract: str) -> bool:
    """Whether kernels give the gradients of the cores, and what those need of both passes."""
    try:
        triton_source.gradients(spec, contract, tiles.default_gradients(spec, torch.bfloat16))
        for side in (contract, OTHER[contract]):
            work = Work((spec,), side, saved=True)
            triton_source.forward(work, tiles.default(work, torch.bfloat16))
    except NotCovered:
        return False
    return True


def _saved_width(spec: TTSpec, contract: str) -> int:
    return math.prod(spec.size[axis] for axis in roles(spec, contract).saved)


def _out_width(spec: TTSpec, contract: str) -> int:
    return math.prod(spec.size[axis] for axis in sides(spec, contract)[1])


def _outputs(x: Tensor, spec: TTSpec, contract: str, saved: bool) -> tuple[Tensor, Tensor]:
    """Room for y, and for what is between two cores if ``saved`` (else it is empty)."""
    y = x.new_empty(*x.shape[:-1], _out_width(spec, contract))
    if not saved:
        return y, x.new_empty(0)
    return y, x.new_empty(*x.shape[:-1], _saved_width(spec, contract))


# ------------------------------------------------------------------------------- operations


@torch.library.custom_op("tensorize::triton_contract", mutates_args=())
def _contract(
    x: Tensor,
    cores: Sequence[Tensor],
    bias: Tensor | None,
    spec: str,
    contract: str,
    saved: bool,
    measured: bool,
) -> tuple[Tensor, Tensor]:
    """y = x Wᵀ + bias for x of any leading shape; if ``saved``, also what is between two cores.

    ``measured``: a kernel runs only where it was measured to beat the library. Numbers of rows that
    no family covers are the library's too.
    """
    factors, work = _spec(spec), _work(spec, contract, bias is not None, saved)
    inputs = (x, *cores) if bias is None else (x, *cores, bias)
    rows = math.prod(x.shape[:-1])
    if not autotune.runs(work, x.dtype, rows, str(x.device), measured=measured):
        if not measured:
            check_device(x)
        (y,) = reference.run(work, inputs)
        return y, x.new_empty(0)
    y, t = _outputs(x, factors, contract, saved)
    _launch(work, inputs, (y, t) if saved else (y,))
    return y, t


def _launch(
    work: Work,
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    known: Sequence[guarded.Known] = (),
) -> Tensor | None:
    """One launch, of inputs of any leading shape; what it counted, where it is guarded."""
    rows = launch.rows_of(inputs[0])
    source = autotune.source(work, rows.dtype, rows.shape[0], str(rows.device))
    assert source is not None, work
    wrong = None
    if work.guarded:
        own, wrong = guarded.operands(work, source.checked, work.cores(inputs), known)
        inputs = [*inputs, *own, wrong]
    others = [
        launch.rows_of(tensor) if name.startswith("residual") else tensor.contiguous()
        for name, tensor in zip(source.inputs[1:], inputs[1:], strict=True)
    ]
    launch.run(source, rows, *others, *(y.view(-1, y.shape[-1]) for y in outputs))
    return wrong


@lru_cache(maxsize=4096)
def _work(spec: str, contract: str, bias: bool, saved: bool) -> Work:
    return Work((_spec(spec),), contract, epilogue=Epilogue(bias=bias), saved=saved)


@_contract.register_fake
def _(
    x: Tensor,
    cores: Sequence[Tensor],
    bias: Tensor | None,
    spec: str,
    contract: str,
    saved: bool,
    measured: bool,
) -> tuple[Tensor, Tensor]:
    return _outputs(x, _spec(spec), contract, saved)


def _results(x: Tensor, work: Work) -> list[Tensor]:
    """Room for what a launch gives for x."""
    return [x.new_empty(*x.shape[:-1], width) for width in work.results]


@torch.library.custom_op("tensorize::triton_fused", mutates_args=())
def _fused(inputs: Sequence[Tensor], work: str) -> list[Tensor]:
    """One launch of a ``Work`` (its ``to_text``): weights with what is before and behind them.

    ``inputs`` are in the order that ``Work`` says, x of any leading shape. It has no gradients.
    """
    what, x = work_of(work), inputs[0]
    results = _results(x, what)
    _launch(what, inputs, results)
    return results


@_fused.register_fake
def _(inputs: Sequence[Tensor], work: str) -> list[Tensor]:
    return _results(inputs[0], work_of(work))


@torch.library.custom_op("tensorize::triton_guarded", mutates_args=())
def _guarded(
    inputs: Sequence[Tensor],
    work: str,
    signs: Sequence[Tensor],
    sums: Sequence[Tensor],
    limits: Sequence[float],
) -> list[Tensor]:
    """As ``triton_fused``, with a check of every product; last comes how many rows of each weight
    were wrong (int32).

    ``signs``, ``sums``: what is known of every weight; ``limits``: two numbers for each.
    """
    what, x = work_of(work), inputs[0]
    results = _results(x, what)
    every = zip(signs, sums, limits[::2], limits[1::2], strict=True)
    known = [guarded.Known(*each) for each in every]
    wrong = _launch(what, inputs, results, known)
    assert wrong is not None
    return [*results, wrong]


@_guarded.register_fake
def _(
    inputs: Sequence[Tensor],
    work: str,
    signs: Sequence[Tensor],
    sums: Sequence[Tensor],
    limits: Sequence[float],
) -> list[Tensor]:
    x, what = inputs[0], work_of(work)
    results = _results(x, what)
    return [*results, x.new_empty(len(what.specs), dtype=torch.int32)]


@torch.library.custom_op("tensorize::triton_core_gradients", mutates_args=())
def _core_gradients(
    x: Tensor, dy: Tensor, t: Tensor, s: Tensor, spec: str, contract: str
) -> list[Tensor]:
    """The gradients of two cores, from what the passes over x and over dy saved."""
    factors = _spec(spec)
    found = [x.new_empty(shape) for shape in factors.core_shapes]
    source = triton_source.gradients(factors, contract, tiles.default_gradients(factors, x.dtype))
    launch.run(source, *(launch.rows_of(tensor) for tensor in (x, dy, t, s)), *found)
    return found


@_core_gradients.register_fake
def _(x: Tensor, dy: Tensor, t: Tensor, s: Tensor, spec: str, contract: str) -> list[Tensor]:
    return [x.new_empty(shape) for shape in _spec(spec).core_shapes]


@torch.library.custom_op("tensorize::triton_lookup", mutates_args=())
def _lookup(rows: Tensor, cores: Sequence[Tensor], spec: str) -> Tensor:
    """Rows of W by number."""
    factors = _spec(spec)
    y = cores[0].new_empty(rows.shape[0], factors.shape[1])
    source = triton_source.lookup(factors, tiles.default_lookup(factors, y.dtype))
    launch.run(source, rows.contiguous(), *(core.contiguous() for core in cores), y)
    return y


@_lookup.register_fake
def _(rows: Tensor, cores: Sequence[Tensor], spec: str) -> Tensor:
    return cores[0].new_empty(rows.shape[0], _spec(spec).shape[1])


# -------------------------------------------------------------------------------- gradients


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, cores, bias, ctx.spec, ctx.contract, ctx.saved, ctx.measured = inputs
    ctx.with_bias = bias is not None
    ctx.save_for_backward(x, output[1], *cores)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Any, ...]:
    x, t, *cores = ctx.saved_tensors
    dy = dy.contiguous()
    wanted = ctx.needs_input_grad[1]
    cores_too = any(wanted) if isinstance(wanted, list | tuple) else bool(wanted)
    if cores_too and not ctx.saved:
        raise RuntimeError("nothing was saved for the gradients of the cores: saved=True")
    of_x, s = _contract(dy, cores, None, ctx.spec, OTHER[ctx.contract], cores_too, ctx.measured)
    of_cores: Any = [None] * len(cores)
    if cores_too:
        of_cores = _core_gradients(x, dy, t, s, ctx.spec, ctx.contract)
    of_bias = dy.reshape(-1, dy.shape[-1]).sum(0) if ctx.with_bias else None
    return of_x, of_cores, of_bias, None, None, None, None


_contract.register_autograd(_backward, setup_context=_save)


def _save_lookup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, cores, ctx.spec = inputs
    ctx.save_for_backward(rows, *cores)


def _lookup_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    """By torch operations: a scatter over rows, which sums in the same order always on a CPU."""
    rows, *cores = ctx.saved_tensors
    with torch.enable_grad():
        leaves = [core.detach().requires_grad_() for core in cores]
        y = products.lookup(_spec(ctx.spec), leaves, rows)
    return None, list(torch.autograd.grad(y, leaves, dy)), None


_lookup.register_autograd(_lookup_backward, setup_context=_save_lookup)


# ----------------------------------------------------------------------- what weights call


@dataclass(frozen=True)
class TritonContraction:
    """y = x Wᵀ + bias, y = x W + bias, or rows of W, by a kernel.

    ``text`` is the spec as an operation takes it; ``gradients``: those of the cores have a kernel,
    ``measured``: a kernel runs only where it was measured to beat the library, so never where there
    are gradients, which nobody measures. ``planned`` is what runs instead: the contractions by
    torch operations.
    """

    spec: TTSpec
    text: str
    contract: str
    gradients: bool
    measured: bool
    planned: Contractions = field(repr=False, compare=False)

    takes_bias = True

    def __call__(self, x: Tensor, cores: Sequence[Tensor], bias: Tensor | None = None) -> Tensor:
        learning = torch.is_grad_enabled() and any(core.requires_grad for core in cores)
        gradients = learning or (torch.is_grad_enabled() and x.requires_grad)
        without = self.measured or self.spec.pivoted  # kernels whose gradients nobody has
        if (without and gradients) or (learning and not self.gradients):
            return products.matmul(self.spec, self.planned, cores, x, self.contract, bias)
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x = x.to(dtype)
            cores = [core if is_index(core) else core.to(dtype) for core in cores]
            bias = None if bias is None else bias.to(dtype)
        if x.dtype not in DTYPES or cores[0].dtype != x.dtype:
            return products.matmul(self.spec, self.planned, cores, x, self.contract, bias)
        y, _ = _contract(x, list(cores), bias, self.text, self.contract, learning, self.measured)
        return y

    def beside(self, planned: Contractions) -> TritonContraction:
        """The same, with what the weight's own plan is."""
        return replace(self, planned=planned)

    def takes(self, core: Tensor) -> bool:
        return core.dtype in DTYPES and not torch.is_autocast_enabled(core.device.type)

    def lookup(self, rows: Tensor, cores: Sequence[Tensor]) -> Tensor:
        y = _lookup(rows.reshape(-1).long(), list(cores), self.text)
        return y.reshape(*rows.shape, y.shape[-1])


def why_not(spec: TTSpec) -> str | None:
    """The reason why a weight of this spec has no kernels, None where it has."""
    if spec.precision is not None:
        return coded.why_not(spec)
    reasons = (covered(spec, side) for side in _sides(spec))
    return next((reason for reason in reasons if reason is not None), None)


def _sides(spec: TTSpec) -> tuple[str, ...]:
    """The sides that kernels are to contract: of pivoted weights x meets one only."""
    return ("columns",) if spec.pivoted else tuple(OTHER)


def contractions(spec: TTSpec, *, measured: bool = False) -> Contractions:
    """What kernels a weight of this spec has, by what they contract; none where x or the gradient
    of y is not covered. Those of weights in codes are not timed, and so are none ``measured``."""
    if why_not(spec) is not None:
        return {}
    if spec.precision is not None:
        return {} if measured else coded.contractions(spec)
    text = json.dumps(spec.to_dict())
    planned = weight_contractions.contractions(spec)

    def contraction(contract: str) -> TritonContraction:
        side = "columns" if contract == "lookup" else contract
        gradients = not spec.pivoted and _has_gradients(spec, side)
        return TritonContraction(spec, text, contract, gradients, measured, planned)

    lookup = () if measured or covered(spec, "lookup") else ("lookup",)
    return {contract: contraction(contract) for contract in (*_sides(spec), *lookup)}


# --------------------------------------------------------------------- what graphs are fused by


class Launches:
    """The operations of weights and of launches, and where the latter are used."""

    contract = torch.ops.tensorize.triton_contract.default
    fused = torch.ops.tensorize.triton_fused.default
    guarded = torch.ops.tensorize.triton_guarded.default

    def uses(self, work: Work, x: Tensor, measured: bool) -> bool:
        """Whether a launch is used for x; ``measured``: only where it was seen to win."""
        if x.dtype not in DTYPES:
            return False
        rows = math.prod(x.shape[:-1])
        known = rows if isinstance(rows, int) else None
        return autotune.runs(work, x.dtype, known, str(x.device), measured=measured)
