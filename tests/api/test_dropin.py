"""The result of ``compile`` is used like any other module: every tool of PyTorch still works.

One small model holds every form of a rewritten weight: a linear that became two, and owners with a
lazy weight: tables in low rank and as a tensor train, a linear as a train, a bare parameter, packed
attention, a convolution, a stack of experts.
"""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import io
import math
import pickle
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.func import (
    functional_call,
    grad,
    jvp,
    stack_module_state,
    vmap,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import tensorize
from tensorize.algebra import reconstruct
from tensorize.weight.install import factored
from tests.models import parameters, relative

WORDS, WIDTH, HIDDEN, EXPERTS, LENGTH = 64, 32, 40, 4, 48


class Mixed(nn.Module):
    """Words in, a score for every word out."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.places = nn.Embedding(LENGTH, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.norm = nn.LayerNorm(WIDTH)
        self.mix = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.bare = nn.Parameter(torch.randn(HIDDEN, WIDTH) / 6)
        self.chain = nn.Linear(HIDDEN, WIDTH)
        self.experts = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH) / 6)
        self.head = nn.Linear(WIDTH, WORDS)
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, ids: Tensor, *, temperature: float = 1.0) -> Tensor:
        return self.after_words(self.words(ids)) / temperature

    def after_words(self, x: Tensor) -> Tensor:
        x = x + self.places(torch.arange(x.shape[1], device=x.device))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.mix(self.norm(x).mT).mT
        x = x + self.chain(F.gelu(F.linear(x, self.bare)))
        rows = x.reshape(1, -1, WIDTH).expand(EXPERTS, -1, -1)
        x = x + torch.bmm(rows, self.experts).mean(0).view_as(x)
        return self.head(x) * self.scale


FORMS = {
    "words.weight": "low_rank", "places.weight": "tt", "attention.in_proj_weight": "low_rank",
    "attention.out_proj.weight": "low_rank", "mix.weight": "low_rank", "bare": "low_rank",
    "chain.weight": "tt", "experts": "low_rank", "head.weight": "low_rank",
}  # fmt: skip


def words(batch: int = 3, length: int = 7, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, WORDS, (batch, length), generator=generator)


IDS = words()
SHAPES = ((3, 7), (4, 9), (2, 11), (5, 5))


@functools.cache
def _made() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = Mixed().eval()
    ranks = dict.fromkeys(FORMS, 6)
    return model, tensorize.compile(
        model, None, example_inputs=(IDS,), ranks=ranks, formats={**FORMS}
    )


def dense() -> Any:
    return copy.deepcopy(_made()[0])


def small() -> Any:
    return copy.deepcopy(_made()[1])


def scores(model: Callable[..., Tensor], ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(ids)


def loss(model: Callable[..., Tensor], ids: Tensor = IDS) -> Tensor:
    return model(ids).square().mean()


def gradients(model: nn.Module, ids: Tensor = IDS) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss(model, ids), parameters), strict=True))


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


def close(got: dict[str, Tensor], want: dict[str, Tensor], within: float = 1e-5) -> None:
    assert got.keys() == want.keys()
    assert max(relative(got[name], want[name]) for name in want) < within


# Parts of torch warn of themselves.
ignore = pytest.mark.filterwarnings
OWN_DEPRECATIONS = [
    ignore("ignore:`torch.jit.script:DeprecationWarning"),
    ignore("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
]


def torch_warns_of_itself(test: Callable) -> Callable:
    for mark in OWN_DEPRECATIONS:
        test = mark(test)
    return test


# ------------------------------------------------------------------------------------- a module


def test_the_model_holds_every_form() -> None:
    sites = tensorize.report(small()).sites
    assert {site.name: site.format for site in sites} == FORMS


def test_class_signature_and_the_names_of_modules_stay() -> None:
    model, result = dense(), small()
    assert isinstance(result, Mixed)
    for name in ("words", "places", "attention", "mix", "norm"):  # that use a lazy weight
        assert isinstance(result.get_submodule(name), type(model.get_submodule(name)))
    assert inspect.signature(result.forward) == inspect.signature(model.forward)
    assert set(dict(model.named_modules())) <= set(dict(result.named_modules()))
    assert dict(result.named_buffers()).keys() == dict(model.named_buffers()).keys()
    assert scores(result).shape == scores(model).shape
    assert result(IDS, temperature=2.0).equal(result(IDS) / 2)


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (nn.Linear(48, 64), torch.ones(3, 48)),
        (nn.Embedding(64, 48), torch.tensor([[1, 5]])),
        (nn.Conv1d(32, 48, 3), torch.ones(2, 32, 9)),
    ],
    ids=["linear", "table", "convolution"],
)
def test_a_model_of_one_layer_keeps_its_class(model: nn.Module, inputs: Tensor) -> None:
    result = tensorize.compile(model, 0.5, example_inputs=(inputs,))
    assert isinstance(result, type(model))
    assert type(result).__name__ == type(model).__name__
    assert [site.format for site in tensorize.report(result).sites] == ["low_rank"]
    for copied in (copy.deepcopy(result), pickle.loads(pickle.dumps(result))):
        assert type(copied) is type(result)
        assert scores(copied, inputs).equal(scores(result, inputs))
    assert type(tensorize.densify(result)) is type(model)


@pytest.mark.parametrize("training", [False, True])
def test_outputs_and_gradients_are_those_of_the_dense_form(
    training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = small().train(training)
    plain = tensorize.densify(result)
    want, (of_bias,) = plain(IDS), torch.autograd.grad(loss(plain), [plain.chain.bias])
    monkeypatch.setattr(reconstruct, "reconstruct", None)  # no dense weight is built
    assert relative(result(IDS).detach(), want.detach()) < 1e-6
    assert relative(gradients(result)["chain.bias"], of_bias) < 1e-5


def test_state_dict_comes_back() -> None:
    result, other = small(), small()
    state = {key: value.clone() for key, value in result.state_dict().items()}
    assert state.keys() == {*dict(result.named_parameters()), "scale"}
    for p in (*other.parameters(), *other.buffers()):
        p.data.zero_()
    assert str(other.load_state_dict(state)) == "<All keys matched successfully>"
    assert scores(other).equal(scores(result))
    blank = small().to("meta")
    blank.load_state_dict(state, assign=True)
    assert scores(blank).equal(scores(result))
    with pytest.raises(RuntimeError, match=r"Missing key.*words\.weight_cores\.core_0"):
        other.load_state_dict(dense().state_dict())


def test_hooks_are_called_on_every_module() -> None:
    model, calls = dense(), []
    for name in ("head", "words", "chain"):  # before compilation
        module = model.get_submodule(name)
        module.register_forward_hook(lambda m, args, y, name=name: calls.append(name))
        module.register_full_backward_hook(lambda m, gx, gy, name=name: calls.append(f"-{name}"))
    result = tensorize.compile(
        model, None, example_inputs=(IDS,), ranks=dict.fromkeys(FORMS, 4), formats={**FORMS}
    )
    for name, module in result.named_modules():  # and after it
        module.register_forward_pre_hook(lambda m, args, name=name: calls.append(f"+{name}"))
    calls.clear()
    with warnings.catch_warnings():  # the words are numbers, so no gradient arrives at its input
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        loss(result).backward()
    assert [c for c in calls if c[0] not in "+-"] == ["words", "chain", "head"]
    assert [c for c in calls if c[0] == "-"] == ["-head", "-chain", "-words"]
    assert {"+head", "+head.first", "+head.second", "+words", "+words.weight_cores"} <= {*calls}


def test_modes_and_flags_reach_every_part() -> None:
    result = small()
    for mode in (True, False):
        assert all(m.training is mode for m in result.train(mode).modules())
    result.requires_grad_(False)
    assert not result(IDS).requires_grad
    result.words.weight.requires_grad_(True)  # as code does that freezes all but a table
    assert {n for n, p in result.named_parameters() if p.requires_grad} == {
        "words.weight_cores.core_0", "words.weight_cores.core_1",
    }  # fmt: skip


def test_dtype_and_device_moves() -> None:
    result = small()
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        moved = small().to(dtype)
        assert {p.dtype for p in moved.parameters()} == {dtype}
        assert scores(moved).dtype == dtype
        assert relative(scores(moved), scores(result)) < 40 * torch.finfo(dtype).eps + 1e-6
    blank = small().to("meta")
    assert blank(IDS.to("meta")).is_meta
    assert blank.words.weight.is_meta
    real = blank.to_empty(device="cpu")
    real.load_state_dict(result.state_dict())
    assert scores(real).equal(scores(result))


def by_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), by_torch_save]
)
def test_copies_are_whole_and_apart(copied: Callable[[nn.Module], nn.Module]) -> None:
    result = small()
    twin = copied(result)
    assert scores(twin).equal(scores(result))
    assert tensorize.report(twin) == tensorize.report(result)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert not scores(twin).equal(scores(result))


def test_another_process_reads_the_pickle(tmp_path: Path) -> None:
    ids = torch.tensor([[1, 5, 7]])
    model = nn.Sequential(nn.Embedding(64, 36), nn.Linear(36, 48), nn.Linear(48, 64))
    result = tensorize.compile(
        model, None, example_inputs=(ids,), ranks={"*": 4}, formats={"1": "tt", "*": "low_rank"}
    )
    torch.save((result, ids, scores(result, ids)), tmp_path / "model.pt")
    code = (
        "import sys, torch\n"
        "model, ids, want = torch.load(sys.argv[1], weights_only=False)\n"
        "assert model(ids).equal(want)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "model.pt")], check=True)


def test_a_state_dict_loads_without_pickle(tmp_path: Path) -> None:
    result = small()
    torch.save(result.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    other = small()
    other.load_state_dict(state)
    assert scores(other).equal(scores(result))


def test_optimizers_and_gradient_checkpointing_train_the_same() -> None:
    def step(reentrant: bool | None) -> dict[str, Tensor]:
        result = small()
        optimizer = torch.optim.AdamW(result.parameters(), lr=1e-2)
        x = result.words(IDS)
        body = functools.partial(checkpoint, result.after_words, use_reentrant=reentrant)
        y = result.after_words(x) if reentrant is None else body(x)
        y.square().mean().backward()
        optimizer.step()
        return values(result)

    want = step(None)
    assert not any(want[name].equal(value) for name, value in values(small()).items())
    for reentrant in (False, True):
        close(step(reentrant), want, 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    result = small()
    plain = tensorize.densify(result)
    with torch.autocast("cpu", dtype=dtype):
        got, want = result(IDS), scores(plain)
        loss(result).backward()
        compiled: Any = torch.compile(result, backend="aot_eager", fullgraph=True)
        assert relative(scores(compiled), scores(result)) < 10 * torch.finfo(dtype).eps
    assert got.dtype == want.dtype == dtype
    assert relative(got.detach(), want) < 10 * torch.finfo(dtype).eps
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in result.parameters())


# ------------------------------------------------------------------------------------ torch.func


def test_functional_call() -> None:
    result, other = small(), small()
    state = {name: value * 1.5 for name, value in values(result).items()}
    other.load_state_dict({**other.state_dict(), **state})
    got = functional_call(result, state, (IDS,))
    assert relative(got.detach(), scores(other)) < 1e-6
    assert scores(result).equal(scores(small()))


@ignore("ignore:`torch.jit.script:DeprecationWarning")
def test_grad_vmap_and_jvp() -> None:
    result = small()
    state = values(result)

    def of(state: dict[str, Tensor], ids: Tensor) -> Tensor:
        return loss(lambda x: functional_call(result, state, (x,)), ids)

    with sdpa_kernel(SDPBackend.MATH):  # torch has no batching rule for the fused one
        close(grad(of)(state, IDS), gradients(result))
        each = vmap(grad(of), (None, 0))(state, IDS.unsqueeze(1))
        close({name: g[1] for name, g in each.items()}, grad(of)(state, IDS[1:2]))
        direction = {name: torch.randn_like(value) for name, value in state.items()}
        _, slope = jvp(lambda s: of(s, IDS), (state,), (direction,))
        want = sum((g * direction[name]).sum() for name, g in gradients(result).items())
        assert slope.item() == pytest.approx(want.item(), rel=1e-3)


def test_vmap_over_an_ensemble() -> None:
    members = [small() for _ in range(3)]
    with torch.no_grad():
        for k, member in enumerate(members):
            member.chain.bias.add_(k)
    state, buffers = stack_module_state(members)
    with sdpa_kernel(SDPBackend.MATH):
        together = vmap(lambda p, b: functional_call(members[0], (p, b), (IDS,)))(state, buffers)
        for got, member in zip(together, members, strict=True):
            assert relative(got.detach(), scores(member)) < 1e-6


# ---------------------------------------------------------------------------- compile and export


def recompiles(model: nn.Module, backend: str, dynamic: bool | None) -> list[int]:
    """How often other shapes than the first are compiled for again: in inference, in training."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled: Any = torch.compile(model, backend=counter, fullgraph=True, dynamic=dynamic)
    eager = copy.deepcopy(model)
    seen: list[int] = []
    for shape in SHAPES:
        ids = words(*shape)
        assert relative(scores(compiled, ids), scores(eager, ids)) < 1e-5
        seen.append(counter.frame_count)
    for shape in SHAPES:
        model.zero_grad()
        loss(compiled, words(*shape)).backward()
        seen.append(counter.frame_count)
    got = {name: p.grad for name, p in model.named_parameters()}
    close(got, gradients(eager, words(*SHAPES[-1])))  # type: ignore[arg-type]
    last = len(SHAPES) - 1
    assert seen[0] > 0
    return [seen[last] - seen[0], seen[-1] - seen[last + 1]]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_once_for_all_shapes(backend: str) -> None:
    assert recompiles(small(), backend, dynamic=True) == [0, 0]


def test_compile_no_more_often_than_the_dense_form() -> None:
    want = recompiles(tensorize.densify(small()), "eager", None)
    assert recompiles(small(), "eager", None) == want


@pytest.mark.slow  # it compiles C++
@torch_warns_of_itself
def test_inductor() -> None:
    torch._dynamo.reset()
    result, eager = small(), small()
    compiled: Any = torch.compile(result, fullgraph=True, dynamic=True)
    for shape in SHAPES[:2]:
        assert relative(scores(compiled, words(*shape)), scores(eager, words(*shape))) < 1e-5
    loss(compiled).backward()
    got = {name: p.grad for name, p in result.named_parameters()}
    close(got, gradients(eager))  # type: ignore[arg-type]


def test_export() -> None:
    result = small()
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=LENGTH)
    for strict in (False, True):
        program = torch.export.export(
            result, (IDS,), dynamic_shapes={"ids": (batch, length)}, strict=strict
        )
        assert program.state_dict.keys() == result.state_dict().keys()
        assert not program.constants
        for shape in SHAPES:
            ids = words(*shape)
            assert relative(scores(program.module(), ids), scores(result, ids)) < 1e-6


