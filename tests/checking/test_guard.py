"""A guarded model: the same outputs, faults found and mended, none told where there are none."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import tensorize
from tensorize.checking.faults import Fault
from tensorize.formats import packs
from tensorize.weight.low_rank import LowRankLinear
from tests.checking.guarded_models import BATCH, FORMS, data, guarded, net, shared
from tests.weight.quantized_models import IDS
from tests.weight.quantized_models import compressed as in_codes

PLACES = ("inputs", "intermediates", "accumulators")
SIGN, EXPONENT = 31, 26


@pytest.fixture(scope="module", params=FORMS)
def form(request: Any) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(form: str) -> nn.Module:
    return guarded(form)


def faults(model: nn.Module) -> tuple[Fault, ...]:
    return tensorize.guard_report(model).faults


@torch.no_grad()
def test_a_guarded_model_is_the_same_object_with_the_same_outputs(form: str) -> None:
    before = net(form)
    want = before(BATCH)
    after = tensorize.guard(before, calibration=data())
    assert after is before
    assert torch.equal(after(BATCH), want)
    assert faults(after) == ()


@torch.no_grad()
@pytest.mark.parametrize("where", PLACES)
def test_flips_in_the_arithmetic_change_no_output(model: nn.Module, where: str) -> None:
    want = model(BATCH)
    for seed in range(6):
        before = len(faults(model))
        bits = [SIGN, EXPONENT]
        how = {"where": where, "bits": bits, "most": 1, "seed": seed}
        with tensorize.inject(model, rate=0.4, **how) as flips:
            got = model(BATCH)
        if flips and flips[0].weight == "mix":  # dense, and multiplied by the model's own code
            continue
        assert torch.allclose(got, want, rtol=0, atol=1e-4 * float(want.std()))
        assert len(faults(model)) - before <= len(flips)
    assert {fault.outcome for fault in faults(model)} == {"recomputed"}


@torch.no_grad()
def test_a_flip_in_a_weights_memory_is_mended_bit_for_bit(model: nn.Module) -> None:
    want, weights = model(BATCH), copy.deepcopy(model.state_dict())
    for seed in range(6):
        how = {"where": "weights", "bits": [SIGN, EXPONENT], "most": 1, "seed": seed}
        with tensorize.inject(model, rate=0.4, **how) as flips:
            got = model(BATCH)
        tensorize.scrub(model)  # a row of a table that nobody looked up
        assert torch.equal(got, want) or flips[0].weight == "mix"
        assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


@torch.no_grad()
def test_no_fault_is_told_on_data_that_the_limits_did_not_see(form: str, model: nn.Module) -> None:
    before = len(faults(model))
    draw = torch.Generator().manual_seed(99)
    for rows in (1, 7, 2000):
        model(torch.randint(0, 50, (rows, 3), generator=draw))
    assert len(faults(model)) == before


@torch.no_grad()
def test_layers_of_one_first_factor_are_checked_each() -> None:
    model = shared()
    x = torch.randn(9, 48)
    want = model(x)
    for where in (*PLACES, "weights"):
        for seed in range(3):
            how = {"where": where, "bits": [SIGN], "most": 1, "seed": seed}
            with tensorize.inject(model, rate=0.2, **how):
                got = model(x)
            assert torch.allclose(got, want, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("form", [("int8", 0, False), ("int4", 7, True)])
def test_weights_of_few_bits_are_checked(form: Any) -> None:
    model = in_codes(form)
    ids = [torch.randint(0, 50, (20, 5)) for _ in range(4)]
    tensorize.guard(model.requires_grad_(False), calibration=ids)
    want = model(IDS)
    holder = model.get_submodule("up.weight_cores" if form[1] == 0 else "up")
    scale = next(holder.parameters())
    scale.data[3] *= -4
    assert torch.equal(model(IDS), want)  # of few bits, what is multiplied is a pack made before
    tensorize.scrub(model)
    assert [mend.by for mend in tensorize.guard_report(model).mends] == ["sums"]
    assert torch.equal(model(IDS), want)


@torch.no_grad()
def test_a_damaged_pack_of_codes_is_made_anew() -> None:
    model = in_codes(("int4", 0, False)).requires_grad_(False)
    tensorize.guard(model, calibration=[torch.randint(0, 50, (20, 5)) for _ in range(4)])
    want = model(IDS)
    holder = model.get_submodule("up.weight_cores")
    held = [*holder.parameters(), *(getattr(holder, i.name) for i in holder.spec.indices)]
    (pack,) = packs.packs_of(held, "columns", list)
    pack.codes[:, 2] += 64
    assert torch.equal(model(IDS), want)
    assert [fault.weight for fault in faults(model)] == ["up.weight"]


def test_raise_changes_nothing_before_the_error() -> None:
    model: Any = guarded("low rank", on_fault="raise")
    with torch.no_grad():
        weight = model.up.first.weight
        weight.data[2, 3] += 1
        damaged = weight.clone()
        with pytest.raises(tensorize.FaultError, match=r"up\.weight: its product is off") as told:
            model(BATCH)
    assert torch.equal(weight, damaged)
    assert told.value.site == "up.weight"
    assert told.value.way_out
    assert [fault.outcome for fault in faults(model)] == ["raised"]


def test_a_function_hears_of_a_fault_before_it_is_mended() -> None:
    heard: list[Fault] = []
    model: Any = guarded("low rank", on_fault=heard.append)
    with torch.no_grad():
        want = model(BATCH)
        model.up.first.weight.data[2, 3] += 1
        assert torch.equal(model(BATCH), want)
    assert [(fault.weight, fault.outcome) for fault in heard] == [("up.weight", "mended")]
    assert heard[0].rows[:1] == (0,)
    assert heard[0].rank == 0


def test_what_pytorch_writes_is_no_fault() -> None:
    model: Any = guarded("pivoted")
    with torch.no_grad():
        model.up.first.weight.mul_(1.5)
        model.down.second.weight.add_(0.1)
        model(BATCH)
    assert faults(model) == ()
    assert tensorize.scrub(model) == []


def test_a_flip_after_a_write_is_mended_to_what_was_written() -> None:
    model: Any = guarded("pivoted")
    with torch.no_grad():
        weight = model.up.first.weight
        weight.mul_(1.5)
        want, right = model(BATCH), weight.clone()
        weight.data[2, 3] += 1
        assert torch.equal(model(BATCH), want)
    assert torch.equal(weight, right)
    assert [fault.outcome for fault in faults(model)] == ["mended"]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_checked_beside_their_rounding(dtype: torch.dtype) -> None:
    with torch.enable_grad():  # gradients are calibrated as well
        trains = net("low rank", trains=True).to(dtype)
        model: Any = tensorize.guard(trains, calibration=data(12, 200))
    model.requires_grad_(False)
    draw = torch.Generator().manual_seed(99)
    model(torch.randint(0, 50, (2000, 3), generator=draw))
    assert faults(model) == ()
    want = model(BATCH)
    sign, large = 15, 13 if dtype is torch.float16 else 12
    for seed in range(6):
        how = {"where": "intermediates", "bits": [sign, large], "most": 1, "seed": seed}
        before = len(faults(model))
        with tensorize.inject(model, rate=0.4, **how) as flips:
            got = model(BATCH)
        moved = abs(flips[0].after - flips[0].before)
        if flips[0].weight != "mix" and moved > 0.5:  # rounding hides what is small
            assert len(faults(model)) > before
            assert torch.equal(got, want)
    weight = model.up.first.weight
    weight.data[2, 3] += 4.0
    assert torch.equal(model(BATCH), want)
    assert faults(model)[-1].outcome == "mended"
    for uses in (site.limits for site in tensorize.guard_report(model).sites):
        assert uses


def test_no_rows_and_inputs_by_name_are_no_trouble() -> None:
    model: Any = guarded("low rank")
    with torch.no_grad():
        assert model(BATCH[:0]).shape == (0, 5, 50)
        model.up(x=torch.zeros(2, 24))
    assert faults(model) == ()


def test_damage_beyond_the_sums_is_an_error_that_names_the_weight() -> None:
    model: Any = guarded("low rank")
    model.up.first.weight.data[1:4, 2:5] += 1.0
    with pytest.raises(tensorize.FaultError, match=r"up\.first\.weight: its memory is damaged"):
        tensorize.scrub(model)
    with torch.no_grad(), pytest.raises(tensorize.FaultError, match="stays wrong"):
        model(BATCH)


def test_a_block_guards_and_leaves_the_model_as_it_was() -> None:
    model = net("pivoted")
    state, buffers = list(model.state_dict()), [name for name, _ in model.named_buffers()]
    with tensorize.guarded(model, calibration=data()) as inside:
        assert inside is model
        inside(BATCH)
    assert [name for name, _ in model.named_buffers()] == buffers
    assert list(model.state_dict()) == state
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(tensorize.TensorizeError, match="is not guarded"):
        tensorize.guard_report(model)


def test_a_failed_calibration_leaves_the_model_as_it_was() -> None:
    model = net("low rank")
    with pytest.raises(tensorize.CaptureError, match="batch 0"):
        tensorize.guard(model, calibration=[torch.zeros(2, 3)])
    assert not any(m._forward_hooks for m in model.modules())
    with pytest.raises(tensorize.TensorizeError, match="on_fault='mend'"):
        tensorize.guard(model, calibration=data(), on_fault="mend")
    with pytest.raises(tensorize.CaptureError, match="is empty"):
        tensorize.guard(model, calibration=[])


def test_copies_and_pickles_are_guarded_by_themselves() -> None:
    model = guarded("pivoted")
    with torch.no_grad():
        want = model(BATCH)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            how = {"where": "intermediates", "bits": [EXPONENT], "most": 1}
            with tensorize.inject(other, rate=1.0, **how):
                assert torch.equal(other(BATCH), want)
            assert len(faults(other)) == 1
    assert faults(model) == ()


def test_a_densified_copy_is_not_guarded_and_the_model_still_is() -> None:
    model = guarded("pivoted")
    dense = tensorize.densify(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in dense.modules())
    with torch.no_grad():
        assert torch.allclose(dense(BATCH), model(BATCH), atol=1e-4)
    assert tensorize.guard_report(model).rows > 0


def test_the_report_says_what_is_checked_and_what_is_not() -> None:
    model = guarded("low rank")
    model.add_module("attention", nn.MultiheadAttention(8, 2))
    report = tensorize.guard_report(model)
    assert {(site.weight, site.use) for site in report.sites} == {
        ("table.weight", "lookup"),
        ("up.weight", "columns"),
        ("down.weight", "columns"),
        ("mix", "columns"),
        ("head.weight", "columns"),
    }
    assert report.rows == 5 * 6 * 100
    missing = dict(report.not_covered)
    assert missing["attention"] == "a MultiheadAttention has no check"
    assert "5 uses of weights" in str(report)


def test_another_dtype_than_calibration_saw_is_said_not_guessed(caplog: Any) -> None:
    model = guarded("low rank").double()
    with torch.no_grad():
        model(BATCH)
    assert "calibration saw nothing of it in float64" in caplog.text
    said = [why for what, why in tensorize.guard_report(model).not_covered if what == "up.weight"]
    assert said == ["calibration saw nothing of it in float64 (1 times)"]


def test_low_rank_layers_keep_their_short_way() -> None:
    model: Any = guarded("low rank")
    assert isinstance(model.up, LowRankLinear)
    assert not model.up.first._forward_hooks
    assert not model.up.second._forward_hooks
