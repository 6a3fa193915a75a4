"""Block low rank: what the spec says, the best blocks, and the way through the whole compiler."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tensorize
from tensorize.algebra.decompose import block_svd, cut_block, tt_svd
from tensorize.algebra.metric import Metric
from tensorize.algebra.reconstruct import reconstruct
from tensorize.algebra.rounding import round_tt
from tensorize.base.errors import AnalysisError
from tensorize.base.records import plain, record
from tensorize.formats import interpret
from tensorize.formats.registry import format_of, names
from tensorize.ir.machine import GENERIC
from tensorize.ir.plan import RankPlan
from tensorize.ir.sites import Site, Use
from tensorize.ir.spec import BLOCK, TTSpec
from tensorize.passes.allocate import times as cost
from tensorize.passes.curves.spectra import spectrum
from tensorize.passes.orders.by_flops import plan_contraction
from tensorize.weight import products
from tensorize.weight.contractions import contractions
from tests.models import CASES, MLP

quick = settings(max_examples=40, deadline=None, derandomize=True)
PLAIN = Metric(1.0, None, None)


def draw(shape: Sequence[int], seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def draw_cores(spec: TTSpec) -> list[Tensor]:
    return [draw(shape, seed) for seed, shape in enumerate(spec.core_shapes)]


def close(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    got, want = got.detach(), want.detach()
    scale = max(1.0, float(want.abs().max())) if want.numel() else 1.0
    assert float((got - want).abs().max() if want.numel() else 0.0) <= 1e-11 * scale


modes = st.tuples(st.integers(1, 5), st.integers(1, 5))
specs = st.builds(
    TTSpec.block, modes, modes, st.integers(1, 4), experts=st.sampled_from([0, 0, 1, 3])
)


# ---------------------------------------------------------------------------------------- the spec


@quick
@given(specs)
def test_the_weight_is_the_sum_over_the_rank(spec: TTSpec) -> None:
    """The definition, one block at a time."""
    (m0, m1), (n0, n1), (rank,) = spec.row_modes, spec.column_modes, spec.ranks
    lead = (spec.shape[0],) if spec.batch else ()
    left, right = draw_cores(spec)
    left, right = left.reshape(*lead, m1, m0, n0, rank), right.reshape(*lead, n0, m1, rank, n1)
    weight = torch.empty(*lead, m0, m1, n0, n1, dtype=torch.float64)
    for i in range(m1):
        for j in range(n0):
            weight[..., :, i, j, :] = left[..., i, :, j, :] @ right[..., j, i, :, :]
    close(reconstruct(spec, draw_cores(spec)), weight.reshape(spec.shape))


@quick
@given(specs)
def test_the_spec_survives_every_way_to_keep_it(spec: TTSpec) -> None:
    assert TTSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert eval(repr(spec), {"TTSpec": TTSpec}) == spec
    assert spec.with_ranks(spec.ranks) == spec
    assert spec.with_ranks((7,)).ranks == (7,)
    assert hash(spec) == hash(copy.deepcopy(spec))
    if spec.batch:
        assert spec.single == spec.with_ranks(spec.ranks).single
        assert spec.single.shape == spec.shape[1:]
    plan = RankPlan("w", "linear", spec.shape, spec, 0.0, 0.0, "")
    assert record(RankPlan, plain(plan)) == plan


def test_the_words_of_a_block() -> None:
    spec = TTSpec.block((6, 4), (3, 8), 2)
    assert spec.format == BLOCK
    assert spec.shape == (24, 24)
    assert spec.ranks == (2,)
    assert spec.cores == (("m1", "m0", "n0", "r1"), ("n0", "m1", "r1", "n1"))
    assert spec.parameters == 2 * (24 * 3 + 24 * 4)
    assert str(spec) == "TTSpec.block((6, 4), (3, 8), 2)"
    assert spec.single is spec
    assert BLOCK in names()


def test_a_single_block_is_low_rank() -> None:
    assert TTSpec.block((6, 1), (1, 5), 2) == TTSpec.low_rank(6, 5, 2)
    assert TTSpec.block((6, 1), (1, 5), 2, experts=3) == TTSpec.low_rank(6, 5, 2, experts=3)
    assert TTSpec.block((6, 1), (1, 5), 2).format == "low_rank"
    for rows, columns in (((6, 2), (1, 5)), ((6, 1), (3, 5)), ((1, 6), (5, 1))):
        assert TTSpec.block(rows, columns, 2).format == BLOCK


@pytest.mark.parametrize(
    "spec", [TTSpec.block((16, 8), (4, 32), 3), TTSpec.block((9, 5), (7, 3), 2)]
)
@pytest.mark.parametrize("contract", ["columns", "rows"])
def test_a_row_costs_twice_as_many_flops_as_parameters(spec: TTSpec, contract: str) -> None:
    assert plan_contraction(spec, contract).flops(1) == 2 * spec.parameters


@pytest.mark.parametrize(
    ("rows", "columns", "rank"), [((2,), (2, 2), 1), ((2, 2), (2, 2, 2), 1), ((0, 2), (2, 2), 1),
    ((2, 2), (2, 2), 0), ((2, True), (2, 2), 1)],
)  # fmt: skip
def test_what_is_no_block_is_refused(
    rows: tuple[int, ...], columns: tuple[int, ...], rank: int
) -> None:
    with pytest.raises(ValueError, match=r"two row modes|positive integers"):
        TTSpec.block(rows, columns, rank)


# ---------------------------------------------------------------------------------- the best blocks


@quick
@given(modes, modes, st.integers(1, 5), st.integers(0, 9))
def test_every_block_gets_its_own_best_approximation(
    rows: tuple[int, int], columns: tuple[int, int], rank: int, seed: int
) -> None:
    (m0, m1), (n0, n1) = rows, columns
    matrix = draw((m0 * m1, n0 * n1), seed)
    spec, cores = block_svd(matrix, rows, columns, rank)
    assert spec.ranks == (min(rank, m0, n1),)
    left = (matrix - reconstruct(spec, cores)).square().sum()
    blocks = matrix.reshape(m0, m1, n0, n1).permute(1, 2, 0, 3)
    sigma = torch.linalg.svdvals(blocks)
    assert float(left) == pytest.approx(float(sigma[..., rank:].square().sum()), abs=1e-10)
    exact_spec, exact = block_svd(matrix, rows, columns)
    close(reconstruct(exact_spec, exact), matrix)
    if exact_spec.format == BLOCK:
        cut_spec, cut = cut_block(exact_spec, exact, rank)
        assert cut_spec == spec
        assert all(torch.equal(a, b) for a, b in zip(cut, cores, strict=True))


def test_what_cannot_be_decomposed_is_refused() -> None:
    with pytest.raises(ValueError, match="make a matrix of"):
        block_svd(draw((6, 6)), (2, 2), (3, 2))
    with pytest.raises(ValueError, match="one by one"):
        block_svd(draw((2, 4, 4)), (2, 2), (2, 2))
    with pytest.raises(AnalysisError, match="NaN"):
        block_svd(torch.full((4, 4), float("nan")), (2, 2), (2, 2))
    spec, cores = block_svd(draw((4, 4)), (2, 2), (2, 2))
    with pytest.raises(ValueError, match="no chain"):
        round_tt(spec, cores)
    chain, cores = tt_svd(draw((4, 4)), (2, 2), (2, 2))
    with pytest.raises(ValueError, match="is not block low rank"):
        cut_block(chain, cores, 1)


def block_site(m: int, n: int, kind: str = "linear") -> Site:
    return Site(
        "w", (m, n), "float64", (Use(kind, "lookup" if kind == "embedding" else "columns"),)
    )


@pytest.mark.parametrize("shape", [(48, 36), (36, 48), (17, 24), (24, 17), (30, 45)])
def test_points_of_blocks_are_what_they_lose_in_the_metric(shape: tuple[int, int]) -> None:
    weight = draw(shape)
    roots = [torch.linalg.cholesky(a @ a.T + torch.eye(len(a))) for a in
             (draw((s, s), s) for s in shape)]  # fmt: skip
    for metrics in ((PLAIN,), (Metric(0.5, roots[0], roots[1]),)):
        curve = spectrum(block_site(*shape), weight, metrics, (BLOCK,))
        assert curve.train_points
        for spec, lost in curve.train_points:
            assert spec.format == BLOCK
            assert spec.parameters - spec.removable < weight.numel()
            cores = curve.factors(spec, weight)
            assert lost == pytest.approx(format_of(spec).error(spec, cores, weight, metrics))
            plain = block_svd(weight, spec.row_modes, spec.column_modes, *spec.ranks)[1]
            assert lost <= format_of(spec).error(spec, plain, weight, metrics) * (1 + 1e-9)
        exact = curve.trains[0].spec
        assert curve.distortion_of(exact) <= 1e-20 * float(curve.distortion[0])


def test_blocks_that_a_weight_has_are_found() -> None:
    """A weight of 4 x 4 blocks of rank 2 is exact at a quarter of the parameters."""
    spec = TTSpec.block((16, 4), (4, 16), 2)
    weight = reconstruct(spec, draw_cores(spec))
    curve = spectrum(block_site(64, 64), weight, (PLAIN,), ("low_rank", BLOCK))
    found = [lost for known, lost in curve.train_points if known == spec]
    assert found == [pytest.approx(0.0, abs=1e-18)]
    same_size = float(curve.distortion[spec.parameters // 128])
    assert same_size > 0.1 * float(curve.distortion[0])


def test_without_being_asked_for_there_are_no_blocks() -> None:
    spec = TTSpec.block((16, 4), (4, 16), 2)
    weight = reconstruct(spec, draw_cores(spec))
    site = block_site(64, 64)
    for formats in (None, ("dense", "low_rank"), ("tt",)):
        curve = spectrum(site, weight, (PLAIN,), formats)
        assert BLOCK not in curve.formats
        assert all(known.format != BLOCK for known, _ in curve.train_points)
    with pytest.raises(AnalysisError, match=r"(?s)no block low rank.*formats=.block"):
        curve.distortion_of(spec)


def test_primes_and_stacks_of_experts_have_no_blocks() -> None:
    both_prime = spectrum(block_site(7, 11), draw((7, 11)), (PLAIN,), (BLOCK,))
    assert both_prime.train_points == ()
    stacked = Site("w", (3, 8, 8), "float64", (Use("bmm", "rows"),))
    assert spectrum(stacked, draw((3, 8, 8)), (PLAIN,), (BLOCK,)).train_points == ()


# ------------------------------------------------------------------------------------- its answers


@quick
@given(specs, st.integers(0, 5))
def test_lookups_are_rows_of_the_matrix(spec: TTSpec, count: int) -> None:
    spec = spec.single
    cores = [core.requires_grad_() for core in draw_cores(spec)]
    generator = torch.Generator().manual_seed(count)
    rows = torch.randint(0, spec.shape[0], (2, count), generator=generator)
    got, want = products.lookup(spec, cores, rows), F.embedding(rows, reconstruct(spec, cores))
    close(got, want)
    if count:
        for a, b in zip(
            torch.autograd.grad(got.square().sum(), cores),
            torch.autograd.grad(want.square().sum(), cores),
            strict=True,
        ):
            close(a, b)


@pytest.mark.parametrize("row", [-1, 12, 13, 100])
def test_rows_that_the_table_lacks_are_refused(row: int) -> None:
    spec = TTSpec.block((3, 4), (5, 2), 2)
    with pytest.raises(IndexError):
        products.lookup(spec, draw_cores(spec), torch.tensor([0, row]))


@quick
@given(
    specs.filter(lambda spec: spec.format == BLOCK),
    st.sampled_from(["columns", "rows"]),
    st.sampled_from([(1,), (0,), (3,), (2, 0, 3)]),
)
def test_contractions_and_their_gradients(
    spec: TTSpec, contract: str, lead: tuple[int, ...]
) -> None:
    cores = [core.requires_grad_() for core in draw_cores(spec)]
    into = spec.shape[-1] if contract == "columns" else spec.shape[-2]
    x = draw((*spec.shape[:-2], *lead, into), 9).requires_grad_()
    got = contractions(spec)[contract](x, cores)
    want = interpret.apply(spec, cores, x, contract)
    close(got, want)
    for a, b in zip(
        torch.autograd.grad(got.square().sum(), (x, *cores)),
        torch.autograd.grad(want.square().sum(), (x, *cores)),
        strict=True,
    ):
        close(a, b)


@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_every_use_of_a_block_has_a_time(kind: str) -> None:
    site, spec = block_site(512, 256, kind), TTSpec.block((64, 8), (8, 32), 4)
    times = cost.spec_times(site, spec, (1, 64, 4096), GENERIC)
    assert (times > 0).all()
    assert (times[1:] > times[:-1]).all()


def test_a_block_moves_every_one_of_its_parameters() -> None:
    """One row on a machine that does nothing but read memory: the bytes of all cores, once."""
    spec = TTSpec.block((128, 8), (8, 128), 16)
    (took,) = cost.spec_times(block_site(1024, 1024), spec, (1,), GENERIC)
    assert took * 1e-6 >= 8 * spec.parameters / GENERIC.bandwidth


# --------------------------------------------------------------------------- through the compiler


class Tied(nn.Module):
    """A table that is the head as well."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(60, 24)
        self.mix = nn.Linear(24, 24)
        self.head = nn.Linear(24, 60, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.tokens(ids))))


