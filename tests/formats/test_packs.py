"""Weights of few bits run as packs of eight, which are no part of the model."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import tensorize
from tensorize.formats import packs
from tensorize.formats.integers import Pack
from tensorize.formats.quantized import Coded, inputs_in_full
from tensorize.ir.coded import DenseSpec, QuantizedSpec
from tensorize.ir.precision import FLOAT, INPUTS, ONE_DIGIT, TWO_DIGITS
from tensorize.ir.spec import Spec
from tensorize.weight.install import factored
from tests.models import relative
from tests.weight.quantized_models import IDS, Form, compressed, put, small_net

FEW = [("int4", 0, False), ("int3", 0, False), ("int2", 0, False), ("int4", 7, True)]
EACH = pytest.mark.parametrize("form", FEW, ids=str)


def held(model: Any) -> list[tuple[Tensor, ...]]:
    """What is held of every weight that multiplies."""
    found = {name: w for name, w in factored(model) if name != "table.weight"}
    return [(*weight.cores, *weight.indices) for weight in found.values()]


def packed(model: Any) -> int:
    return sum(packs.packed_bytes(each) for each in held(model))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Pack]:
    """The packs that are made, one after another."""
    found: list[Pack] = []
    of = Coded.pack

    def seen(core: Coded, *, columns: bool) -> Pack:
        found.append(of(core, columns=columns))
        return found[-1]

    monkeypatch.setattr(Coded, "pack", seen)
    return found


@EACH
def test_they_are_made_once_and_only_where_a_product_needs_them(
    form: Form, made: list[Pack]
) -> None:
    small = small_net(form)
    state = {name: value.clone() for name, value in small.state_dict().items()}
    small(IDS)  # with gradients: by the numbers
    with inputs_in_full(), torch.no_grad():
        small(IDS)
    assert packed(small) == 0
    with torch.no_grad():
        small(IDS)
        count = len(made)
        assert count == 3 * (1 + bool(form[1]))
        small(IDS[:1])
    assert len(made) == count
    after = small.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[name], value) for name, value in state.items())


@EACH
def test_a_report_says_what_they_take(form: Form) -> None:
    small = compressed(form)
    said = tensorize.report(small).totals.packed
    weights = {name: weight for name, weight in factored(small) if name != "head.weight"}
    assert said == sum(weight.spec.packed_bytes({"columns"}) for weight in weights.values())
    with torch.no_grad():
        small(IDS)
    assert packed(small) == said
    text = str(tensorize.report(small))
    assert "bytes with packs" in text
    assert "bytes with packs" not in str(tensorize.report(compressed(("int8", 0, False))))


@pytest.mark.parametrize("form", [*FEW, ("int8", 0, False), ("int8", 7, True)], ids=str)
def test_rows_of_a_weight_meet_packs_of_their_own(form: Form) -> None:
    model = nn.Sequential(Conv1D(40, 24)).eval()
    put(model, "0.weight", form)
    ((_, weight),) = factored(model)
    x = torch.randn(5, 24)
    with torch.no_grad():
        wanted = tensorize.densify(copy.deepcopy(model))(x)
        assert relative(model(x), wanted) < 0.02
        assert torch.equal(torch.compile(model, backend="aot_eager", fullgraph=True)(x), model(x))
        both = (*weight.cores, *weight.indices)
        size = packs.packed_bytes(both)
        assert size == weight.spec.packed_bytes({"rows"}) > 0
        F.linear(torch.randn(5, 40), model[0].weight)  # the other side
        assert packs.packed_bytes(both) == weight.spec.packed_bytes({"rows", "columns"})
    torch._dynamo.reset()


def test_they_follow_what_they_were_made_of(made: list[Pack]) -> None:
    small = small_net(("int4", 0, False))
    with torch.no_grad():
        small(IDS)
        small.up.weight.cores[0].mul_(2)
        wanted = tensorize.densify(copy.deepcopy(small))(IDS)
        assert relative(small(IDS), wanted) < 0.02
        assert len(made) == 4
        small.up.weight_cores.codes_0.zero_()
        wanted = tensorize.densify(copy.deepcopy(small))(IDS)
        assert relative(small(IDS), wanted) < 0.02
        assert len(made) == 5
        small.load_state_dict(small_net(("int4", 0, False)).state_dict())
        assert relative(small(IDS), tensorize.densify(copy.deepcopy(small))(IDS)) < 0.02


def test_they_go_with_the_model() -> None:
    gc.collect()
    before = len(packs._kept)
    small = small_net(("int4", 0, False))
    with torch.inference_mode():
        small(IDS)
        assert len(packs._kept) == before + 3
    del small
    gc.collect()
    assert len(packs._kept) == before


@EACH
def test_compiled_graphs_have_them_in_common(form: Form, made: list[Pack]) -> None:
    small = small_net(form)
    with torch.no_grad():
        wanted, count = small(IDS), len(made)
        graph = torch.compile(small, backend="aot_eager", fullgraph=True)
        assert relative(graph(IDS), wanted) < 1e-6
        assert len(made) == count
        small.up.weight.cores[0].mul_(2)
        assert relative(graph(IDS), small(IDS)) < 1e-6
    torch._dynamo.reset()


def test_transforms_of_functions_see_the_numbers() -> None:
    small = small_net(("int4", 0, False))
    with torch.no_grad(), inputs_in_full():
        wanted = small(IDS)
    with torch.no_grad():
        assert relative(torch.vmap(small)(IDS), wanted) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_digits_are_nearer_than_one(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    pack = Pack.of(torch.randn(40, 24))
    x, matrix = torch.randn(16, 24).to(dtype), (pack.codes * pack.scale).mT
    wanted = x.float() @ matrix.T
    eps = torch.finfo(dtype).eps
    one, two = (relative(pack.linear(x, k).float(), wanted) for k in (ONE_DIGIT, TWO_DIGITS))
    assert two < max(1e-4, eps)
    assert max(1e-3, two) < one < 0.02
    assert pack.linear(x[:0], TWO_DIGITS).shape == (0, 40)
    assert not pack.linear(torch.zeros_like(x), TWO_DIGITS).any()


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_spec_says_what_inputs_are_rounded_to(precision: str) -> None:
    for inputs in INPUTS:
        spec = QuantizedSpec(DenseSpec((40, 24)), precision, inputs)
        assert Spec.from_dict(spec.to_dict()) == packs.from_text(spec.text) == spec
        assert repr(spec) in repr([spec])
        packed = inputs != FLOAT
        assert (spec.packed_bytes({"columns"}) > 0) == (packed and precision == "int4")
        assert (spec.packed_bytes({"rows"}) > 0) == packed
        assert spec.packed_bytes({"lookup"}) == 0
    with pytest.raises(ValueError, match="int7"):
        QuantizedSpec(DenseSpec((40, 24)), precision, "int7")
