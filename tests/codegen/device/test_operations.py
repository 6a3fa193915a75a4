"""``backend="triton"``: a compiled model run by kernels, in eager, compiled and exported form."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tensorize
from tensorize import TTSpec
from tensorize.algebra import interpret
from tensorize.codegen.device import autotune, launch, operations
from tensorize.codegen.device.triton_env import interpreting, precision
from tensorize.codegen.triton import tiles
from tensorize.ir.work import Epilogue, Work
from tensorize.weight import whole_model
from tensorize.weight.contractions import contractions
from tensorize.weight.cores import Cores
from tests.kernels import each_device, here, holds_under_the_interpreter
from tests.paths import ROOT

pytest.importorskip("triton", reason="triton is not installed")

RANKS = {"table.weight": "full", "up.weight": 8, "down.weight": "full", "out.weight": 4}
FORMATS = {"table.weight": "tt", "down.weight": "tt", "*": "low_rank"}


class Net(nn.Module):
    """A table, and linears of low rank and as trains, with and without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 24)
        self.up = nn.Linear(24, 30)
        self.down = nn.Linear(30, 24, bias=False)
        self.out = nn.Linear(24, 7)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        return self.out(x + self.down(torch.relu(self.up(x))))


IDS = torch.arange(6).reshape(2, 3)


def compiled(backend: str, model: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(0)
    return tensorize.compile(
        model or Net(),
        None,
        example_inputs=(IDS,),
        formats=FORMATS,
        ranks=RANKS,
        backend=backend,
    )


def test_everything_holds_under_the_interpreter() -> None:
    holds_under_the_interpreter(__file__)


@pytest.mark.slow
def test_what_takes_longer_holds_under_the_interpreter() -> None:
    holds_under_the_interpreter(__file__, "slow")


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
@pytest.mark.parametrize("spec", [TTSpec.low_rank(9, 7, 3), TTSpec((3, 3), (2, 4), (2,))], ids=repr)
@pytest.mark.parametrize("contract", ["columns", "rows"])
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
        TTSpec.low_rank(9, 7, 3),
        TTSpec.low_rank(560, 530, 528),  # many rows of such a rank are the library's
        TTSpec((3, 3), (2, 4), (2,)),
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


# --------------------------------------------------------------------------- without a GPU


@pytest.mark.skipif(interpreting() or torch.cuda.is_available(), reason="kernels run here")
def test_the_first_forward_tells_both_ways_out() -> None:
    model = compiled("triton")
    with pytest.raises(tensorize.TensorizeError, match=r"GPU.*TRITON_INTERPRET=1"):
        model(IDS)


def test_kernels_of_any_compiled_model_can_be_read() -> None:
    found = tensorize.kernels(compiled("aten"))
    assert {name for name in found if name.startswith("up.")} == {
        "up.weight.forward",
        "up.weight.forward_to_512",
        "up.weight.forward_to_64",
        "up.weight.decode",
        "up.weight.forward_saved",
        "up.weight.input_gradient",
        "up.weight.core_gradients",
    }
    assert "table.weight.lookup" in found
    text = str(found["up.weight.forward"])
    assert "W (30, 24): c0 (m0, r1), c1 (r1, n1); m0=30, r1=8, n1=24." in text
    assert "bias" in text
    assert "bias" not in str(found["down.weight.forward"])
    assert repr(found["up.weight.decode"]) == "Kernel('up.weight.decode', torch.float32)"


def test_weights_that_no_kernel_computes_say_so() -> None:
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(16 * 16, 640))
    small = tensorize.compile(
        model,
        None,
        example_inputs=(torch.randn(1, 8, 6, 6),),
        formats="low_rank",
        ranks={"0.weight": 4, "2.weight": "full"},
        backend="triton",
    )
    assert not any(name.startswith("0.") for name in tensorize.kernels(small))
    said = {site.name: site.runs_by for site in tensorize.report(small).sites}
    assert [(by.winner, by.why) for by in said["0.weight"]] == [
        ("library", "kernels compute no conv2d")
    ]
    assert [(by.first, by.last, by.winner) for by in said["2.weight"]] == [(1, None, "kernels")]
    high = nn.Sequential(nn.Linear(600, 600), nn.Linear(600, 600))
    small = tensorize.compile(
        high, None, example_inputs=(torch.randn(1, 600),), ranks={"*": 560}, backend="triton"
    )
    (by, rest) = tensorize.report(small).sites[0].runs_by
    assert (by.first, by.last, by.winner) == (1, 16, "kernels")
    assert (rest.first, rest.last, rest.winner) == (17, None, "library")


def test_a_kernel_is_compiled_for_a_target() -> None:
    if interpreting():
        pytest.skip("the interpreter does not compile")
    made = tensorize.kernels(compiled("aten"))["up.weight.forward"].compile("hip:gfx90a")
    assert (made.target, made.spills) == ("hip:gfx90a", 0)
    assert "amdgcn" in made.asm


def test_the_first_call_of_a_kernel_is_told(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "_called", set())
    source = autotune.source(WORK, torch.float32, 1, "cpu")
    with caplog.at_level(logging.INFO, logger="tensorize"):
        for dtype in (torch.float32, torch.float32, torch.bfloat16):
            launch._tell_of_first_call(source, dtype)
    told = [record.getMessage() for record in caplog.records]
    assert sum("tensorize calibrate --model" in line for line in told) == 1
    assert sum("first call of kernel decode" in line for line in told) == 2


def test_a_backend_that_is_unknown_is_refused() -> None:
    with pytest.raises(tensorize.TensorizeError, match="'aten', 'triton'"):
        compiled("cuda")


