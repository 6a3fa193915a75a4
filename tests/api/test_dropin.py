"""The result of ``compile`` is used like any other module, and under ``torch.func``."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import pickle
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import tensorize
from tensorize.formats.format import Chain
from tests.api.mixed_model import (
    FORMS,
    IDS,
    Mixed,
    close,
    dense,
    gradients,
    ignore,
    loss,
    scores,
    small,
)
from tests.models import relative


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


# ----------------------------------------------------------------------------------------- a module


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
    orders = re.compile(r"\.(order|kept_\d)$")  # which columns factors do not store
    own = {name for name, _ in result.named_buffers() if not orders.search(name)}
    assert own == dict(model.named_buffers()).keys()
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
    monkeypatch.setattr(Chain, "reconstruct", None)  # no dense weight is built
    assert relative(result(IDS).detach(), want.detach()) < 1e-6
    assert relative(gradients(result)["chain.bias"], of_bias) < 1e-5


def test_state_dict_comes_back() -> None:
    result, other = small(), small()
    state = {key: value.clone() for key, value in result.state_dict().items()}
    tensors = {**dict(result.named_parameters()), **dict(result.named_buffers())}
    assert state.keys() == tensors.keys()
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


# --------------------------------------------------------------------------------------- torch.func


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
