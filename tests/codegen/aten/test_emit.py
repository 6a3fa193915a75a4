"""Emitted torch source: right for every order and every batch, readable, and traceable."""

from __future__ import annotations

import itertools
import time
import timeit
import traceback
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tensorize.algebra.reconstruct import reconstruct
from tensorize.codegen.aten import emit as aten
from tensorize.formats import interpret
from tensorize.ir.orders import ContractionPiece, ContractionPlan
from tensorize.ir.spec import TTSpec
from tensorize.passes.orders.by_flops import plan_contraction
from tensorize.weight import products
from tensorize.weight.contractions import contractions
from tests.passes.orders.test_by_flops import trees

SIDES = ("columns", "rows")

SPECS = [
    TTSpec.low_rank(12, 20, 5),
    TTSpec.low_rank(12, 20, 5, experts=3),
    TTSpec((6,), (5,), ()),
    TTSpec((8, 9), (10, 8), (3,)),
    TTSpec((8, 9), (10, 8), (3,), experts=2),
    TTSpec((8, 9), (10, 8), (60,)),
    TTSpec((4, 3, 8), (8, 2, 4), (6, 5)),
    TTSpec((8, 8, 8), (8, 8, 8), (4, 4)),
    TTSpec((2, 3, 2, 3), (3, 2, 3, 2), (4, 6, 4)),
    TTSpec((2, 3, 2), (3, 2, 2), (4, 3), experts=2),
    TTSpec((1, 1), (2, 6), (2,)),
    TTSpec((6, 2), (1, 1), (2,)),
    TTSpec((1, 4, 1), (3, 1, 3), (2, 3)),
    TTSpec((2, 1, 3), (2, 1, 3), (2, 3)),
    TTSpec.block((3, 4), (5, 2), 2),
    TTSpec.block((8, 9), (10, 8), 3, experts=2),
    TTSpec.block((5, 1), (3, 4), 2),
    TTSpec.block((1, 5), (1, 4), 2),
]


