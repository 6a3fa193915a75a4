"""Kernels with norms, epilogues and several weights against the reference in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tensorize.codegen.device import reference
from tensorize.codegen.triton import source as triton_source
from tensorize.codegen.triton.roles import Tiles
from tensorize.ir.spec import TTSpec
from tensorize.ir.work import Epilogue, Norm, Work
from tests.codegen.triton.bounds import (
    Bounded,
    check,
    draw,
    draw_cores,
    draw_rows,
    drawn,
    dtypes,
    poisoned,
    product,
    small,
    some_rows,
    some_tiles,
)
from tests.kernels import each_device

pytest.importorskip("triton", reason="triton is not installed")


ACTIVATE = {
    None: lambda y: y,
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
}
STEEPEST = 1.13
"""No activation here is steeper anywhere."""


def finish(y: Bounded, epilogue: Epilogue, residual: Tensor | None, up: Bounded | None = None):
    value = ACTIVATE[epilogue.activation](y.value)
    bound = STEEPEST * y.bound + 4e-6 * value.abs()
    if up is not None:
        bound = bound * (up.value.abs() + up.bound) + value.abs() * up.bound
        value = value * up.value
    scale = 1.0 if epilogue.scale is None else epilogue.scale
    value, bound = scale * value, abs(scale) * bound + 1e-6 * value.abs()
    if residual is not None:
        value = value + residual.double()
        bound = bound + 1e-6 * residual.double().abs()
    return Bounded(value, bound)


def normed(x: Tensor, norm: Norm | None, gain: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """norm(x) in float64, and the sizes of what it was computed from."""
    exactness = torch.finfo(torch.float32).eps / torch.finfo(x.dtype).eps
    x, gain, shift = x.double(), gain.double(), shift.double()
    if norm is None:
        return x, x.abs()
    if norm.kind == "rms":
        value = x * (x.square().mean(-1, keepdim=True) + norm.eps).rsqrt() * gain
        return value, 2 * value.abs()
    value = F.layer_norm(x, x.shape[-1:], gain, shift, norm.eps)
    mean = x.mean(-1, keepdim=True)
    scale = ((x - mean).square().mean(-1, keepdim=True) + norm.eps).rsqrt()
    pilot = x[:, :1]
    size = ((x - pilot).abs() + (mean - pilot).abs()) * gain.abs() * scale
    # The variance is a difference of two sums, relative to the pilot, in float32.
    spread = 1 + ((x - pilot).square().mean(-1, keepdim=True) * scale.square())
    return value, value.abs() + exactness * (spread * size + shift.abs())


norms = st.sampled_from((None, Norm("rms", 1e-6), Norm("layer", 1e-5)))
epilogues = st.builds(
    Epilogue,
    bias=st.booleans(),
    activation=st.sampled_from(tuple(ACTIVATE)),
    scale=st.sampled_from((None, 0.5)),
    residual=st.booleans(),
)


@each_device
@settings(drawn, max_examples=16)
@given(
    dtypes,
    st.integers(2, 40),
    st.lists(st.tuples(small, st.integers(1, 40)), min_size=1, max_size=3),
    some_rows,
    some_tiles,
    norms,
    epilogues,
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_norms_epilogues_and_several_weights(
    device, dtype, into, shapes, rows, tiles, norm, epilogue, gated, shared, few
) -> None:
    """Grouped, gated, of one first factor, with norms and epilogues; for many rows and for few."""
    torch.manual_seed(rows)
    if gated:
        shapes = [(shapes[0][0], rank) for _, rank in (shapes * 2)[:2]]
    if shared:
        shapes = [(m, shapes[0][1]) for m, _ in shapes]
    specs = tuple(TTSpec.low_rank(m, into, rank) for m, rank in shapes)
    work = Work(specs, "columns", norm, epilogue, gated, shared)
    if few and norm is not None and norm.kind == "layer":
        return
    emit = triton_source.decode if few else triton_source.forward
    source = emit(work, tiles)
    x = draw_rows(rows, into, device, dtype) + 3
    gain, shift = draw((into,), device, dtype) + 1, draw((into,), device, dtype)
    cores = [draw_cores(spec, device, dtype) for spec in specs]
    if shared:
        cores = [[left, cores[0][1]] for left, _ in cores]
    biases = [draw((m,), device, dtype) for m, _ in shapes]
    results = shapes[:1] if gated else shapes
    residuals = [draw_rows(rows, m, device, dtype) for m, _ in results]
    known = {"x": x, "gain": gain, "shift": shift}
    for k, _ in enumerate(specs):
        end = f"_{k}" if len(specs) > 1 else ""
        known |= {f"c0{end}": cores[k][0], f"c1{end}": cores[k][1], f"bias{end}": biases[k]}
        if k < len(results):
            known["residual" if gated else f"residual{end}"] = residuals[k]
    outputs = [poisoned(rows, m, x) for m, _ in results]
    check(source, *(known[name] for name in source.inputs), *outputs)
    value, size = normed(x, norm, gain, shift)
    found = []
    for k, spec in enumerate(specs):
        y = product(value, size, spec, cores[k], "columns")
        if epilogue.bias:
            y.value += biases[k].double()
            y.bound += 1e-6 * biases[k].double().abs()
        found.append(y)
    if gated:
        found = [finish(found[0], epilogue, residuals[0] if epilogue.residual else None, found[1])]
    else:
        found = [
            finish(y, epilogue, residuals[k] if epilogue.residual else None)
            for k, y in enumerate(found)
        ]
    exact = reference.run(work, [known[name].double() for name in source.inputs])
    for y, out, by_library in zip(found, outputs, exact, strict=True):
        y.check(out)
        torch.testing.assert_close(by_library, y.value)


@each_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_large_entries_and_gains_leave_the_others_as_they_are(device, dtype, kind) -> None:
    """An entry a thousand times as large as the others, first in its row, and a gain at which its
    product with it is no number of float16."""
    torch.manual_seed(0)
    spec = TTSpec.low_rank(32, 64, 16)
    norm = Norm(kind, 1e-6)
    x = draw_rows(8, 64, device, dtype)
    x[:, 0] = 3e4 if kind == "rms" else 1000.0
    gain, shift = draw((64,), device, dtype) + 4, draw((64,), device, dtype)
    cores = draw_cores(spec, device, dtype)
    cores[1][:, 0] = 0  # so that the others are all that is seen
    given = (x, gain, shift) if kind == "layer" else (x, gain)
    value, size = normed(x, norm, gain, shift)
    y = product(value, size, spec, cores, "columns")
    for few in (False,) if kind == "layer" else (False, True):
        emit = triton_source.decode if few else triton_source.forward
        out = poisoned(8, 32, x)
        check(emit(Work((spec,), norm=norm), Tiles(rows=16, inner=16)), *given, *cores, out)
        y.check(out)


@each_device
def test_an_activation_does_not_hide_what_is_no_number(device) -> None:
    spec = TTSpec.low_rank(16, 16, 16)
    cores = draw_cores(spec, device, torch.float32)
    for activation in ACTIVATE:
        work = Work((spec,), epilogue=Epilogue(activation=activation))
        x, out = torch.full((16, 16), float("nan"), device=device), torch.zeros(16, 16).to(device)
        check(triton_source.forward(work, Tiles(rows=16, inner=16)), x, *cores, out)
        assert out.isnan().all()
