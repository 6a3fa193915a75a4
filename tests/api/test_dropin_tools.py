"""Other tools take the result of ``compile``, and nothing dense is left in it."""

from __future__ import annotations

import copy
import gc
import math
import warnings
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tensorize
from tensorize.weight.install import factored
from tests.api.mixed_model import IDS, dense, loss, scores, small
from tests.models import parameters, relative

# -------------------------------------------------------------------------------------- other tools


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
@pytest.mark.parametrize("pivoted", [False, True])
def test_peft_adds_lora(target: Any, expected: set[str], pivoted: bool) -> None:
    peft = pytest.importorskip("peft")
    result = small(pivoted)
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


@pytest.mark.parametrize("pivoted", [False, True])
def test_peft_merges_into_factors_and_says_why_not_into_a_whole_weight(pivoted: bool) -> None:
    peft = pytest.importorskip("peft")

    def tuned(target: list[str]) -> Any:
        config = peft.LoraConfig(r=2, target_modules=target, init_lora_weights=False)
        return peft.get_peft_model(small(pivoted), config)

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


# --------------------------------------------------------------------------- nothing dense survives


@pytest.mark.slow
@pytest.mark.parametrize("inplace", [False, True], ids=["a copy", "in place"])
@pytest.mark.parametrize("calibrated", [False, True], ids=["by its weights", "calibrated"])
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