def draw(shape: Sequence[int], seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def draw_cores(spec: TTSpec, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [draw(shape, seed, dtype) for seed, shape in enumerate(spec.core_shapes)]


def draw_x(spec: TTSpec, contract: str, lead: Sequence[int], dtype=torch.float64) -> Tensor:
    features = spec.shape[-1] if contract == "columns" else spec.shape[-2]
    return draw((*spec.shape[:-2], *lead, features), 99, dtype)


def check(y: Tensor, spec: TTSpec, cores: Sequence[Tensor], x: Tensor, contract: str) -> None:
    """Within the rounding of sums of products: |error| <= terms * eps * (|x| |cores|), Higham 3.5.

    A sum over all ranks and columns, done in any order with d products a term, has at most as many
    roundings as the sizes of the summed indices together, and d.
    """
    expected = interpret.apply(spec, cores, x, contract)
    assert y.shape == expected.shape
    assert y.dtype == x.dtype
    terms = sum(spec.size.values()) + len(spec.cores)
    scale = interpret.apply(spec, [core.abs() for core in cores], x.abs(), contract)
    assert ((y.double() - expected).abs() <= terms * torch.finfo(x.dtype).eps * scale).all()


def alone(plan: ContractionPlan, piece: ContractionPiece) -> ContractionPlan:
    """A plan that uses one piece for every batch."""
    return replace(plan, pieces=(replace(piece, first_batch=1, last_batch=None),))


# ------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("contract", SIDES)
@pytest.mark.parametrize("spec", SPECS, ids=repr)
def test_every_piece_computes_the_product(spec: TTSpec, contract: str) -> None:
    plan = plan_contraction(spec, contract)
    cores = draw_cores(spec)
    for piece in plan.pieces:
        function = aten.build(alone(plan, piece))
        for rows in (0, 1, 2, 17):
            x = draw_x(spec, contract, (rows,))
            check(function(x, cores), spec, cores, x, contract)


@pytest.mark.parametrize("contract", SIDES)
@pytest.mark.parametrize("spec", SPECS, ids=repr)
def test_the_plan_computes_the_product_on_both_sides_of_every_breakpoint(
    spec: TTSpec, contract: str
) -> None:
    plan = plan_contraction(spec, contract)
    function = aten.build(plan)
    cores = draw_cores(spec)
    for rows in {0, 1, 40, *plan.breakpoints, *(turn - 1 for turn in plan.breakpoints)}:
        x = draw_x(spec, contract, (rows,))
        check(function(x, cores), spec, cores, x, contract)


@pytest.mark.parametrize("contract", SIDES)
@pytest.mark.parametrize("spec", SPECS, ids=repr)
def test_a_bias_is_added_to_every_row_whatever_the_order_and_layout(
    spec: TTSpec, contract: str
) -> None:
    plan, cores = plan_contraction(spec, contract), draw_cores(spec)
    for piece in plan.pieces:
        for layout in aten.layouts(alone(plan, piece), 8):
            function = aten.build(layout)
            for rows in (0, 1, 17):
                x = draw_x(spec, contract, (rows,))
                y = function(x, cores)
                bias = draw((y.shape[-1],), 7)
                terms = sum(spec.size.values()) + len(spec.cores) + 1
                scale = interpret.apply(spec, [c.abs() for c in cores], x.abs(), contract)
                allowed = 2 * terms * torch.finfo(x.dtype).eps * (scale + bias.abs())
                assert ((function(x, cores, bias) - (y + bias)).abs() <= allowed).all()


@pytest.mark.parametrize("rows", [3, 40], ids=["core by core", "rebuilt"])
@pytest.mark.parametrize("gradients", [False, True], ids=["plain", "with gradients"])
def test_a_bias_does_not_widen_what_autocast_narrows(rows: int, *, gradients: bool) -> None:
    spec = TTSpec((24, 32), (48, 64), (60,))
    cores = [(core.float() / 30).requires_grad_() for core in draw_cores(spec)]
    bias = torch.ones(768, requires_grad=True)
    x = draw((rows, 3072)).float()
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(gradients):
        y = products.matmul(spec, contractions(spec), cores, x, "columns", bias)
    assert y.dtype == torch.bfloat16
    if gradients:
        y.float().sum().backward()
        assert bias.grad is not None
        assert torch.equal(bias.grad, torch.full((768,), float(rows)))


@pytest.mark.parametrize("contract", SIDES)
@pytest.mark.parametrize("spec", SPECS[:8], ids=repr)
def test_any_leading_shape_is_kept(spec: TTSpec, contract: str) -> None:
    function = aten.build(plan_contraction(spec, contract))
    cores = draw_cores(spec)
    for lead in ((), (3,), (2, 3), (2, 0, 3), (1, 1, 2, 1)):
        x = draw_x(spec, contract, lead)
        check(function(x, cores), spec, cores, x, contract)


@pytest.mark.parametrize("spec", SPECS, ids=repr)
def test_inputs_and_cores_need_not_be_contiguous(spec: TTSpec) -> None:
    function = aten.build(plan_contraction(spec))
    cores = [core.mT.contiguous().mT if core.ndim > 1 else core for core in draw_cores(spec)]
    x = draw_x(spec, "columns", (4, 5)).transpose(-2, -3)
    check(function(x, cores), spec, cores, x, "columns")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", SPECS[:8], ids=repr)
def test_lower_precision_stays_within_its_rounding(spec: TTSpec, dtype: torch.dtype) -> None:
    plan = plan_contraction(spec)
    cores = draw_cores(spec, dtype)
    x = draw_x(spec, "columns", (5,), dtype)
    check(aten.build(plan)(x, cores), spec, cores, x, "columns")


modes = st.lists(st.integers(1, 3), min_size=3, max_size=3)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    modes, modes, st.tuples(*[st.integers(1, 3)] * 2), st.sampled_from([0, 2]),
    st.sampled_from(SIDES),
)  # fmt: skip
def test_any_tree_is_translated_in_any_layout_even_those_that_never_win(
    rows: list[int],
    columns: list[int],
    ranks: tuple[int, int],
    experts: int,
    contract: str,
) -> None:
    spec = TTSpec(rows, columns, ranks, experts=experts)
    cores = draw_cores(spec)
    for tree in trees(("x", 0, 1, 2)):
        piece = ContractionPiece(tree, 1, None, 0, 1, 0, 1)
        for plan in aten.layouts(ContractionPlan(spec, contract, (piece,)), 8):
            function = aten.build.__wrapped__(plan)
            for batch in (0, 1, 3):
                x = draw_x(spec, contract, (batch,))
                check(function(x, cores), spec, cores, x, contract)


@pytest.mark.parametrize("contract", SIDES)
@pytest.mark.parametrize("spec", SPECS, ids=repr)
def test_gradients_are_those_of_the_reconstructed_weight(spec: TTSpec, contract: str) -> None:
    plan = plan_contraction(spec, contract)
    for piece in plan.pieces:
        inputs = [draw_x(spec, contract, (5,)), *draw_cores(spec)]
        for tensor in inputs:
            tensor.requires_grad_()
        x, *cores = inputs
        y = aten.build(alone(plan, piece))(x, cores)
        weight = reconstruct(spec, cores)
        expected = x @ (weight.mT if contract == "columns" else weight)
        direction = draw(y.shape, 7)
        got = torch.autograd.grad(y, inputs, direction)
        wanted = torch.autograd.grad(expected, inputs, direction)
        for a, b in zip(got, wanted, strict=True):
            terms = sum(spec.size.values()) * 5
            slack = terms * torch.finfo(torch.float64).eps * b.norm().item()
            torch.testing.assert_close(a, b, rtol=0, atol=slack)


# ------------------------------------------------------------------------------------- refusals


def test_an_input_of_another_width_is_refused_and_not_reshaped() -> None:
    spec = TTSpec.low_rank(12, 20, 5)
    function = aten.build(plan_contraction(spec))
    with pytest.raises(ValueError, match=r"x is \(\.\.\., 20\), got \(3, 40\)"):
        function(draw((3, 40)), draw_cores(spec))


def test_an_input_for_another_number_of_experts_is_refused() -> None:
    spec = TTSpec.low_rank(12, 20, 5, experts=3)
    function = aten.build(plan_contraction(spec))
    for shape in ((6, 2, 20), (20,)):
        with pytest.raises(ValueError, match=r"x is \(3, \.\.\., 20\)"):
            function(draw(shape), draw_cores(spec))


# --------------------------------------------------------------------------------------- tracing


class Contract(nn.Module):
    def __init__(self, plan: ContractionPlan) -> None:
        super().__init__()
        self.cores = nn.ParameterList(draw_cores(plan.spec))
        self.function = aten.build(plan)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, list(self.cores))