# ------------------------------------------------------------------------------- choices

WORK = Work((TTSpec.low_rank(64, 64, 8),), epilogue=Epilogue(bias=True))


def test_choices_are_deterministic_and_never_kernels_where_nothing_was_measured() -> None:
    one = autotune.source(WORK, torch.float32, 1, "cpu")
    few = autotune.source(WORK, torch.float32, 3, "cpu")
    many = autotune.source(WORK, torch.float32, 3000, "cpu")
    assert (one.name, few.name, many.name) == ("decode", "decode", "pair")
    assert autotune.source(WORK, torch.float32, 7, "cpu") is few
    assert not autotune.wins(WORK, torch.float32, 3, "cpu")
    assert not autotune.known("cpu")
    with pytest.raises(ValueError, match="on a GPU"):
        autotune.tune(WORK, torch.float32, 1, "cpu")
    with pytest.raises(tensorize.TensorizeError, match="on a GPU"):
        tensorize.tune_kernels(compiled("aten"))


def test_choices_are_kept_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORIZE_CACHE_DIR", str(tmp_path))
    autotune.forget()
    cut = tiles.Tiles(rows=16, inner=32, outer=32)
    try:
        choice = autotune.Choice("forward", cut, ratio=0.5)
        autotune.keep(WORK, torch.float32, autotune.bucket(2), "cpu", choice)
        assert autotune.recorded(WORK, torch.float32, 16, "cpu") == choice
        assert autotune.wins(WORK, torch.float32, 9, "cpu")
        assert not autotune.wins(WORK, torch.float32, 17, "cpu")
        assert not autotune.wins(WORK, torch.bfloat16, 9, "cpu")
        assert autotune.source(WORK, torch.float32, 2, "cpu").tiles == cut
        autotune.place("cpu").write_text("damaged")
        autotune.forget()
        assert not autotune.wins(WORK, torch.float32, 9, "cpu")
    finally:
        autotune.forget()


def test_a_choice_holds_for_the_precision_that_it_was_measured_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What torch is told of TF32 is true of both, the kernel and the library."""
    monkeypatch.setenv("TENSORIZE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    given = torch.float32, 16, "cuda:0"
    matmul: Any = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    autotune.forget()
    try:
        matmul.fp32_precision = "tf32"
        assert precision(torch.float32, "cuda:0") == "tf32"
        assert precision(torch.bfloat16, "cuda:0") == "ieee"
        assert precision(torch.float32, "cpu") == "ieee"
        autotune.keep(WORK, *given, autotune.Choice("forward", tiles.Tiles(), ratio=0.5))
        assert autotune.wins(WORK, *given)
        matmul.fp32_precision = "ieee"
        assert not autotune.wins(WORK, *given)
    finally:
        matmul.fp32_precision = before
        autotune.forget()


def test_what_won_anywhere_is_an_operation_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By itself or in a launch with others; what never won is left to the library."""
    monkeypatch.setenv("TENSORIZE_CACHE_DIR", str(tmp_path))
    autotune.forget()
    try:
        won, lost, never = (TTSpec.low_rank(64, 48, rank) for rank in (8, 12, 16))
        for works, ratio in (((won, won), 0.8), ((lost,), 1.1)):
            work = Work(works)
            (choice, *_) = autotune.candidates(work, torch.float32, 9)
            autotune.keep(work, torch.float32, 16, "cpu", replace(choice, ratio=ratio))
        assert autotune.winners("cpu") == {won}
        assert never not in autotune.winners("cpu")
    finally:
        autotune.forget()


def test_a_kernel_that_does_not_fit_gets_fewer_tiles_in_flight() -> None:
    class OutOfResources(Exception):
        """As triton's."""

    asked: list[int] = []

    def launched(room: int, num_stages: int) -> None:
        asked.append(num_stages)
        if num_stages > room:
            raise OutOfResources("shared memory")

    launch.fit(partial(launched, 2), 4, "one")
    launch.fit(partial(launched, 2), 4, "one")  # what fits is known now
    assert asked == [4, 3, 2, 2]
    with pytest.raises(launch.DoesNotFit, match="shared memory"):
        launch.fit(partial(launched, 0), 2, "another")

    def other(num_stages: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        launch.fit(other, 4, "third")


def test_every_candidate_is_emitted() -> None:
    for rows in (1, 300):
        found = list(autotune.candidates(WORK, torch.bfloat16, rows))
        assert len(set(found)) == len(found) >= 3
        assert all(autotune.emit(WORK, choice).text for choice in found)
    large = Work((TTSpec.low_rank(2048, 2048, 700),))
    assert {choice.family for choice in autotune.candidates(large, torch.bfloat16, 1)} == {"decode"}
    with pytest.raises(operations.NotCovered):
        list(autotune.candidates(large, torch.bfloat16, 100))


@pytest.mark.slow
def test_every_step_of_the_benchmark_runs() -> None:
    """At a tiny size; without a GPU, in triton's interpreter."""
    if interpreting():
        pytest.skip("it is run by the tests that need no interpreter")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--smoke"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    lines = done.stdout.splitlines()
    assert "winner" in lines[-3]
    assert [line.split()[:3] for line in lines[-2:]] == [
        ["64x64", "r16", "T1"],
        ["64x64", "r16", "T20"],
    ]


def test_the_benchmark_needs_a_gpu() -> None:
    from benchmarks import gpu

    assert len(list(gpu.grid(gpu.FULL))) == 75
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="no GPU"):
            gpu.main([])


# --------------------------------------------------------------------------------- on a GPU


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
