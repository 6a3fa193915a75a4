"""Ranks that change while a model trains: spectra of cores, cuts, growth, states, resuming."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tensorize
from examples.gpt import GPT, GPTConfig
from tensorize import TTSpec
from tensorize.algebra.reconstruct import reconstruct
from tensorize.algebra.svd import tail_sums
from tensorize.training.adapt import RankSchedule
from tensorize.training.bonds import bonds, extended, with_ranks
from tensorize.training.groups import parameter_groups
from tensorize.weight.install import factored
from tests.algebra.unfoldings import unfolding_spectra
from tests.models import held_bytes

CHAINS = (
    TTSpec.low_rank(30, 24, 8),
    TTSpec((5, 6), (4, 6), (9,)),
    TTSpec((3, 2, 5), (2, 4, 3), (5, 6)),
    TTSpec((2, 3, 2, 2), (2, 2, 3, 2), (3, 6, 4)),
)
BLOCKED = (TTSpec.block((5, 6), (4, 6), 4), TTSpec.low_rank(12, 10, 6, experts=3))


FORMS: tuple[Any, ...] = (
    {}, {"pivoted": True}, {"formats": "block"}, {"formats": "tt"},
    {"formats": "block", "pivoted": True},
    pytest.param({"formats": "tt", "pivoted": True}, marks=pytest.mark.slow),
)  # fmt: skip


def cores_of(spec: TTSpec, seed: int = 0) -> list[Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(shape, dtype=torch.float64) for shape in spec.core_shapes]


def whole(spec: TTSpec, cores: list[Tensor]) -> Tensor:
    return torch.matmul(*cores) if spec.batch else reconstruct(spec, cores)


# ----------------------------------------------------------------------------------- spectra


@pytest.mark.parametrize("spec", CHAINS, ids=str)
def test_spectra_are_those_of_the_unfoldings(spec: TTSpec) -> None:
    cores = cores_of(spec)
    wanted = unfolding_spectra(whole(spec, cores), spec.row_modes, spec.column_modes)
    for bond, values in zip(bonds(spec, cores), wanted, strict=True):
        found = bond.squares.clamp_min(0).sqrt()
        torch.testing.assert_close(found, values[: len(found)], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("spec", BLOCKED, ids=str)
def test_spectra_of_blocks_and_experts_are_summed(spec: TTSpec) -> None:
    cores = cores_of(spec)
    (bond,) = bonds(spec, cores)
    matrix = whole(spec, cores)
    if spec.batch:
        parts = list(matrix)
    else:
        (m0, m1), (n0, n1) = spec.row_modes, spec.column_modes
        blocks = matrix.reshape(m0, m1, n0, n1)
        parts = [blocks[:, i, j] for i in range(m1) for j in range(n0)]
    rank = spec.ranks[0]
    wanted = sum(torch.linalg.svdvals(part)[:rank].square() for part in parts)
    torch.testing.assert_close(bond.squares, wanted, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("spec", [*CHAINS, *BLOCKED], ids=str)
def test_a_cut_loses_what_the_spectra_say(spec: TTSpec) -> None:
    cores = cores_of(spec)
    found = bonds(spec, cores)
    ranks = tuple(max(1, r - 2) for r in spec.ranks)
    less = with_ranks(spec, cores, found, ranks)
    cut = spec.with_ranks(ranks)
    assert [tuple(c.shape) for c in less] == list(cut.core_shapes)
    assert all(core.is_contiguous() for core in less)
    lost = float((whole(cut, less) - whole(spec, cores)).square().sum())
    single = [float(tail_sums(b.squares)[r]) for b, r in zip(found, ranks, strict=True)]
    assert lost <= sum(single) * (1 + 1e-9)  # Oseledets 2011, theorem 2.2
    assert lost >= max(single) * (1 - 1e-9)


@pytest.mark.parametrize("spec", [*CHAINS, *BLOCKED], ids=str)
def test_a_cut_of_nothing_and_a_growth_change_nothing(spec: TTSpec) -> None:
    cores = cores_of(spec)
    found = bonds(spec, cores)
    ranks = tuple(r + 2 for r in spec.ranks)
    more = with_ranks(spec, cores, found, ranks)
    torch.testing.assert_close(whole(spec.with_ranks(ranks), more), whole(spec, cores))


@pytest.mark.parametrize("spec", [CHAINS[0], CHAINS[2], BLOCKED[0]], ids=str)
def test_gradients_go_along(spec: TTSpec) -> None:
    """The gradients of cut cores are those that autograd gives at the cut cores."""
    cores = [core.requires_grad_() for core in cores_of(spec)]
    found = bonds(spec, cores)
    # Nothing is lost at ranks whose further components are zero, so that the point is the same.
    ranks = tuple(max(1, r - 1) for r in spec.ranks)
    cut = spec.with_ranks(ranks)
    less = [c.detach() for c in with_ranks(spec, cores, found, ranks)]
    exact = [c.requires_grad_() for c in less]
    grown = with_ranks(cut, [c.detach() for c in exact], bonds(cut, exact), spec.ranks)
    padded = [c.requires_grad_() for c in grown]
    target = torch.randn(spec.shape, dtype=torch.float64)

    def loss(form: TTSpec, own: list[Tensor]) -> Tensor:
        return (whole(form, own) - target).square().sum()

    big = torch.autograd.grad(loss(spec, padded), padded)
    # One deficient direction each: T and S of the others are exact.
    moved = with_ranks(spec, big, bonds(spec, padded), ranks, gradients=True)
    at = [c.detach().requires_grad_() for c in with_ranks(spec, padded, bonds(spec, padded), ranks)]
    wanted = torch.autograd.grad(loss(cut, at), at)
    for a, b in zip(moved, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_spectrum_goes_on_as_a_power_law() -> None:
    law = torch.arange(1, 21, dtype=torch.float64) ** -1.5
    torch.testing.assert_close(extended(law[:16], 20), law, rtol=1e-6, atol=0)
    torch.testing.assert_close(extended(law, 4), law[:4])


# ---------------------------------------------------------------------------------- schedules


def model_and_optimizer(budget: float = 0.5, **form: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    dense = GPT(GPTConfig(layers=2, width=64, heads=4, vocabulary=128, context=32))
    small = tensorize.initialize(dense, budget, exclude="*embedding*", **form)
    return small, torch.optim.AdamW(parameter_groups(small, 3e-3, 0.1))


def batches(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(128, (64, 32), generator=generator).cumsum(1) % 128
    return [rows[torch.randint(64, (8,), generator=generator)] for _ in range(count)]


def train(
    model: nn.Module, optimizer: Any, data: list[Tensor], schedule: Any = None
) -> list[float]:
    losses = []
    for ids in data:
        logits = model(ids[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
        losses.append(loss.item())
    return losses


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_ranks_fall_to_the_budget_and_training_goes_on(form: dict[str, Any]) -> None:
    model, optimizer = model_and_optimizer(**form)
    schedule = RankSchedule(model, optimizer, 0.3, start=10, end=50, every=10, rank_multiple=4)
    losses = train(model, optimizer, batches(70), schedule)
    dense = tensorize.report(model).totals.before.parameters
    assert 0.25 * dense < count(model) <= 0.3 * dense
    sizes = [change.after for change in schedule.trace]
    assert sizes == sorted(sizes, reverse=True)
    grouped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert grouped == {id(p) for p in model.parameters()}
    assert sum(losses[-10:]) < sum(losses[:10])
    report = tensorize.report(model)
    specs = {name: w.spec for name, w in factored(model)}
    assert form.get("pivoted", False) in {spec.pivoted for spec in specs.values()}
    assert all(s.ranks == specs[s.name].ranks for s in report.factorized)
    assert report.totals.after.parameters == count(model)
    assert any(note.startswith("ranks followed a budget") for note in report.notes)
    for parameter in model.parameters():
        for value in optimizer.state[parameter].values():
            assert value.dim() == 0 or value.shape == parameter.shape


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_ranks_grow_without_a_change_of_the_outputs(form: dict[str, Any]) -> None:
    torch.manual_seed(0)
    small = tensorize.initialize(nn.Sequential(nn.Linear(64, 64)), 0.3, **form)
    optimizer = torch.optim.AdamW(small.parameters())
    x = torch.randn(4, 64)
    small(x).sum().backward()
    optimizer.step()
    before, size = small(x), count(small)
    schedule = RankSchedule(small, optimizer, 0.6, start=0, end=1, every=1, rank_multiple=1)
    change = schedule.step()
    assert change is not None
    assert (change.shrunk, change.grown) == (0, 1)
    assert count(small) > size
    torch.testing.assert_close(small(x), before, rtol=1e-4, atol=1e-5)
    small(x).square().sum().backward()
    optimizer.step()
    assert not torch.allclose(small(x), before)


@pytest.mark.parametrize("pivoted", [False, True])
def test_weights_give_ranks_to_those_that_need_them(pivoted: bool) -> None:
    """One weight's spectrum ends at once, the other's does not: at the same budget both move."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    small: Any = tensorize.initialize(model, None, ranks={"*": 16})
    with torch.no_grad():
        small[0].second.weight[:, 4:] *= 1e-3
    if pivoted:
        tensorize.weight.pivoted(small)
    optimizer = torch.optim.SGD(small.parameters(), lr=0.0)
    budget = tensorize.Budget(params=count(small))
    schedule = RankSchedule(small, optimizer, budget, start=0, end=1, every=1, rank_multiple=1)
    schedule.step()
    lower, higher = (layer.first.out_features for layer in small)
    assert lower < 16 < higher
    assert count(small) <= schedule.target
    kept = [rank * (128 - pivoted * rank) for rank in (lower, higher)]
    assert count(small) == sum(kept)