TRACED = [SPECS[0], SPECS[1], SPECS[5], SPECS[7]]


@pytest.mark.parametrize("contract", SIDES)
@pytest.mark.parametrize("spec", TRACED, ids=repr)
def test_torch_compile_takes_it_as_one_graph(spec: TTSpec, contract: str) -> None:
    torch.compiler.reset()
    plan = plan_contraction(spec, contract)
    module = Contract(plan)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    for rows in (1, 3, 40):
        x = draw_x(spec, contract, (rows,))
        assert torch.equal(compiled(x), module(x))


@pytest.mark.parametrize("spec", TRACED, ids=repr)
def test_torch_export_takes_it(spec: TTSpec) -> None:
    module = Contract(plan_contraction(spec)).eval()
    x = draw_x(spec, "columns", (2, 3))
    exported = torch.export.export(module, (x,))
    assert torch.equal(exported.module()(x), module(x))


def test_a_plan_of_one_piece_is_exported_for_any_batch() -> None:
    module = Contract(plan_contraction(TTSpec.low_rank(12, 20, 5))).eval()
    x = draw((4, 20))
    batch = torch.export.Dim("batch")
    exported = torch.export.export(module, (x,), dynamic_shapes=({0: batch},))
    for rows in (2, 4, 77):
        x = draw((rows, 20))
        assert torch.equal(exported.module()(x), module(x))