def test_blocks_are_compiled_saved_and_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = MLP(), torch.randn(5, 48)
    small = tensorize.compile(model, 0.5, formats=BLOCK, example_inputs=(x,))
    report = tensorize.report(small)
    assert {site.format for site in report.sites} == {BLOCK}
    assert "block" in str(report)
    dense = tensorize.densify(small)
    assert torch.allclose(small(x), dense(x), atol=1e-5)
    tensorize.save(small, tmp_path / "small")
    again = tensorize.load(tmp_path / "small", model=MLP())
    assert torch.equal(again(x), small(x))
    assert [site.format for site in tensorize.report(again).sites] == [BLOCK] * 3
    assert torch.equal(pickle.loads(pickle.dumps(small))(x), small(x))
    plan = report.plan
    assert tensorize.Plan.from_json(plan.to_json()) == plan


def test_exact_ranks_are_exact() -> None:
    torch.manual_seed(0)
    model, x = MLP().double(), torch.randn(5, 48).double()
    small = tensorize.compile(model, None, formats=BLOCK, ranks={"*": "full"}, example_inputs=(x,))
    assert {site.format for site in tensorize.report(small).sites} == {BLOCK}
    close(small(x).detach(), model(x).detach())


def test_a_tied_table_of_blocks_with_data_and_a_cache(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Tied()
    batches = [torch.randint(0, 60, (4, 7)) for _ in range(4)]

    def analysed() -> tensorize.Analysis:
        return tensorize.analyze(
            model, formats=(BLOCK, "dense"), calibration=batches, cache_dir=tmp_path
        )

    analysis, again = analysed(), analysed()
    plan = analysis.plan(0.6)
    assert again.plan(0.6) == plan
    assert BLOCK in {site.format for site in plan.sites}
    small = tensorize.apply(model, plan, calibration=batches)
    assert torch.allclose(small(batches[0]), tensorize.densify(small)(batches[0]), atol=1e-4)
    assert small.head.weight.cores[0] is small.tokens.weight.cores[0]


def test_all_formats_together_never_lose_more_than_low_rank_alone() -> None:
    torch.manual_seed(0)
    model = MLP()
    spec = TTSpec.block((20, 4), (4, 24), 2)
    with torch.no_grad():
        model.middle.copy_(reconstruct(spec, draw_cores(spec)).float())
    x = torch.randn(5, 48)
    every = tensorize.analyze(model, example_inputs=(x,), formats=names())
    mixed = every.plan(0.5)
    low = every.plan(0.5, formats=("dense", "low_rank"))
    assert mixed.predicted.output_error <= low.predicted.output_error
    assert {site.name: site.format for site in mixed.sites}["middle"] == BLOCK


def test_by_default_a_model_has_no_blocks() -> None:
    case = CASES["gpt2"]
    model = tensorize.compile(case.model(), 0.5, example_inputs=case.batch())
    assert all(site.format != BLOCK for site in tensorize.report(model).sites)