@pytest.mark.parametrize("pivoted", [False, True])
def test_a_stopped_run_goes_on_to_the_same_bits(pivoted: bool) -> None:
    data = batches(40)

    def made() -> tuple[nn.Module, Any, RankSchedule]:
        model, optimizer = model_and_optimizer(pivoted=pivoted)
        options = {"start": 5, "end": 30, "every": 5, "rank_multiple": 4}
        return model, optimizer, RankSchedule(model, optimizer, 0.35, **options)

    model, optimizer, schedule = made()
    train(model, optimizer, data[:17], schedule)
    state = copy.deepcopy((schedule.state_dict(), model.state_dict(), optimizer.state_dict()))
    rest = train(model, optimizer, data[17:], schedule)
    again, other, resumed = made()
    for target, kept in zip((resumed, again, other), state, strict=True):
        target.load_state_dict(kept)
    assert train(again, other, data[17:], resumed) == rest
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert resumed.trace == schedule.trace


def test_a_compressed_model_with_a_common_factor_keeps_those_ranks() -> None:
    torch.manual_seed(0)

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.o = (nn.Linear(32, 32, bias=False) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.o(self.q(x) * self.k(x))

    small: Any = tensorize.initialize(Pair(), None, ranks={"*": 8})
    small.k.first.weight = small.q.first.weight
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    schedule = RankSchedule(small, optimizer, 0.35, start=0, end=1, every=1, rank_multiple=1)
    schedule.step()
    assert small.q.first.out_features == small.k.first.out_features == 8
    assert small.o.first.out_features < 8


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"start": 5, "end": 1}, "start=5, end=1"),
        ({"start": 0, "end": 1, "every": 0}, "every=0"),
        ({"start": 0, "end": 1, "budget": 0.0001}, "fewer than at rank one"),
        ({"start": 0, "end": 1, "budget": tensorize.Budget(bytes=0.5)}, "budget of parameters"),
    ],
)
def test_bad_schedules_are_named(options: dict[str, Any], cause: str) -> None:
    model, optimizer = model_and_optimizer()
    with pytest.raises(tensorize.TensorizeError, match=cause):
        RankSchedule(model, optimizer, **{"budget": 0.3, **options})


