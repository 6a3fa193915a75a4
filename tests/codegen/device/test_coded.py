"""Weights of a few bits by kernels that read their codes."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

import tensorize
from tensorize.algebra.metric import Metric
from tensorize.codegen.device import coded, operations
from tensorize.codegen.device.triton_env import interpreting
from tensorize.codegen.triton.coded import CodedProduct, default_tiles, forward
from tensorize.codegen.triton.roles import NotCovered
from tensorize.formats.registry import format_of
from tensorize.ir.coded import DenseSpec, QuantizedSpec
from tensorize.ir.spec import Spec, TTSpec
from tests.kernels import each_device, here, in_codes
from tests.paths import ROOT

pytest.importorskip("triton", reason="triton is not installed")

M, N, R = 24, 70, 9
INSIDE: dict[str, Spec] = {
    "dense": DenseSpec((M, N)),
    "low rank": TTSpec.low_rank(M, N, R),
    "pivoted": TTSpec.low_rank(M, N, R, pivoted=1),
}
PRECISIONS = ("int8", "int4", "int3", "int2")


def held(spec: QuantizedSpec, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, ...]:
    """A random weight of a spec, rounded."""
    draw = torch.Generator().manual_seed(0)
    cores = [torch.randn(shape, generator=draw) for shape in spec.inner.core_shapes]
    if spec.inner.pivoted:
        cores.append(torch.randperm(N, generator=draw).int())
    found = format_of(spec).rounded(spec, cores, (Metric(1.0, None, None),), dtype)
    return tuple(tensor.to(device) for tensor in found)


@each_device
@pytest.mark.parametrize("contract", ["columns", "rows"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("inside", INSIDE)
def test_a_product_is_that_of_the_numbers(
    inside: str, precision: str, contract: str, device: str
) -> None:
    spec = QuantizedSpec(INSIDE[inside], precision)
    run = operations.contractions(spec)[contract]
    width, out = (N, M) if contract == "columns" else (M, N)
    for dtype, rows in ((torch.float32, (3, 7)), (torch.bfloat16, (1,)), (torch.float16, (2, 0))):
        cores = held(spec, dtype, device)
        x, bias = (torch.randn(shape, device=device).to(dtype) for shape in ((*rows, width), out))
        with torch.no_grad():
            y = run(x, cores, bias)
        exact = [core.double() if core.is_floating_point() else core for core in cores]
        weight = format_of(spec).reconstruct(spec, exact)
        want = x.double() @ (weight.mT if contract == "columns" else weight) + bias.double()
        assert (y.dtype, y.shape) == (dtype, want.shape)
        # Numbers, what is between two factors, and y are rounded.
        bound = 4 * torch.finfo(dtype).eps
        assert (y.double() - want).norm() <= bound * want.norm()


@each_device
def test_columns_that_end_within_a_byte_and_within_a_group(device: str) -> None:
    for n in (1, 7, 63, 65, 129):
        for precision in ("int4", "int3"):
            spec = QuantizedSpec(DenseSpec((5, n)), precision)
            cores = held(spec, torch.float32, device)
            with torch.no_grad():
                rows = torch.eye(n, device=device)
                y = operations.contractions(spec)["columns"](rows, cores)
            torch.testing.assert_close(y.mT, format_of(spec).reconstruct(spec, cores))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


def compiled(backend: str, **options: object) -> nn.Module:
    given = {"formats": "dense", "precision": "int4", "activations": "float", **options}
    return tensorize.compile(
        Net(), 0.3, example_inputs=torch.randn(4, 64), metric="frobenius", progress=False,
        backend=backend, **given,
    )  # fmt: skip


@each_device
def test_a_model_runs_by_them_and_trains_by_numbers(device: str) -> None:
    expected, model = compiled("aten").to(device), compiled("triton").to(device)
    x = torch.randn(5, 64, device=device)
    runs_by = {each.winner for site in tensorize.report(model).sites for each in site.runs_by}
    assert runs_by == {"kernels"}
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected(x))
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(x), model(x))
    model(x).square().sum().backward()
    expected(x).square().sum().backward()
    for mine, other in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


@here
def test_no_number_is_made_where_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = compiled("triton")

    def never(self: object) -> Tensor:
        raise AssertionError("codes were made numbers")

    monkeypatch.setattr("tensorize.formats.quantized.Coded.values", never)
    with torch.no_grad():
        model(torch.randn(5, 64))
    with pytest.raises(AssertionError, match="made numbers"):
        model(torch.randn(5, 64))  # gradients are recorded


@here
def test_compiled_graphs_call_the_operation() -> None:
    torch._dynamo.reset()
    model, x = compiled("triton"), torch.randn(5, 64)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="aot_eager")(x), model(x))


@here
def test_the_operation_passes_opcheck() -> None:
    spec = in_codes(M, N, "int4")
    cores = list(held(spec, torch.float32))
    x, bias, added = (torch.randn(shape) for shape in ((3, N), (M,), (3, M)))
    given = (x, cores, bias, added, spec.text, "columns")
    torch.library.opcheck(torch.ops.tensorize.triton_coded.default, given)


def test_kernels_are_listed_and_say_what_they_are() -> None:
    some = tensorize.kernels(compiled("aten", formats=("dense", "low_rank")))
    dense = tensorize.kernels(compiled("aten"))
    assert {name.rpartition(".")[0] for name in dense} == {"up.weight", "down.weight"}
    assert all("codes of 4 bits" in str(kernel) for kernel in dense.values())
    assert some


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("contract", ["columns", "rows"])
@pytest.mark.parametrize("shape", [(4096, 4096), (1000, 777)])
@pytest.mark.slow
def test_they_fit_on_every_target(
    shape: tuple[int, int], contract: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorize.codegen.device import compiler

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    product = CodedProduct(in_codes(*shape, precision), contract, bias=True, added=True)
    for dtype in (torch.bfloat16, torch.float32):
        for rows in (16, 4096):
            source = forward(product, default_tiles(product, dtype.itemsize, rows))
            for target in compiler.TARGETS:
                assert compiler.compile(source, target, dtype).spills == 0, (dtype, rows, target)


def test_what_has_no_kernel_says_why() -> None:
    train = QuantizedSpec(TTSpec.low_rank(8, 8, 2, experts=3), "int8")
    assert "stack of experts" in str(coded.why_not(train))
    assert operations.contractions(train) == {}
    empty = CodedProduct(in_codes(8, 0, "int8"))
    with pytest.raises(NotCovered, match="no entries"):
        forward(empty, default_tiles(empty, 4, 1))


@pytest.mark.slow
def test_every_step_of_the_benchmark_runs() -> None:
    """At a tiny size; without a GPU, in triton's interpreter."""
    if interpreting():
        pytest.skip("it is run by the tests that need no interpreter")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_bits", "--smoke"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("numbers made anew") == 8