@pytest.mark.slow  # it compiles C++
@torch_warns_of_itself
def test_aot_inductor(tmp_path: Path) -> None:
    result = small()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(
        result, (IDS,), dynamic_shapes={"ids": (batch, torch.export.Dim.STATIC)}
    )
    package = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "model.pt2")
    )
    loaded = torch._inductor.aoti_load_package(package)
    for size in (3, 5):
        assert relative(scores(loaded, words(size)), scores(result, words(size))) < 1e-5


@torch_warns_of_itself
def test_onnx_runtime_gives_the_same(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    result = small()
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=LENGTH)
    program = torch.onnx.export(
        result, (IDS,), dynamic_shapes={"ids": (batch, length)}, dynamo=True, verbose=False
    )
    assert program is not None
    stored = sum(math.prod(v.shape) for v in program.model.graph.initializers.values())
    assert stored < 1.2 * parameters(result) < 0.5 * parameters(dense())
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for shape in SHAPES:
        (got,) = session.run(None, {"ids": words(*shape).numpy()})
        assert relative(torch.from_numpy(got), scores(result, words(*shape))) < 1e-5


# ------------------------------------------------------------------------------- two processes


def ddp(ids: Tensor, mine: Tensor) -> None:
    wrapped = nn.parallel.DistributedDataParallel(small())
    loss(wrapped, mine).backward()
    got = {name: p.grad for name, p in wrapped.module.named_parameters()}
    close(got, gradients(small(), ids))  # type: ignore[arg-type]


