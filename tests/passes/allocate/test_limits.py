"""What a budget, or a limit on errors or the loss, chooses; figures are what apply gives."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import tensorize
from tensorize.base.errors import BudgetError
from tensorize.codegen.machine import rates
from tensorize.ir.budget import Budget
from tensorize.ir.machine import GENERIC
from tensorize.ir.plan import Plan
from tensorize.ir.sites import Site, Use
from tensorize.ir.spec import DENSE, TTSpec
from tensorize.passes.allocate.flops import spec_flops
from tensorize.passes.predict.predictor import Predictor, Trial
from tensorize.weight.contractions import common_breakpoints, contractions
from tests.models import MLP, held_bytes, parameters
from tests.passes.allocate.programs import M, N, curve, falling, linear, model_of, plan, program

# ----------------------------------------------------------------------- programs with given curves


@pytest.mark.parametrize("budget", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_a_budget_is_used_and_never_exceeded(budget: float) -> None:
    made = model_of()
    found = plan(made, budget)
    limit = math.floor(budget * found.dense.parameters)
    assert 0.98 * limit <= found.predicted.parameters <= limit
    kept = sum(site.parameters_after for site in found.sites) + 500
    assert found.predicted.parameters == kept
    pivoted = [site.shape[1] for site in found.sites if site.spec and site.spec.pivoted]
    assert found.predicted.bytes == 4 * (kept + sum(pivoted))


def test_a_share_counts_everything_that_is_no_matmul() -> None:
    dense = 6 * M * N
    heavy = plan(model_of(other=dense), 0.6)
    assert heavy.dense.parameters == 2 * dense
    assert heavy.predicted.parameters <= 1.2 * dense
    assert sum(site.parameters_after for site in heavy.sites) <= 0.2 * dense


def test_everything_fits_a_budget_of_one() -> None:
    found = plan(model_of(), 1.0)
    assert {site.format for site in found.sites} == {DENSE}
    assert found.predicted.parameters == found.dense.parameters
    assert found.predicted.loss == 0.0


def test_a_weight_that_needs_little_stays_small_even_where_there_is_room() -> None:
    made = program([curve(linear("exact"), [1.0, 0.5, 0.0])])
    (site,) = plan(made, 1.0).sites
    assert (site.ranks, site.predicted_error) == ((2,), 0.0)


def test_equal_weights_share_equally() -> None:
    made = program([falling(linear(f"w{k}")) for k in range(8)])
    ranks = [site.ranks[0] for site in plan(made, 0.4).sites]
    assert max(ranks) - min(ranks) <= 1


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_a_weight_that_no_data_reach_is_worth_what_a_typical_one_is(size: float) -> None:
    """Its distortion is in another unit than the loss, of whatever size."""
    unseen = replace(falling(linear("unseen"), size=size), in_nats=False)
    made = program([*(falling(linear(f"w{k}"), size=0.02) for k in range(4)), unseen])
    ranks = [site.ranks[0] for site in plan(made, 0.4).sites]
    assert max(ranks) - min(ranks) <= 1


def test_a_rank_for_a_weight_that_no_data_reach_leaves_its_room_to_the_others() -> None:
    """Its distortion is in another unit, and hides nothing of what the others lose."""
    others = [falling(linear(f"w{k}"), size=1e-6 * 3**k) for k in range(4)]

    def found(size: float) -> Plan:
        idle = replace(falling(linear("idle"), size=size), in_nats=False)
        made = replace(program([*others, idle]), machine=replace(GENERIC, launch=1e-5))
        return plan(made, 0.5, ranks={"idle": 1})

    huge, tiny = found(1e6), found(1e-12)
    assert huge.predicted.parameters >= 0.99 * 0.5 * huge.dense.parameters
    assert [site.ranks for site in huge.sites] == [site.ranks for site in tiny.sites]


def test_what_matters_more_gets_more() -> None:
    sizes = (0.01, 1.0, 100.0)
    made = program([falling(linear(f"w{k}"), size=s) for k, s in enumerate(sizes)])
    small, middle, large = (site.ranks[0] for site in plan(made, 0.3).sites)
    assert small < middle < large


def test_a_larger_budget_never_predicts_worse() -> None:
    made = model_of()
    before = math.inf
    for thousandths in range(30, 1001, 23):
        found = plan(made, thousandths / 1000).predicted
        assert found.loss is not None
        assert found.loss <= before
        before = found.loss


def test_flops_and_bytes_are_limited_too() -> None:
    made = model_of()
    dense = plan(made, 1.0).dense
    assert dense.flops == 2 * 6 * M * N
    for budget in (Budget(flops=0.5), Budget(bytes=0.5), Budget(flops=dense.flops // 3)):
        found = plan(made, budget)
        for name, limit in budget.limits(dense).items():
            used = getattr(found.predicted, name)
            assert 0.98 * limit <= used <= limit
    several = plan(made, Budget(params=0.5, bytes=0.4, flops=0.45))
    assert several.predicted.parameters <= 0.5 * dense.parameters
    assert several.predicted.bytes <= 0.4 * dense.bytes
    assert several.predicted.flops <= 0.45 * dense.flops
    assert several.predicted.bytes >= 0.95 * 0.4 * dense.bytes


def test_a_lookup_costs_nothing_dense_and_its_second_factor_compressed() -> None:
    lookup, linear_use = Use("embedding", "lookup"), Use("linear", "columns")
    for uses, dense, low in (
        ((lookup,), 0, 2 * 3 * N),
        ((linear_use,), 2 * M * N, 2 * 3 * (M + N)),
        ((lookup, linear_use), 2 * M * N, 2 * 3 * (M + N) + 2 * 3 * N),
    ):
        made = program([falling(linear("w", uses=uses))])
        assert plan(made, 1.0).dense.flops == dense
        assert plan(made, None, ranks={"w": 3}).predicted.flops == low


def test_experts_count_all_their_parameters_and_the_work_of_one() -> None:
    site = Site("experts", (5, M, N), "float32", (Use("grouped_mm", "rows"),))
    found = plan(program([falling(site)]), None, ranks={"experts": 3})
    assert found.predicted.parameters == 5 * 3 * (M + N)
    assert found.predicted.flops == 2 * 3 * (M + N)
    assert found.dense.flops == 2 * M * N
    limited = plan(program([falling(site)]), 0.5).sites[0]
    assert limited.spec == TTSpec.low_rank(M, N, limited.ranks[0], experts=5, pivoted=True)
    assert limited.parameters_after <= 0.5 * site.parameters


def test_flops_of_a_train_are_those_of_the_order_that_runs_at_its_worst_batch() -> None:
    spec, sizes = TTSpec((8, 8), (6, 8), (20,)), (1, 16, 256)
    runs = contractions(spec, breakpoints=common_breakpoints([(spec, torch.float32)]))["columns"]
    cores = [torch.randn(shape) for shape in spec.core_shapes]
    per_row = []
    for batch in sizes:
        with FlopCounterMode(display=False) as counter:
            runs(torch.randn(batch, 48), cores)
        per_row.append(math.ceil(counter.get_total_flops() / batch))
    assert len(set(per_row)) > 1
    site, machine = linear("w", 64, 48), rates.current()
    assert spec_flops(site, spec, sizes, machine) == max(per_row)
    assert spec_flops(site, spec, (256,), machine) == per_row[-1]


# ----------------------------------------------------------------------------- limits on the damage


def test_an_error_limit_holds_for_every_site_with_the_fewest_parameters() -> None:
    made = model_of()
    found = plan(made, Budget(error=0.3))
    for site in found.sites:
        tails = made.spectra[site.name].distortion
        errors = (tails / tails[0]).sqrt()
        assert site.predicted_error <= 0.3
        if site.spec is not None:
            assert float(errors[site.ranks[0] - 1]) > 0.3
        else:
            m, n = made.spectra[site.name].site.matrix
            assert float(errors[(m * n - 1) // (m + n)]) > 0.3


def test_an_error_limit_and_a_size_together() -> None:
    found = plan(model_of(), Budget(error=0.5, params=0.6))
    assert max(site.predicted_error for site in found.sites) <= 0.5
    assert 0.98 * 0.6 <= found.predicted.parameters / found.dense.parameters <= 0.6


@pytest.mark.parametrize("limit", [1e-3, 0.05, 0.5, 2.0])
def test_a_loss_limit_holds_and_is_used(limit: float) -> None:
    trials = (Trial(0.01, 0.02, 0.0, 0.1), Trial(1.0, 3.0, 0.0, 0.5))
    made = replace(model_of(), predictor=Predictor(trials, "nats", held_out=True))
    found = plan(made, Budget(loss=limit))
    assert found.predicted.loss is not None
    assert 0.9 * limit <= found.predicted.loss <= limit
    smaller = Budget(params=int(0.98 * found.predicted.parameters))
    predicted = plan(made, smaller).predicted.loss
    assert predicted is not None
    assert predicted > limit


def test_a_loss_limit_and_a_size_together() -> None:
    made = model_of()
    found = plan(made, Budget(loss=1.0, params=0.7))
    assert found.predicted.loss is not None
    assert found.predicted.loss <= 1.0
    assert found.predicted.parameters <= 0.7 * found.dense.parameters


def test_a_loss_limit_without_data_says_what_is_missing() -> None:
    with pytest.raises(BudgetError, match="needs to know the loss") as caught:
        plan(replace(model_of(), predictor=None), Budget(loss=0.1))
    assert "calibration" in str(caught.value)


# ---------------------------------------------------------------------------------- units of errors


def test_without_data_nothing_is_predicted_but_errors() -> None:
    curves = [replace(falling(linear(f"w{k}")), in_nats=False) for k in range(3)]
    found = plan(program(curves, metric="frobenius", predictor=None), 0.4)
    assert found.predicted.loss is None
    assert found.predicted.loss_interval is None
    assert all(site.predicted_loss == 0.0 for site in found.sites)
    worst = max(site.predicted_error for site in found.sites)
    assert found.predicted.output_error == worst > 0


def test_without_data_the_scale_of_a_weight_matters_half() -> None:
    """Neither absolute errors (the small weight would vanish) nor relative ones (all the same)."""
    curves = [replace(falling(linear(f"w{k}"), size=10.0**k), in_nats=False) for k in range(3)]
    found = plan(program(curves, metric="frobenius", predictor=None), 0.4)
    absolute = plan(program([replace(c, in_nats=True) for c in curves]), 0.4)
    kept, steeper = ([s.parameters_after for s in p.sites] for p in (found, absolute))
    assert kept == sorted(kept)
    assert 0 < kept[-1] - kept[0] < steeper[-1] - steeper[0]


def test_a_weight_that_the_data_say_nothing_about_adds_nothing_to_the_prediction() -> None:
    known, unknown = falling(linear("w")), replace(falling(linear("idle")), in_nats=False)
    found = plan(program([known, unknown]), 0.4)
    chosen = {site.name: site for site in found.sites}
    assert chosen["idle"].predicted_loss == 0.0
    assert chosen["w"].predicted_loss == found.predicted.loss
    assert chosen["idle"].format == DENSE or chosen["idle"].predicted_error > 0


# -------------------------------------------------------------------------------------- real models


def test_on_a_real_model_the_figures_are_what_apply_gives() -> None:
    model = MLP()
    analysis = tensorize.analyze(model, calibration=[torch.randn(32, 48) for _ in range(4)])
    before = math.inf
    for budget in (0.25, 0.5, 0.75, Budget(flops=0.5), Budget(bytes=0.4, flops=0.5)):
        found = analysis.plan(budget)
        small = tensorize.apply(model, found)
        assert parameters(small) == found.predicted.parameters
        assert held_bytes(small) == found.predicted.bytes
        if isinstance(budget, float):
            assert found.predicted.loss is not None
            assert found.predicted.loss < before
            before = found.predicted.loss


def test_ranks_are_multiples_where_the_machine_wants_them() -> None:
    model = MLP()
    analysis = tensorize.analyze(model, calibration=[torch.randn(32, 48) for _ in range(4)])
    free, aligned = analysis.plan(0.5), analysis.plan(0.5, rank_multiple=8)
    assert any(rank % 8 for site in free.sites for rank in site.ranks)
    for site in aligned.sites:
        assert all(rank % 8 == 0 or rank < 8 for rank in site.ranks)
    assert parameters(tensorize.apply(model, aligned)) <= 0.5 * parameters(model)
