"""The methods that ours are compared with at equal bytes do what their papers say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from benchmarks import bit_peers
from benchmarks.bit_peers import Setting
from benchmarks.bits import best


def weight_and_moment() -> tuple[Tensor, Tensor]:
    """A weight (24, 160), and the second moment of inputs that have much in common."""
    random = torch.Generator().manual_seed(0)
    inputs = torch.randn(400, 40, generator=random) @ torch.randn(40, 160, generator=random)
    inputs += 0.3 * torch.randn(400, 160, generator=random)
    return torch.randn(24, 160, generator=random), (inputs.mT @ inputs).double()


def lost(change: Tensor, moment: Tensor) -> float:
    return float(((change.double() @ moment) * change.double()).sum())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rounding_to_nearest_is_off_by_half_a_step_at_most(bits: int) -> None:
    weight, _ = weight_and_moment()
    found = bit_peers.to_nearest(weight, Setting(bits))
    for group, rounded in zip(weight.split(64, 1), found.split(64, 1), strict=True):
        step = bit_peers.steps(group, bits)[0]
        # Scales have 8 bits of precision: the ends of a range may be beyond the codes by as much.
        assert bool(((rounded - group).abs() <= step * (0.5 + 2 ** (bits - 8))).all())
        assert all(len(row.unique()) <= 2**bits for row in rounded)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_feedback_loses_less_on_the_inputs_that_it_knows(bits: int) -> None:
    weight, moment = weight_and_moment()
    fed = lost(bit_peers.with_feedback(weight, moment, Setting(bits)) - weight, moment)
    assert fed < 0.7 * lost(bit_peers.to_nearest(weight, Setting(bits)) - weight, moment)


def test_feedback_on_inputs_with_nothing_in_common_is_rounding_to_nearest() -> None:
    weight, moment = weight_and_moment()
    alone = bit_peers.with_feedback(weight, moment.diagonal().diag(), Setting(3))
    assert torch.equal(alone, bit_peers.to_nearest(weight, Setting(3)))


def test_a_correction_takes_away_what_its_rank_can() -> None:
    weight, moment = weight_and_moment()
    off = weight - bit_peers.to_nearest(weight, Setting(2))
    left = [lost(off - bit_peers.correction(off, moment, rank), moment) for rank in (4, 12, 24)]
    singular = torch.linalg.svdvals(off.double() @ torch.linalg.cholesky(moment))
    wanted = [float(singular[rank:].square().sum()) for rank in (4, 12)]
    assert left[:2] == pytest.approx(wanted, rel=1e-2)
    assert left[2] < 1e-4 * lost(off, moment)  # factors in bfloat16


def test_bytes_are_those_of_codes_scales_zero_points_and_all_that_stays() -> None:
    model = nn.Sequential(nn.Embedding(10, 96), nn.Linear(96, 5))
    layer = 5 * (96 * 3 // 8 + 2 * 2 + 1)  # codes, two scales, two zero points of three bits
    rest = 2 * (10 * 96 + 5)
    assert bit_peers.size(model, {"1": Setting(3)}) == layer + rest
    assert bit_peers.size(model, {"1": Setting(3, rank=4)}) == layer + rest + 2 * 4 * (96 + 5)


def test_every_configuration_leaves_the_model_as_it_was() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 64), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 7))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batches = [torch.arange(10)[None]]
    names, sizes = [], []
    for name, rounded in bit_peers.configurations("GPTQ", model, batches):
        assert rounded.model(batches[0]).isfinite().all()
        names.append(name)
        sizes.append(rounded.bytes)
    assert len(names) == len(set(names)) == 4 * 7
    assert min(sizes) < 0.3 * max(sizes)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_another_method_has_its_best_configuration_that_fits_and_ours_the_budgets_own() -> None:
    found = {"a": {"share": 0.2, "kl": 2.0}, "b": {"share": 0.1, "kl": 1.0}}
    assert best(found, 0.25, "kl") == "b"
    assert best(found, 0.08, "kl") is None
    ours = {"0.25": {"share": 0.2, "kl": 2.0}, "0.18": {"share": 0.1, "kl": 1.0}}
    assert best(ours, 0.25, "kl") == "0.25"
    assert best(ours, 0.5, "kl") is None
