"""Kernels against the reference in float64: under triton's interpreter, and on a GPU (``-m gpu``).

The interpreter must be on before triton is imported, so the cases run in a process of their own.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from hypothesis import (
    HealthCheck,
    Phase,
    given,
    settings,
)
from hypothesis import (
    strategies as st,
)
from torch import Tensor

from tensorize.algebra.reconstruct import reconstruct
from tensorize.codegen.device import launch, reference
from tensorize.codegen.device.triton_env import interpreting, load
from tensorize.codegen.triton import source as triton_source
from tensorize.codegen.triton.module import Source
from tensorize.codegen.triton.roles import NotCovered, Tiles, roles
from tensorize.ir.spec import TTSpec
from tensorize.ir.work import Epilogue, Norm, Work
from tests.kernels import each_device, holds_under_the_interpreter

pytest.importorskip("triton", reason="triton is not installed")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
drawn = settings(
    max_examples=12,
    phases=(Phase.explicit, Phase.generate),  # making a failure smaller takes minutes here
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def test_everything_holds_under_the_interpreter() -> None:
    holds_under_the_interpreter(__file__)


# ------------------------------------------------------------------------- values and their bounds


class Bounded:
    """A value in float64 and a bound on what rounding may do to it."""

    def __init__(self, value: Tensor, bound: Tensor) -> None:
        self.value, self.bound = value, bound

    def check(self, y: Tensor) -> None:
        assert y.shape == self.value.shape
        # The last rounding is the output's own. The interpreter cuts bfloat16 off: twice as much.
        last = 2 * torch.finfo(y.dtype).eps * (self.value.abs() + self.bound)
        excess = (y.double() - self.value).abs() - self.bound - last
        assert not y.isnan().any(), "what was not written stayed NaN"
        assert excess.max() <= 0 if y.numel() else True, f"{excess.max()} above the bound"


def product(x: Tensor, size: Tensor, spec: TTSpec, cores: Sequence[Tensor], contract: str):
    """x W with |error| <= roundings * (|x| |cores|): every intermediate is rounded once a core.

    ``size`` is |x|, or what stands for it where x itself was rounded (Higham 3.5).
    """

    def times(a: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        weight = reconstruct_any(spec, [core.double() for core in tensors])
        return a @ (weight.mT if contract == "columns" else weight)

    terms = sum(axis for _, axis in spec.sizes)
    eps = torch.finfo(cores[0].dtype).eps
    roundings = 2 * (len(cores) + 1) * eps + terms * torch.finfo(torch.float32).eps
    bound = roundings * times(size, [core.abs() for core in cores])
    return Bounded(times(x, cores), bound)


def reconstruct_any(spec: TTSpec, cores: Sequence[Tensor]) -> Tensor:
    """W, also for specs that share indices."""
    if spec.format == "low_rank":
        return cores[0] @ cores[1]
    if hasattr(TTSpec, "block") or not set(spec.cores[0]) & set(spec.cores[1]) & {"m1", "n0"}:
        return reconstruct(spec, cores)
    letters = {name: chr(97 + k) for k, (name, _) in enumerate(spec.sizes)}
    subscripts = ["".join(letters[a] for a in axes) for axes in spec.cores]
    out = "".join(letters[a] for a in (*spec.rows, *spec.columns))
    return torch.einsum(f"{','.join(subscripts)}->{out}", *cores).reshape(spec.shape)


def draw(shape: Sequence[int], device: str, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(*shape)).to(device, dtype)


def draw_rows(rows: int, columns: int, device: str, dtype: torch.dtype) -> Tensor:
    """Rows that are further apart than they are long."""
    return draw((rows, columns + 5), device, dtype)[:, :columns]


def draw_cores(spec: TTSpec, device: str, dtype: torch.dtype) -> list[Tensor]:
    return [draw(shape, device, dtype, shape[-1] ** -0.5) for shape in spec.core_shapes]


def poisoned(rows: int, columns: int, like: Tensor) -> Tensor:
    """What a kernel leaves unwritten is seen; the rows are further apart than they are long."""
    return like.new_full((rows, columns + 3), float("nan"))[:, :columns]


def check(source: Source, *tensors: Tensor) -> None:
    """Launch; nothing outside the outputs is written."""
    around = [t._base for t in tensors[-len(source.outputs) :] if t._base is not None]
    launch.run(source, *tensors)
    for base, out in zip(around, tensors[-len(around) :] if around else (), strict=True):
        assert base[:, out.shape[1] :].isnan().all(), "written outside the output"


dtypes = st.sampled_from(DTYPES)
small = st.integers(1, 40)
some_rows = st.sampled_from((0, 1, 3, 16, 17))
some_tiles = st.builds(
    Tiles,
    rows=st.sampled_from((16, 32)),
    inner=st.sampled_from((16, 32)),
    outer=st.sampled_from((16, 32)),
    slice=st.sampled_from((16, 48, 1 << 30)),
    rank=st.sampled_from((16, 32)),
    inner_slice=st.sampled_from((16, 40, 1 << 30)),
)
sides = st.sampled_from(("columns", "rows"))
low_ranks = st.builds(TTSpec.low_rank, small, small, st.integers(1, 50))
two_cores = st.one_of(
    st.builds(
        lambda m, n, r: TTSpec(m, n, (r,)),
        st.tuples(st.integers(1, 4), st.integers(2, 20)),
        st.tuples(st.integers(2, 3), st.integers(2, 5)),
        st.integers(1, 20),
    ),
    st.builds(
        TTSpec.block,
        st.tuples(st.integers(2, 20), st.integers(2, 3)),
        st.tuples(st.integers(2, 3), st.integers(2, 4)),
        st.integers(1, 20),
    ),
)
chains = st.one_of(
    st.builds(
        TTSpec,
        st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
        st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(2, 20)),
        st.tuples(st.integers(1, 4), st.integers(1, 17)),
    ),
    st.builds(
        TTSpec,
        st.just((2, 3, 1, 2)),
        st.tuples(st.integers(1, 2), st.just(2), st.integers(1, 2), st.integers(2, 3)),
        st.tuples(*[st.integers(1, 3)] * 3),
    ),
)

# ------------------------------------------------------------------------------- two cores, chains


@each_device
@drawn
@given(dtypes, st.one_of(low_ranks, two_cores), sides, some_rows, some_tiles, st.booleans())
def test_two_cores(device, dtype, spec, contract, rows, tiles, saved) -> None:
    torch.manual_seed(rows)
    work = Work((spec,), contract, epilogue=Epilogue(bias=True, residual=True), saved=saved)
    try:
        source = triton_source.forward(work, tiles)
    except NotCovered:
        return
    x, cores = draw_rows(rows, work.into, device, dtype), draw_cores(spec, device, dtype)
    bias, residual = draw(work.outs, device, dtype), draw_rows(rows, work.outs[0], device, dtype)
    outputs = [poisoned(rows, work.outs[0], x)]
    role = roles(spec, contract)
    if saved:
        width = 1
        for axis in role.saved:
            width *= spec.size[axis]
        outputs.append(poisoned(rows, width, x))
    check(source, x, *cores, bias, residual, *outputs)
    y = product(x.double(), x.double().abs(), spec, cores, contract)
    y.value += bias.double() + residual.double()
    y.bound += 1e-6 * (bias.double().abs() + residual.double().abs())
    y.check(outputs[0])
    if saved:
        assert not outputs[1].isnan().any()


@each_device
@drawn
@given(dtypes, chains, sides, some_rows)
def test_chains(device, dtype, spec, contract, rows) -> None:
    torch.manual_seed(rows)
    work = Work((spec,), contract, epilogue=Epilogue(bias=True, residual=True))
    try:
        source = triton_source.forward(work, Tiles(rows=16, inner=16))
    except NotCovered:
        return
    x, cores = draw_rows(rows, work.into, device, dtype), draw_cores(spec, device, dtype)
    bias, residual = draw(work.outs, device, dtype), draw_rows(rows, work.outs[0], device, dtype)
    out = poisoned(rows, work.outs[0], x)
    check(source, x, *cores, bias, residual, out)
    y = product(x.double(), x.double().abs(), spec, cores, contract)
    y.value += bias.double() + residual.double()
    y.bound += 1e-6 * (bias.double().abs() + residual.double().abs())
    y.check(out)


# ------------------------------------------------------------------------- norms and epilogues

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


@each_device
@each_dtype
@pytest.mark.parametrize("contract", ["columns", "rows"])
def test_few_rows_give_the_same_bits_and_leave_the_counters_zero(device, dtype, contract) -> None:
    spec = TTSpec.low_rank(40, 50, 20)
    work = Work((spec,), contract, epilogue=Epilogue(bias=True))
    tiles = Tiles(rows=16, inner=16, outer=16, slice=32, rank=16, inner_slice=32)
    source = triton_source.decode(work, tiles)
    rows = 18
    x, cores = draw_rows(rows, work.into, device, dtype), draw_cores(spec, device, dtype)
    bias = draw(work.outs, device, dtype)
    arrived = torch.zeros(2 * source.counters, dtype=torch.int32, device=device)
    found = []
    for _ in range(3):
        y = poisoned(rows, work.outs[0], x)
        options = {"precision": "ieee", "widen": interpreting(), "num_stages": 2}
        load(source.text)["launch"](x, *cores, bias, y, arrived, **options)
        assert not arrived.any()
        found.append(y.clone())
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    y = product(x.double(), x.double().abs(), spec, cores, contract)
    # A share is rounded for each slice of the summed entries.
    y = Bounded(y.value + bias.double(), 2 * y.bound + 1e-6 * bias.double().abs())
    y.check(found[0])


# --------------------------------------------------------------------- lookups and gradients


@each_device
@drawn
@given(dtypes, st.one_of(low_ranks, two_cores, chains), some_rows, some_tiles)
def test_lookups(device, dtype, spec, rows, tiles) -> None:
    torch.manual_seed(rows)
    try:
        source = triton_source.lookup(spec, tiles)
    except NotCovered:
        return
    cores = draw_cores(spec, device, dtype)
    row = torch.randint(spec.shape[0], (rows,), device=device)
    y = poisoned(rows, spec.shape[1], cores[0])
    check(source, row, *cores, y)
    one = torch.eye(spec.shape[0], dtype=torch.float64, device=device)[row]
    product(one, one, spec, cores, "rows").check(y)


@each_device
def test_a_row_that_the_table_lacks_is_not_a_number(device) -> None:
    for spec in (TTSpec.low_rank(9, 20, 3), TTSpec((3, 3), (4, 5), (2,))):
        source = triton_source.lookup(spec, Tiles(rows=16))
        cores = draw_cores(spec, device, torch.float32)
        y = torch.zeros(4, 20, device=device)
        launch.run(source, torch.tensor([0, 9, -1, 8], device=device), *cores, y)
        assert y[[1, 2]].isnan().all()
        assert not y[[0, 3]].isnan().any()


@each_device
@drawn
@given(dtypes, st.one_of(low_ranks, two_cores), sides, some_rows, some_tiles)
def test_gradients_of_cores(device, dtype, spec, contract, rows, tiles) -> None:
    torch.manual_seed(rows)
    other = "rows" if contract == "columns" else "columns"
    try:
        source = triton_source.gradients(spec, contract, tiles)
        ahead = triton_source.forward(Work((spec,), contract, saved=True), tiles)
        back = triton_source.forward(Work((spec,), other, saved=True), tiles)
    except NotCovered:
        return
    work = Work((spec,), contract)
    x, cores = draw_rows(rows, work.into, device, dtype), draw_cores(spec, device, dtype)
    dy = draw_rows(rows, work.outs[0], device, dtype)
    width = {}
    for side in (contract, other):
        width[side] = 1
        for axis in roles(spec, side).saved:
            width[side] *= spec.size[axis]
    t, s = poisoned(rows, width[contract], x), poisoned(rows, width[other], x)
    launch.run(ahead, x, *cores, poisoned(rows, work.outs[0], x), t)
    launch.run(back, dy, *cores, poisoned(rows, work.into, x), s)
    found = [torch.full_like(core, float("nan")) for core in cores]
    launch.run(source, x, dy, t, s, *found)
    exact = [core.double().requires_grad_() for core in cores]
    weight = reconstruct_any(spec, exact)
    y = x.double() @ (weight.mT if contract == "columns" else weight)
    expected = torch.autograd.grad(y, exact, dy.double())
    sizes = [core.double().abs().requires_grad_() for core in cores]
    weight = reconstruct_any(spec, sizes)
    y = x.double().abs() @ (weight.mT if contract == "columns" else weight)
    bounds = torch.autograd.grad(y, sizes, dy.double().abs())
    terms = sum(size for _, size in spec.sizes) + rows
    eps = 4 * torch.finfo(dtype).eps + terms * torch.finfo(torch.float32).eps
    for got, want, size in zip(found, expected, bounds, strict=True):
        Bounded(want, eps * size).check(got)


# ------------------------------------------------------------------------------- without either


@pytest.mark.skipif(interpreting(), reason="kernels run here")
def test_without_a_gpu_and_the_interpreter_both_ways_out_are_told() -> None:
    from tensorize.base.errors import TensorizeError

    source = triton_source.forward(Work((TTSpec.low_rank(8, 8, 2),)), Tiles())
    x = torch.zeros(2, 8)
    with pytest.raises(TensorizeError, match=r"GPU.*TRITON_INTERPRET=1"):
        launch.run(source, x, torch.zeros(8, 2), torch.zeros(2, 8), torch.zeros(2, 8))