def fsdp2(ids: Tensor, mine: Tensor) -> None:
    result, alone = small(), small()
    for part in (result.words, result.attention, result.chain, result.head.first, result.head):
        fully_shard(part)
    fully_shard(result)
    assert all(isinstance(p, DTensor) for p in result.parameters())
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (result, alone)]
    for _ in range(2):
        loss(result, mine).backward()
        loss(alone, ids).backward()
        got = {name: p.grad.full_tensor() for name, p in result.named_parameters()}
        close(got, {name: p.grad for name, p in alone.named_parameters()}, 1e-4)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def tensor_parallel(ids: Tensor, mine: Tensor) -> None:
    result = small()
    linears = {"head.first": ColwiseParallel(), "head.second": RowwiseParallel()}
    parallelize_module(result, init_device_mesh("cpu", (2,)), linears)
    assert result.head.first.weight.to_local().shape == (3, WIDTH)
    assert result.head.second.weight.to_local().shape == (WORDS, 3)
    assert relative(result(ids).detach(), scores(small(), ids)) < 1e-6
    loss(result, ids).backward()
    want = gradients(small(), ids)["head.first.weight"]
    assert relative(result.head.first.weight.grad.full_tensor(), want) < 1e-5


def _process(rank: int, meeting: str) -> None:
    warnings.simplefilter("error")
    # FSDP2 says so of any linear with a bias on a CPU.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    try:
        ids = words(4)
        for check in (ddp, fsdp2, tensor_parallel):
            check(ids, ids[2 * rank : 2 * rank + 2])
            gc.collect()  # what holds a process group goes before it does
            dist.barrier()
    finally:
        dist.destroy_process_group()