def test_vmap_goes_through() -> None:
    spec = SPECS[3]
    function = aten.build(plan_contraction(spec))
    cores = draw_cores(spec)
    x = draw_x(spec, "columns", (4, 3))
    y = torch.vmap(lambda row: function(row, cores))(x)
    check(y, spec, cores, x, "columns")


# ---------------------------------------------------------------------------------------- the text


def test_the_source_of_low_rank_is_two_linear_layers() -> None:
    assert aten.emit(plan_contraction(TTSpec.low_rank(768, 3072, 64))) == LOW_RANK


LOW_RANK = '''\
import torch.nn.functional as F


def contract(x, cores, bias=None):
    """y = x Wᵀ + bias: (..., 3072) to (..., 768).

    W is TTSpec((768, 1), (1, 3072), (64,)) of (768, 3072).
    Sizes: m0=768, r1=64, n1=3072.
    B is the number of rows.
    """
    if x.shape[-1] != 3072:
        raise ValueError(f"x is (..., 3072), got {tuple(x.shape)}")
    c0, c1 = cores
    lead = x.shape[:-1]
    x = x.reshape(-1, 3072)
    # Rows from 1 on: (('x', 1), 0)
    # 0 + 491520 B FLOPs
    # t0 (B, r1) = x (B, n1) · c1 (r1, n1) over n1
    t0 = F.linear(x, c1)
    # t1 (B, m0) = t0 (B, r1) · c0 (m0, r1) over r1
    t1 = F.linear(t0, c0, bias)
    return t1.reshape(*lead, 768)
'''


def test_the_source_of_several_pieces_chooses_by_the_number_of_rows() -> None:
    assert aten.emit(plan_contraction(TTSpec((24, 32), (48, 64), (60,)))) == TWO_CORES


TWO_CORES = '''\
import torch.nn.functional as F


def contract(x, cores, bias=None):
    """y = x Wᵀ + bias: (..., 3072) to (..., 768).

    W is TTSpec((24, 32), (48, 64), (60,)) of (768, 3072).
    Sizes: m0=24, n0=48, r1=60, m1=32, n1=64.
    B is the number of rows.
    """
    if x.shape[-1] != 3072:
        raise ValueError(f"x is (..., 3072), got {tuple(x.shape)}")
    c0, c1 = cores
    lead = x.shape[:-1]
    x = x.reshape(-1, 3072)
    rows = x.shape[0]
    if rows <= 28:
        # Rows from 1 to 28: (('x', 0), 1)
        # 0 + 14745600 B FLOPs
        # t0 (m0, B, n1, r1) = x (B, n0, n1) · c0 (m0, n0, r1) over n0
        t0 = x.reshape(-1, 48, 64).permute(0, 2, 1).reshape(-1, 48) @ c0
        # t1 (m0, B, m1) = t0 (m0, B, n1, r1) · c1 (r1, m1, n1) over n1, r1
        t1 = F.linear(t0.reshape(-1, 3840), c1.permute(1, 2, 0).reshape(32, 3840))
        y = t1.reshape(24, -1, 32).permute(1, 0, 2).reshape(*lead, 768)
        return y if bias is None else y + bias.to(y.dtype)
    # Rows from 29 on: ('x', (0, 1))
    # 283115520 + 4718592 B FLOPs
    bias = None if bias is None else bias.reshape(24, 32).permute(1, 0).reshape(-1)
    # t0 (m1, m0, n0, n1) = c0 (m0, n0, r1) · c1 (r1, m1, n1) over r1
    t0 = c0.reshape(1152, 60) @ c1.permute(1, 0, 2)
    # t1 (B, m1, m0) = x (B, n0, n1) · t0 (m1, m0, n0, n1) over n0, n1
    t1 = F.linear(x, t0.reshape(768, 3072), bias)
    return t1.reshape(-1, 32, 24).permute(0, 2, 1).reshape(*lead, 768)
'''