def test_a_dense_model_has_no_ranks_to_change() -> None:
    with pytest.raises(tensorize.TensorizeError, match="not made by tensorize"):
        RankSchedule(nn.Linear(2, 2), torch.optim.SGD([nn.Parameter()]), 0.5, start=0, end=1)


# --------------------------------------------------------- wherever the weight is used


class Tied(nn.Module):
    """A table of words that is the head as well."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.layer = nn.Embedding(64, 48), nn.Linear(48, 48)
        self.head = nn.Linear(48, 64, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.layer(self.words(ids)).tanh())


@pytest.mark.parametrize("form", [{}, {"pivoted": True}, {"formats": "tt"}], ids=str)
def test_a_tied_weight_stays_tied(form: dict[str, Any]) -> None:
    model = tensorize.initialize(Tied(), 0.7, **form)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = RankSchedule(model, optimizer, 0.35, start=0, end=2, every=1, rank_multiple=1)
    ids = torch.randint(64, (8, 5))
    for _ in range(2):
        F.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
        optimizer.step()
        schedule.step()
    held = dict(factored(model))
    assert [id(c) for c in held["words.weight"].cores] == [id(c) for c in held["head.weight"].cores]
    assert held["head.weight"].spec.pivoted == form.get("pivoted", False)
    torch.testing.assert_close(held["words.weight"].dense(), held["head.weight"].dense())
    assert count(model) <= schedule.target
    learnt = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert learnt == {id(p) for p in model.parameters()}


def test_with_a_function_between_the_factors_the_largest_components_stay() -> None:
    """They cannot be mixed there: a component that is nearly nothing is what a cut takes away."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 64))
    model = tensorize.initialize(dense, 0.5, nonlinearity="silu")
    optimizer = torch.optim.AdamW(model.parameters())
    for module in model:
        with torch.no_grad():
            module.second.weight[:, 3] *= 1e-6
    x = torch.randn(32, 64)
    before, ranks = model(x).detach(), [m.spec.ranks[0] for m in model]
    less = count(model) - sum(m.in_features + m.out_features for m in model)
    schedule = RankSchedule(
        model, optimizer, tensorize.Budget(params=less), start=0, end=1, every=1, rank_multiple=1
    )
    schedule.step()
    assert [m.spec.ranks[0] for m in model] == [rank - 1 for rank in ranks]
    assert (model(x) - before).norm() < 1e-4 * before.norm()