def test_ddp_fsdp2_and_tensor_parallel(tmp_path: Path) -> None:
    meeting = (tmp_path / "meeting").as_uri()
    torch.multiprocessing.spawn(_process, (meeting,), nprocs=2)


# ----------------------------------------------------------------------------------- other tools


def adapters(model: nn.Module) -> set[str]:
    names = [name for name, p in model.named_parameters() if "lora_A" in name and p.requires_grad]
    return {name.removeprefix("base_model.model.").partition(".lora_A")[0] for name in names}


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (["head", "chain"], {"head", "chain"}),
        (["first", "second"], {"head.first", "head.second"}),
        ("all-linear", {"attention.out_proj", "head.first", "head.second"}),
    ],
    ids=["by the dense names", "the factors", "all-linear"],
)
def test_peft_adds_lora(target: Any, expected: set[str]) -> None:
    peft = pytest.importorskip("peft")
    result = small()
    before = scores(result)
    tuned = peft.get_peft_model(result, peft.LoraConfig(r=2, target_modules=target))
    assert adapters(tuned) == expected
    assert relative(scores(tuned), before) < 1e-6  # an adapter starts at zero
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    first = loss(tuned).item()
    for _ in range(3):
        optimizer.zero_grad()
        loss(tuned).backward()
        optimizer.step()
    assert loss(tuned).item() < first