def test_experts_are_batched_products() -> None:
    source = aten.emit(plan_contraction(TTSpec.low_rank(12, 20, 5, experts=3)))
    assert "x = x.reshape(3, -1, 20)" in source
    assert "t0 = c1 @ x.mT" in source
    assert "t1 = t0.mT @ c0.mT" in source


def test_low_rank_copies_nothing() -> None:
    for contract, experts in itertools.product(SIDES, (0, 3)):
        plan = plan_contraction(TTSpec.low_rank(12, 20, 5, experts=experts), contract)
        assert "permute" not in aten.emit(plan)


def test_a_rebuilt_weight_is_not_permuted() -> None:
    """Its row blocks come out of order, and the (smaller) output is put right instead."""
    plan = plan_contraction(TTSpec((24, 32), (48, 64), (60,)))
    *_, rebuild = plan.pieces
    source = aten.emit(alone(plan, rebuild))
    assert "t1 = F.linear(x, t0.reshape(768, 3072), bias)" in source
    assert source.count("permute") == 3  # a view of a core, the bias, and the output


def test_layouts_are_different_texts_of_one_order() -> None:
    piece = ContractionPiece((("x", 1), 0), 1, 8, 0, 1, 0, 1)
    plan = ContractionPlan(TTSpec((24, 32), (48, 64), (60,)), "columns", (piece,))
    found = aten.layouts(plan, 6)
    assert found[0] == plan
    assert len({aten.emit(layout) for layout in found}) == len(found) == 6
    assert len(aten.layouts(plan, 1000)) < 1000


def test_layouts_follow_the_rows() -> None:
    """One row is nothing to put in order; many rows are better the long side of a product."""
    spec, tree = TTSpec((64, 48), (24, 32), (192,)), (("x", 1), 0)

    def source(batch: int) -> str:
        piece = ContractionPiece(tree, batch, batch, 0, 1, 0, 1)
        return aten.emit(ContractionPlan(spec, "columns", (piece,)))

    assert "permute" not in source(1)
    assert "t0 = F.linear(x.reshape(-1, 32), c1.reshape(9216, 32))" in source(1)
    assert "@ x.reshape(-1, 24, 32).permute(1, 2, 0)" in source(4096)


def test_no_branch_without_need() -> None:
    for spec in SPECS:
        plan = plan_contraction(spec)
        assert aten.emit(plan).count("if rows <=") == len(plan.pieces) - 1


def test_lines_are_of_readable_length() -> None:
    spec = TTSpec((8, 8, 8, 8), (8, 8, 8, 8), (16, 32, 16))
    assert max(map(len, aten.emit(plan_contraction(spec)).splitlines())) <= 120


def test_the_piece_is_chosen_in_less_than_three_microseconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In eager mode; the quickest of some rounds, as other processes only make it slower."""
    plan = plan_contraction(TTSpec((16, 16, 16), (16, 16, 16), (32, 32)))
    assert len(plan.pieces) == 3
    monkeypatch.setattr(aten, "_piece", lambda plan, piece: [f"return {piece.first_batch}"])
    found: dict[str, object] = {}
    exec("\n".join(["def choose(x):", *aten._by_rows(plan)]), found)
    choose: Any = found["choose"]
    x = torch.empty(1000, 4096)
    assert choose(x) == plan.pieces[-1].first_batch
    took = min(timeit.repeat(lambda: choose(x), time.process_time, number=1000, repeat=7))
    assert took / 1000 < 3e-6


def test_it_is_compiled_once_and_tracebacks_show_it() -> None:
    spec = TTSpec.low_rank(12, 20, 5)
    function = aten.build(plan_contraction(spec))
    assert aten.build(plan_contraction(TTSpec.low_rank(12, 20, 5))) is function
    try:
        function(draw((3, 20)), draw_cores(spec)[:1])
    except ValueError:
        assert "c0, c1 = cores" in traceback.format_exc()
    else:
        pytest.fail("one core is not enough")
