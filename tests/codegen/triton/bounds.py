"""Drawn operands of kernels, the reference in float64, and how far from it they may be."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from torch import Tensor

from tensorize.algebra.reconstruct import reconstruct
from tensorize.codegen.device import launch
from tensorize.codegen.triton.module import Source
from tensorize.codegen.triton.roles import Tiles
from tensorize.ir.spec import TTSpec

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

drawn = settings(
    max_examples=12,
    phases=(Phase.explicit, Phase.generate),  # making a failure smaller takes minutes here
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


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
