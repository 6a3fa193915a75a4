"""tensorize.compile on every architecture: exact at full rank, within budget, drop-in."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

import tensorize
from benchmarks.subjects import text
from examples.llama import load_pretrained as trained_llama
from tests.marks import slow_but
from tests.models import CASES, MLP, Case, held_bytes, parameters, relative

ALL = pytest.mark.parametrize("name", CASES)


def sources(case: Case) -> dict[str, dict[str, Any]]:
    """The three ways to call: nothing, example inputs, calibration data."""
    return {
        "nothing": {},
        "example_inputs": {"example_inputs": case.batch()},
        "calibration": {"calibration": [case.batch(seed) for seed in range(4)]},
    }


@ALL
@pytest.mark.parametrize("source", ["nothing", "example_inputs", "calibration"])
def test_compiled_model_is_within_its_budget_and_equals_its_dense_form(
    name: str, source: str
) -> None:
    case = CASES[name]
    model = case.model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    small = tensorize.compile(model, budget=0.4, **sources(case)[source])

    assert isinstance(small, type(model))
    assert parameters(small) <= int(0.4 * parameters(model))
    assert parameters(small) >= 0.98 * 0.4 * parameters(model)
    assert relative(case.output(small), case.output(tensorize.densify(small))) < 1e-4
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert tensorize.report(small).totals.after.parameters == parameters(small)


@ALL
def test_full_rank_is_exact(name: str) -> None:
    case = CASES[name]
    model = case.model()
    full = tensorize.compile(model, budget=None, ranks={"*": "full"}, example_inputs=case.batch())
    formats = {site.format for site in tensorize.report(full).sites}
    assert "low_rank" in formats
    assert relative(case.output(full), case.output(model)) < 1e-4


@pytest.mark.parametrize("name", ["mlp", "gpt", "llama", "gpt2", "bert"])
def test_full_rank_tensor_trains_are_exact(name: str) -> None:
    case = CASES[name]
    model = case.model()
    full = tensorize.compile(
        model, budget=None, ranks={"*": "full"}, formats="tt", example_inputs=case.batch()
    )
    assert "tt" in {site.format for site in tensorize.report(full).sites}
    assert relative(case.output(full), case.output(model)) < 1e-4


@pytest.mark.parametrize("name", ["gpt", "gpt2", "t5"])
def test_tied_weights_stay_tied(name: str) -> None:
    case = CASES[name]
    model = case.model()
    small = tensorize.compile(model, budget=0.4, calibration=[case.batch()])
    tied = [site for site in tensorize.report(small).sites if site.aliases or "+" in site.kind]
    assert tied, "the model's tied weight is one site"
    assert parameters(small) <= 0.4 * parameters(model)
    dense = tensorize.densify(small)
    assert parameters(dense) == parameters(model), "densify ties them again"


def test_embedding_and_head_of_one_parameter_share_their_cores() -> None:
    case = CASES["gpt2"]
    model = case.model()
    small = tensorize.compile(model, budget=None, ranks={"transformer.wte.weight": 4})
    embedding = dict(small.named_modules())["transformer.wte"]
    head = dict(small.named_modules())["lm_head"]
    assert head.second.weight is embedding.weight_cores.core_0
    assert head.first.weight is embedding.weight_cores.core_1


@ALL
def test_gradients_reach_every_core(name: str) -> None:
    case = CASES[name]
    small = tensorize.compile(case.model(), budget=0.4, example_inputs=case.batch())
    batch = case.batch()
    output = small(**batch) if isinstance(batch, Mapping) else small(*batch)
    case.read(output).square().sum().backward()
    without = [n for n, p in small.named_parameters() if p.grad is None]
    assert [n for n in without if "pooler" not in n] == []


@pytest.mark.parametrize("name", slow_but(("mlp", "gpt", "gpt2"), CASES))
def test_graphs_show_what_became_of_every_factorized_site(name: str) -> None:
    case = CASES[name]
    small = tensorize.compile(case.model(), budget=0.4, example_inputs=case.batch())
    graphs = tensorize.graphs(small, case.batch())
    diff = graphs.diff()
    shown = {site[0] for site in graphs.after.meta["tensorize_sites"].values()}
    for site in tensorize.report(small).sites:
        if site.format == "low_rank":
            assert shown & {site.name, *site.aliases}, site.name
            assert f"low rank {site.ranks[0]}" in diff


def test_inplace_frees_every_dense_weight_as_its_cores_come() -> None:
    case = CASES["llama"]
    model = case.model()
    alive: list[int] = []
    dense = {n: weakref.ref(p) for n, p in model.named_parameters() if p.dim() == 2}

    def watch(stage: str, done: int, total: int) -> None:
        if stage == "factorize":
            gc.collect()
            alive.append(sum(ref() is not None for ref in dense.values()))

    result = tensorize.compile(model, budget=0.1, inplace=True, progress=watch)
    assert result is model
    report = tensorize.report(result)
    replaced = {site.name for site in report.sites if site.format != "dense"}
    assert replaced
    gc.collect()
    assert [name for name in replaced if dense[name]() is not None] == []
    assert alive == sorted(alive, reverse=True), "weights go one by one, none comes back"
    assert len(set(alive)) > 3


def test_same_seed_gives_the_same_bits() -> None:
    case = CASES["llama"]
    calibration = [case.batch(seed) for seed in range(4)]
    one = tensorize.compile(case.model(), budget=0.3, calibration=calibration)
    two = tensorize.compile(case.model(), budget=0.3, calibration=calibration)
    first, second = one.state_dict(), two.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_calibration_leaves_modes_buffers_and_random_state() -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.BatchNorm1d(64), nn.Dropout(), nn.Linear(64, 32))
    model.train()
    model[2].eval()
    before = copy.deepcopy(model.state_dict())
    calibration = [torch.randn(8, 32) for _ in range(4)]
    state = torch.get_rng_state()
    tensorize.analyze(model, calibration=calibration)
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    assert not model[2].training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_buffer_that_forward_replaces_is_put_back() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(32, 32)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls = self.calls + 1
            return self.linear(x)

    model = Counts()
    calls = model.calls
    tensorize.compile(model, budget=0.5, calibration=[torch.randn(4, 32)])
    assert model.calls is calls
    assert model.calls == 0


def test_hooks_and_references_to_a_rewritten_module_stay() -> None:
    model = MLP().eval()
    calls: list[str] = []
    model.first.register_forward_hook(lambda *_: calls.append("hook"))
    head = model.head
    small = tensorize.compile(model, budget=0.4, inplace=True)
    calls.clear()  # looking for the uses of the weights ran the model, and its hooks
    small(torch.randn(2, 48))
    assert calls == ["hook"]
    assert small.head is head


def test_interrupt_leaves_the_callers_model_whole() -> None:
    case = CASES["llama"]
    model = case.model()
    before = {key: value.clone() for key, value in model.state_dict().items()}

    for stop_at in ("statistics", "spectra", "prediction", "factorize"):

        def interrupt(stage: str, done: int, total: int, stop_at: str = stop_at) -> None:
            if stage == stop_at and done == min(1, total):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            tensorize.compile(
                model,
                budget=0.4,
                calibration=[case.batch(seed) for seed in range(4)],
                progress=interrupt,
            )
        after = model.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)


def test_plain_use_of_the_result_trains() -> None:
    small = tensorize.compile(MLP(), budget=0.5)
    optimizer = torch.optim.AdamW(small.parameters(), lr=1e-2)
    x, target = torch.randn(64, 48), torch.randn(64, 32)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (small(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_half_precision_weights_stay_half_precision() -> None:
    model = MLP().to(torch.bfloat16)
    small = tensorize.compile(model, budget=0.5)
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    totals = tensorize.report(small).totals
    assert totals.after.bytes == held_bytes(small)


@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.bfloat16, 0.3), (torch.bfloat16, 0.02), (torch.float16, 0.02)]
)
def test_a_limit_on_the_error_holds_for_factors_as_they_are_stored(
    dtype: torch.dtype, error: float
) -> None:
    model = trained_llama().to(dtype)
    small = tensorize.compile(
        model,
        tensorize.Budget(error=error),
        calibration=list(text("validation", 4, 64).split(2)),
        include="*layers.0.self_attn.q_proj.weight",
        formats="low_rank",
    )
    sites = tensorize.report(small).sites
    assert any(site.format == "low_rank" for site in sites)
    assert max(site.actual_error for site in sites) <= error
