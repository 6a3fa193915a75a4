"""bfloat16 parameters that step in float32 and are rounded stochastically."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import tensorize
from tensorize.training.rounding import round_stochastically, stochastically_rounded
from tensorize.weight.install import factored


def test_the_expectation_is_the_value() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.tensor([1.0 + 1 / 512, -3.001, 1e-3, 7.3e8])
    rounds = 4000
    mean = sum(stochastically_rounded(values, generator).double() for _ in range(rounds)) / rounds
    spacing = values.double().abs() * 2**-7
    assert ((mean - values.double()).abs() < 4 * 0.5 * spacing / rounds**0.5).all()


def test_only_the_two_neighbours_come_out() -> None:
    torch.manual_seed(0)
    values = torch.randn(10_000)
    rounded = stochastically_rounded(values).float()
    assert ((rounded - values).abs() <= values.abs() * 2**-7).all()
    exact = torch.randn(1000).to(torch.bfloat16)
    assert torch.equal(stochastically_rounded(exact.float()), exact)
    odd = torch.tensor([torch.inf, -torch.inf, torch.nan])
    assert torch.equal(stochastically_rounded(odd)[:2].float(), odd[:2])
    assert bool(stochastically_rounded(odd)[2].isnan())


def test_small_steps_are_kept_that_rounding_to_nearest_loses() -> None:
    def walk(stochastic: bool) -> float:
        parameter = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
        optimizer = torch.optim.SGD([parameter], lr=1e-4)
        if stochastic:
            round_stochastically(optimizer)
        for _ in range(100):
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        return float(parameter.detach().float().mean())

    assert walk(stochastic=False) == 1.0  # each step is below half the spacing
    assert walk(stochastic=True) == pytest.approx(0.99, abs=1e-3)


def test_states_are_float32_and_parameters_stay_what_they_were() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8).bfloat16(), nn.Linear(8, 8).bfloat16())
    ids = [id(p) for p in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    handle = round_stochastically(optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 8, dtype=torch.bfloat16)).float().square().mean().backward()
        optimizer.step()
    assert [id(p) for p in model.parameters()] == ids
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in model.parameters())
    states = [v for s in optimizer.state.values() for k, v in s.items() if k != "step"]
    assert {v.dtype for v in states} == {torch.float32}
    handle.remove()


@pytest.mark.parametrize("pivoted", [False, True])
def test_factors_in_bfloat16_learn_as_those_in_float32(pivoted: bool) -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(48, 64), nn.Tanh(), nn.Linear(64, 8))
    small = tensorize.initialize(dense, 0.6, pivoted=pivoted)
    x = torch.randn(256, 48)
    target = x[:, :8].roll(1, 0) + x[:, 8:16]
    reached = []
    for dtype in (torch.float32, torch.bfloat16):
        model = copy.deepcopy(small).to(dtype)
        optimizer = torch.optim.AdamW(tensorize.training.parameter_groups(model, 3e-3))
        if dtype == torch.bfloat16:
            round_stochastically(optimizer)
        losses = []
        for _ in range(60):
            optimizer.zero_grad()
            loss = (model(x.to(dtype)).float() - target).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.9 * losses[0]
        reached.append(losses[-1])
    assert reached[1] == pytest.approx(reached[0], rel=0.05)
    assert any(weight.spec.pivoted for _, weight in factored(small)) == pivoted


def test_a_stopped_run_rounds_the_same_way() -> None:
    def made() -> tuple[nn.Parameter, torch.optim.Optimizer]:
        parameter = nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
        return parameter, torch.optim.SGD([parameter], lr=1e-3)

    def steps(parameter: nn.Parameter, optimizer: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()

    parameter, optimizer = made()
    handle = round_stochastically(optimizer)
    steps(parameter, optimizer, 5)
    kept = copy.deepcopy((parameter.detach(), handle.state_dict()))
    steps(parameter, optimizer, 5)
    again, other = made()
    resumed = round_stochastically(other)
    again.data = kept[0]
    resumed.load_state_dict(kept[1])
    steps(again, other, 5)
    assert torch.equal(again, parameter)


def test_states_stay_wide_when_they_are_loaded() -> None:
    def made() -> tuple[nn.Parameter, torch.optim.Optimizer]:
        parameter = nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
        optimizer = torch.optim.AdamW([parameter], lr=1e-3, fused=True)
        round_stochastically(optimizer)
        return parameter, optimizer

    parameter, optimizer = made()
    parameter.grad = torch.randn(64).bfloat16()
    optimizer.step()
    kept = copy.deepcopy(optimizer.state_dict())
    again, other = made()
    other.load_state_dict(kept)
    assert again.dtype == torch.bfloat16
    loaded, wanted = other.state[again]["exp_avg"], optimizer.state[parameter]["exp_avg"]
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded, wanted)
    again.grad = torch.randn(64).bfloat16()
    other.step()


@pytest.mark.parametrize("scheduled", [None, "before", "after"])
def test_what_a_step_or_a_loading_raises_leaves_parameters_as_they_were(
    scheduled: str | None,
) -> None:
    parameter = nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([parameter], lr=1e-3)
    schedule = torch.optim.lr_scheduler.ConstantLR
    before = schedule(optimizer) if scheduled == "before" else None
    handle = round_stochastically(optimizer)
    after = schedule(optimizer) if scheduled == "after" else None
    gradient = parameter.grad = torch.ones_like(parameter)
    other = torch.optim.SGD([parameter, nn.Parameter(torch.ones(2))], lr=1e-3)
    with pytest.raises(ValueError, match="size of optimizer's group"):
        optimizer.load_state_dict(other.state_dict())
    assert parameter.dtype == torch.bfloat16
    assert parameter.grad is gradient

    def fails(*_: object, **__: object) -> None:
        raise MemoryError

    failing = optimizer.register_step_pre_hook(fails)  # once parameters are wide
    with pytest.raises(MemoryError):
        optimizer.step()
    failing.remove()
    assert parameter.dtype == torch.bfloat16
    assert parameter.grad is gradient
    optimizer.step()
    for each in (before, after):
        if each is not None:
            each.step()
    handle.remove()
    optimizer.step()
    assert parameter.dtype == torch.bfloat16


def test_nothing_to_round_is_an_error() -> None:
    with pytest.raises(tensorize.TensorizeError, match="holds no bfloat16"):
        round_stochastically(torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1))


def test_a_closure_is_refused() -> None:
    """Its forward pass would see parameters in float32."""
    weight = torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    rounding = round_stochastically(optimizer)
    with pytest.raises(tensorize.TensorizeError, match="a closure would see"):
        optimizer.step(lambda: (weight.sum() * 1.0).backward())
    assert weight.dtype == torch.bfloat16
    rounding.remove()
