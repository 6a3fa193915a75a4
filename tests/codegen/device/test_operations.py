"""``backend="triton"``: a compiled model run by kernels, in eager, compiled and exported form."""

from __future__ import annotations

import copy
import json
import pickle
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tensorize
from tensorize import TTSpec
from tensorize.codegen.device import launch, operations
from tensorize.formats import interpret
from tensorize.weight import whole_model
from tensorize.weight.contractions import contractions
from tensorize.weight.cores import Cores
from tests.codegen.device.compiled_nets import IDS, compiled
from tests.kernels import each_device, here, holds_under_the_interpreter
from tests.marks import slow

PAIR, TRAIN = TTSpec.low_rank(9, 7, 3), TTSpec((3, 3), (2, 4), (2,))

pytest.importorskip("triton", reason="triton is not installed")


@pytest.mark.slow
def test_what_takes_longer_holds_under_the_interpreter() -> None:
    holds_under_the_interpreter(__file__, marks="slow")


@each_device
def test_outputs_and_gradients_are_those_of_torch(device: str) -> None:
    expected, model = compiled("aten").to(device), compiled("triton").to(device)
    ids = IDS.to(device)
    y, wanted = model(ids), expected(ids)
    torch.testing.assert_close(y, wanted)
    y.square().sum().backward()
    wanted.square().sum().backward()
    for (name, mine), (_, other) in zip(
        model.named_parameters(), expected.named_parameters(), strict=True
    ):
        torch.testing.assert_close(mine.grad, other.grad, msg=lambda text, n=name: f"{n}: {text}")


@here
def test_copies_pickles_and_other_dtypes() -> None:
    model = compiled("triton")
    wanted = model(IDS)
    assert torch.equal(copy.deepcopy(model)(IDS), wanted)
    assert torch.equal(pickle.loads(pickle.dumps(model))(IDS), wanted)
    double = copy.deepcopy(model).double()(IDS)  # no kernels: torch operations
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), wanted)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(model(IDS).float(), wanted, atol=0.1, rtol=0.1)
    torch.testing.assert_close(tensorize.densify(model)(IDS), wanted)


@each_device
def test_compiled_and_exported(device: str) -> None:
    model, ids = compiled("triton").to(device), IDS.to(device)
    wanted = model(ids)
    fast = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(fast(ids), wanted)
    fast(ids).sum().backward()
    assert model.up.first.weight.grad is not None
    exported = torch.export.export(model, (ids,))
    torch.testing.assert_close(exported.module()(ids), wanted)
    called = {str(node.target) for node in exported.graph.nodes}
    assert {"tensorize.triton_contract.default", "tensorize.triton_lookup.default"} <= called


@each_device
@pytest.mark.slow  # it compiles C++
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch warns of itself
def test_aot_inductor_calls_the_operations(tmp_path: Path, device: str) -> None:
    """In this process, which knows them; a process without tensorize does not."""
    model, ids = compiled("triton").to(device), IDS.to(device)
    wanted = model(ids)
    program = torch.export.export(model, (ids,))
    package = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "model.pt2")
    )
    torch.testing.assert_close(torch._inductor.aoti_load_package(package)(ids), wanted)


@here
def test_hooks_of_a_factor_are_run() -> None:
    model = compiled("triton")
    wanted, seen = model(IDS), []
    model.up.second.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(model(IDS), wanted)
    assert seen == [1]


@here
def test_what_was_not_measured_runs_by_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    model = compiled("aten")
    wanted = model(IDS)
    build = partial(operations.contractions, measured=True)
    assert whole_model.use_kernels(model, build) == 4
    monkeypatch.setattr(launch, "run", lambda *_: pytest.fail("a kernel was launched"))
    torch.testing.assert_close(model(IDS), wanted)
    model(IDS).sum().backward()
    assert model.out.first.weight.grad is not None