def test_peft_merges_into_factors_and_says_why_not_into_a_whole_weight() -> None:
    peft = pytest.importorskip("peft")

    def tuned(target: list[str]) -> Any:
        config = peft.LoraConfig(r=2, target_modules=target, init_lora_weights=False)
        return peft.get_peft_model(small(), config)

    factors = tuned(["first", "second"])
    want = scores(factors)
    assert relative(scores(factors.merge_and_unload()), want) < 1e-5
    with pytest.raises(TypeError, match=r"factorized and cannot be assigned.*tensorize\.densify"):
        tuned(["head"]).merge_and_unload()


@pytest.mark.slow  # `make test-all` installs torchao
def test_torchao_quantizes_the_factors() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    result = small()
    before = scores(result)
    quantization.quantize_(result, quantization.Int8WeightOnlyConfig())
    quantized = {n for n, p in result.named_parameters() if type(p.data) is not Tensor}
    assert quantized == {"head.first.weight", "head.second.weight"}
    assert 0 < relative(scores(result), before) < 0.05


def test_layers_with_an_adapter_are_left_alone() -> None:
    peft = pytest.importorskip("peft")
    tuned = peft.get_peft_model(dense(), peft.LoraConfig(r=2, target_modules=["head", "words"]))
    result = tensorize.compile(tuned, 0.7, example_inputs=(IDS,))
    reasons = {site.name: site.reason for site in tensorize.report(result).sites}
    wrapped = {n: r for n, r in reasons.items() if ".head." in n or ".words." in n}
    assert len(wrapped) == 6
    assert all("adapter" in reason for reason in wrapped.values())
    for name in ("head", "words"):
        layers = [m.get_submodule(f"base_model.model.{name}.base_layer") for m in (tuned, result)]
        assert type(layers[0]) is type(layers[1])
        assert layers[0].weight.equal(layers[1].weight)
    assert parameters(result) <= 0.7 * parameters(tuned)