def test_kernels_of_the_ranks_before_are_not_used() -> None:
    model, optimizer = model_and_optimizer()
    layers: list[Any] = [m for m in model.modules() if hasattr(m, "first")]
    for layer in layers:
        layer.kernels = {"columns": None}
    schedule = RankSchedule(model, optimizer, 0.3, start=0, end=1, every=1)
    schedule.step()
    resized = [m for m in model.modules() if hasattr(m, "first")]
    assert resized
    assert any(m.kernels is None for m in resized)
    assert torch.isfinite(model(batches(1)[0]).logits).all()


@pytest.mark.parametrize("pivoted", [False, True])
def test_a_model_of_transformers_is_saved_with_its_new_ranks(tmp_path: Path, pivoted: bool) -> None:
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = hf.GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=16, vocab_size=64)
    model = tensorize.initialize(hf.GPT2LMHeadModel(config), 0.7, pivoted=pivoted)
    optimizer = torch.optim.AdamW(model.parameters())
    RankSchedule(model, optimizer, 0.4, start=0, end=1, every=1, rank_multiple=1).step()
    model.save_pretrained(tmp_path)
    again = hf.GPT2LMHeadModel.from_pretrained(tmp_path)
    ids = torch.arange(8)[None]
    assert torch.equal(again.eval()(ids).logits, model.eval()(ids).logits)
    report = tensorize.report(model)
    assert any(name.endswith(".order") for name, _ in model.named_buffers()) == pivoted
    assert report.totals.after.bytes == held_bytes(model)
    for choice in report.plan.sites:
        assert choice.spec is None or choice.spec.shape == choice.shape
    assert any("are of the ranks before" in note for note in report.notes)