@each_device
@pytest.mark.parametrize(
    ("spec", "contract"),
    [
        (PAIR, "columns"),
        slow(PAIR, "rows"),
        slow(TRAIN, "columns"),
        (TRAIN, "rows"),
    ],
    ids=repr,
)
def test_operations_pass_opcheck(spec: TTSpec, contract: str, device: str) -> None:
    def draw(*shape: int, learns: bool = False) -> Tensor:
        return torch.randn(shape, device=device, requires_grad=learns)

    text = json.dumps(spec.to_dict())
    into, out = spec.shape[::-1] if contract == "columns" else spec.shape
    cores = [draw(*shape, learns=True) for shape in spec.core_shapes]
    x, bias = draw(5, into, learns=True), draw(out, learns=True)
    contract_op, lookup_op = torch.ops.tensorize.triton_contract, torch.ops.tensorize.triton_lookup
    none, frozen = draw(0, into, learns=True), [core.detach() for core in cores]
    for rows, own, saved in ((x, cores, True), (none, cores, True), (x, frozen, False)):
        torch.library.opcheck(contract_op, (rows, own, bias, text, contract, saved, False))
    with pytest.raises(RuntimeError, match="nothing was saved"):
        contract_op(x, cores, bias, text, contract, False, False)[0].sum().backward()
    if contract == "columns":
        numbers = torch.tensor([0, 8, 3], device=device)
        torch.library.opcheck(lookup_op, (numbers, cores, text))
        t = draw(5, operations._saved_width(spec, "columns"))
        s = draw(5, operations._saved_width(spec, "rows"))
        gradients = torch.ops.tensorize.triton_core_gradients
        torch.library.opcheck(gradients, (draw(5, into), draw(5, out), t, s, text, contract))


@each_device
@pytest.mark.parametrize(
    "spec",
    [
        PAIR,
        TTSpec.low_rank(560, 530, 528),  # many rows of such a rank are the library's
        TRAIN,
        TTSpec((2, 2, 2), (2, 2, 3), (2, 3)),
    ],
    ids=repr,
)
def test_gradients_of_any_leading_shape(spec: TTSpec, device: str) -> None:
    run = operations.contractions(spec)["columns"]
    cores = [
        torch.nn.Parameter(torch.randn(shape, device=device) / max(shape) ** 0.5)
        for shape in spec.core_shapes
    ]
    for lead in ((), (3,), (2, 0), (2, 3)):
        x = torch.randn(*lead, spec.shape[1], device=device, requires_grad=True)
        y, wanted = run(x, cores), interpret.apply(spec, cores, x).float()
        torch.testing.assert_close(y, wanted, atol=1e-5, rtol=1e-4)
        dy = torch.randn_like(y)
        mine = torch.autograd.grad(y, (x, *cores), dy)
        other = torch.autograd.grad(wanted, (x, *cores), dy)
        for a, b in zip(mine, other, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@each_device
def test_few_rows_of_a_high_rank_are_a_kernels_and_many_the_librarys(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = TTSpec.low_rank(64, 48, 600)
    run = operations.contractions(spec)["columns"]
    cores = [torch.randn(shape, device=device) / 20 for shape in spec.core_shapes]
    launched: list[str] = []
    launch_it = launch.run
    monkeypatch.setattr(
        launch, "run", lambda source, *t: (launched.append(source.name), launch_it(source, *t))
    )
    for rows in (3, 40):
        x = torch.randn(rows, 48, device=device)
        torch.testing.assert_close(run(x, cores), x @ cores[1].t() @ cores[0].t())
    assert launched == ["decode"]


def test_a_limit_on_what_is_saved_goes_before_kernels() -> None:
    """And what a weight with kernels runs by else is its own plan."""
    model = compiled("triton")
    holder = next(m for m in model.modules() if isinstance(m, Cores))
    planned = contractions(holder.spec, "cpu", torch.float32, holder.breakpoints, None)
    assert holder.contractions["columns"].planned is planned
    tensorize.weight.limit_saved(model)
    limited = contractions(holder.spec, "cpu", torch.float32, holder.breakpoints, 0)
    assert holder.contractions is limited
    tensorize.weight.limit_saved(model, None)
    assert holder.contractions["columns"].planned is planned


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 300])
def test_a_cuda_graph_captures_and_replays(rows: int) -> None:
    """Few rows count arrivals in memory that no replay has to fill; both give the same bits."""
    layers = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 64)).cuda()
    x = torch.randn(rows, 64, device="cuda")
    small = tensorize.compile(
        layers, None, example_inputs=(x,), formats="low_rank", ranks={"*": 16}, backend="triton"
    )
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            small(x)  # kernels are compiled before anything is captured
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = small(x)
        for _ in range(3):
            x.copy_(torch.randn_like(x))
            graph.replay()
            assert torch.equal(y, small(x))