@pytest.mark.slow  # `make test-all` installs torchao
def test_quantized_layers_are_left_alone() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = dense()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    result = tensorize.compile(model, 0.8, example_inputs=(IDS,))
    reasons = {site.name: site.reason for site in tensorize.report(result).sites}
    assert "already in another form" in reasons["head.weight"]
    assert "already in another form" in reasons["chain.weight"]
    assert type(result.head.weight.data) is type(model.head.weight.data)
    assert relative(scores(result), scores(tensorize.densify(result))) < 1e-5


# ------------------------------------------------------------------------- nothing dense survives


@pytest.mark.parametrize(
    ("inplace", "calibrated"),
    [
        pytest.param(False, False, marks=pytest.mark.slow, id="a copy, by its weights"),
        pytest.param(False, True, id="a copy, calibrated"),
        pytest.param(True, False, id="in place, by its weights"),
        pytest.param(True, True, marks=pytest.mark.slow, id="in place, calibrated"),
    ],
)
def test_no_dense_weight_survives_anywhere(inplace: bool, calibrated: bool) -> None:
    """Not in a buffer, a closure or a cache, whatever was done with the model since."""

    class Odd(nn.Module):  # of sizes that no other tensor has
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(67, 53)
            self.bare = nn.Parameter(torch.randn(59, 53))
            self.chain = nn.Linear(59, 66)
            self.mix = nn.Conv1d(66, 61, 3)
            self.attention = nn.MultiheadAttention(61, 1)
            self.experts = nn.Parameter(torch.randn(3, 61, 73))
            self.normed = nn.Linear(73, 57)
            if inplace:  # torch's own class of such a layer holds the one that it was copied from
                self.normed = nn.utils.parametrizations.weight_norm(self.normed)
            self.head = nn.Linear(57, 71)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.chain(F.linear(self.table(ids), self.bare))
            x = self.mix(x.mT).mT  # as many rows as there are experts
            x = self.attention(x, x, x)[0].transpose(0, 1)
            return self.head(self.normed(torch.bmm(x, self.experts)))

    model, ids = Odd().eval(), torch.randint(0, 67, (3, 5))
    matrices = {tuple(p.shape) for p in model.parameters() if p.dim() > 1 and p.shape[1] > 1}
    dead = [weakref.ref(p) for p in model.parameters() if tuple(p.shape) in matrices]
    sizes, normed = {math.prod(s) for s in matrices}, "normed.weight"
    if inplace:
        normed = "normed.parametrizations.weight.original1"
    result: Any = tensorize.compile(
        model, None, example_inputs=(ids,), inplace=inplace,
        calibration=[ids] * 2 if calibrated else None,
        ranks={"*": 4, normed: 4}, formats={"chain.weight": "tt", "*": "low_rank"},
    )  # fmt: skip
    del model
    formats = {s.shape: s.format for s in tensorize.report(result).sites if s.shape in matrices}
    assert {*formats.values()} == {"low_rank", "tt"}
    assert len(list(factored(result))) == len(matrices)
    loss(result, ids).backward()
    torch._dynamo.reset()
    for backend in ("aot_eager", "tensorize"):
        compiled: Any = torch.compile(result, backend=backend)
        loss(compiled, ids).backward()
        scores(compiled, ids)
    torch.export.export(result, (ids,)).module()(ids)
    tensorize.report(result).to_html("/dev/null")
    str(tensorize.graphs(result, (ids,)).diff())
    tensorize.densify(copy.deepcopy(result))
    gc.collect()
    assert [ref() for ref in dead] == [None] * len(dead)
    with warnings.catch_warnings():  # to look at some objects is deprecated
        warnings.simplefilter("ignore")
        tensors = [o for o in gc.get_objects() if isinstance(o, Tensor)]
    real = [t for t in tensors if type(t) in (Tensor, nn.Parameter) and not t.is_meta]
    assert [tuple(t.shape) for t in real if t.numel() in sizes] == []
