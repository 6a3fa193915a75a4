"""Emitted Triton text: the golden texts of all families, and what holds for every text."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

from tensorize.codegen.triton import roles, tiles
from tensorize.codegen.triton import source as triton_source
from tensorize.codegen.triton.roles import NotCovered
from tensorize.ir.spec import TTSpec
from tensorize.ir.work import Epilogue, Norm, Work
from tensorize.passes.orders.by_flops import plan_contraction
from tests.kernels import FAMILIES, GUARDED, TABLES, WORKS
from tests.paths import GOLDEN, ROOT


def golden(name: str) -> Path:
    return GOLDEN / f"kernel_{re.sub('[^a-z]+', '_', name)}.txt"


EVERY = {**FAMILIES, **GUARDED}
KEPT = [*FAMILIES, *(f"{name}, guarded" for name in ("pair", "decode grouped", "three cores"))]


@pytest.mark.parametrize("name", KEPT)
def test_text_is_golden(name: str) -> None:
    """``UPDATE_GOLDEN=1 pytest tests/codegen/triton/test_source.py`` writes them again."""
    text = EVERY[name](torch.bfloat16).text
    if os.environ.get("UPDATE_GOLDEN"):
        golden(name).write_text(text)
    assert text == golden(name).read_text()


def test_every_golden_text_has_its_family() -> None:
    assert {path.name for path in GOLDEN.glob("kernel_*")} == {golden(n).name for n in KEPT}


def test_texts_are_formatted_and_clean(tmp_path: Path) -> None:
    for name, dtype in product(EVERY, (torch.bfloat16, torch.float32)):
        text = EVERY[name](dtype).text
        (tmp_path / f"{golden(name).stem}_{str(dtype)[6:]}.py").write_text(text)
    ruff = Path(sys.executable).parent / "ruff"
    if not ruff.exists():
        pytest.skip("ruff is not installed beside this Python")
    for command in (["format", "--check"], ["check", "--select", "E,F,W,I"]):
        done = subprocess.run(
            [ruff, *command, "--isolated", "--line-length", "100", tmp_path],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", EVERY)
def test_a_text_runs_alone(name: str) -> None:
    """It imports torch and triton only, and defines the kernel and its launch."""
    source = EVERY[name](torch.float16)
    tree = ast.parse(source.text)
    imported = {
        a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names
    }
    assert imported <= {"torch", "triton", "triton.language"}
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    arguments = [a.arg for a in functions["launch"].args.args]
    assert tuple(arguments[: len(source.inputs)]) == source.inputs
    outputs = arguments[len(source.inputs) :][: len(source.outputs)]
    assert tuple(outputs) == source.outputs
    taken = [a.arg for a in functions[source.name].args.args]
    flags = ["PRECISION", "WIDEN", *(["WAVE"] if source.counters else [])]
    assert taken == [a.name for a in source.arguments] + flags
    assert "W " in source.text or "W_0 " in source.text  # shapes are told


def test_emitting_text_imports_no_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from tests.kernels import FAMILIES\n"
        "for make in FAMILIES.values(): assert '@triton.jit' in make(torch.bfloat16).text\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("rank", range(1, 700, 7))
def test_a_rank_is_padded_to_the_dots_tile_or_little_more(rank: int) -> None:
    parts = roles.chunks(rank)
    widths = [width for _, width in parts]
    assert all(width & (width - 1) == 0 and 16 <= width <= 256 for width in widths)
    assert [start for start, _ in parts] == [sum(widths[:k]) for k in range(len(widths))]
    assert rank <= sum(widths) <= max(16, rank * 1.34 + 16)


@pytest.mark.parametrize(
    ("work", "why"),
    [
        (Work((TTSpec.low_rank(8, 8, 2, experts=3),)), "experts"),
        (Work((TTSpec.low_rank(2048, 2048, 600),)), "fit on chip"),
        (Work((TTSpec((8, 8), (8, 8), (65,)),)), "no chain"),
        (Work((TTSpec((2,) * 5, (2,) * 5, (2,) * 4),)), "no chain"),
        (Work((TTSpec((8, 8, 2), (8, 8, 2), (4, 4)),), norm=Norm("rms", 1e-6)), "low rank only"),
        (Work((TTSpec.low_rank(8, 8, 2), TTSpec.low_rank(8, 9, 2))), "one x"),
        (Work((TTSpec.low_rank(8, 8, 2),), gated=True), "two weights"),
        (Work((TTSpec((64, 64, 4), (64, 64, 4), (64, 64)),)), "on chip"),
    ],
)
def test_what_no_family_computes_is_refused(work: Work, why: str) -> None:
    with pytest.raises(NotCovered, match=why):
        triton_source.forward(work, roles.Tiles())


def test_lookups_and_grids_that_no_family_computes_are_refused() -> None:
    with pytest.raises(NotCovered, match="share an index"):
        triton_source.lookup(TTSpec.block((6, 4), (5, 8), 3), roles.Tiles())
    small = roles.Tiles(outer=16, slice=16)
    with pytest.raises(NotCovered, match="a grid takes"):
        triton_source.forward(Work((TTSpec.low_rank(1 << 21, 8, 2),)), small)


def test_unknown_norms_activations_and_sides_are_refused() -> None:
    with pytest.raises(ValueError, match="norm"):
        Norm("batch", 1e-5)
    with pytest.raises(ValueError, match="activation"):
        Epilogue(activation="mish")
    with pytest.raises(ValueError, match="contract"):
        triton_source.forward(Work((TTSpec.low_rank(8, 8, 2),), "whole"), roles.Tiles())


@pytest.mark.parametrize("contract", ["columns", "rows"])
@pytest.mark.parametrize("name", ["pair", "two cores", "three cores", "four cores"])
def test_the_work_of_a_row_is_that_of_a_contraction_order(name: str, contract: str) -> None:
    """Never less than the cheapest order for one row; of low rank it is that order."""
    (spec,) = WORKS[name].specs
    cheapest = plan_contraction(spec, contract).flops(1)
    mine = roles.flops_a_row(spec, contract)
    assert mine >= cheapest
    if name == "pair":
        assert mine == cheapest


def test_block_low_rank_costs_twice_its_parameters() -> None:
    spec = TTSpec.block((6, 4), (5, 8), 3)
    assert roles.flops_a_row(spec, "columns") == 2 * spec.parameters


@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize(
    ("m", "n", "r"), [(4096, 4096, 512), (11008, 4096, 128), (4096, 11008, 64), (1024, 1024, 64)]
)
def test_decode_is_cut_into_about_as_many_programs_as_a_gpu_takes(rows, m, n, r) -> None:
    work = Work((TTSpec.low_rank(m, n, r),))
    cut = tiles.default_decode(work, torch.bfloat16, rows)
    assert 64 <= triton_source.decode(work, cut).programs <= 4 * tiles.PROCESSORS


def test_few_row_blocks_are_cut_into_slices_of_the_outputs() -> None:
    work = Work((TTSpec.low_rank(4096, 4096, 128),))
    for rows, dtype in ((64, torch.bfloat16), (512, torch.bfloat16), (4096, torch.float32)):
        cut = tiles.default(work, dtype, rows)
        programs = triton_source.forward(work, cut).programs * -(-rows // cut.rows)
        assert tiles.PROCESSORS // 3 <= programs <= tiles.PROCESSORS
    assert tiles.default(work, torch.bfloat16, 1 << 62) == tiles.default(work, torch.bfloat16)


def test_more_rows_are_cut_into_fewer_shares() -> None:
    """What the last program adds up grows with the rows."""
    work = Work((TTSpec.low_rank(4096, 4096, 512),))
    shares = []
    for rows in (1, 16):
        cut = tiles.default_decode(work, torch.bfloat16, rows)
        shares.append((512 // cut.rank) * -(-4096 // cut.inner_slice))
    assert shares[0] > shares[1]


def test_tables_are_read_by_number() -> None:
    for spec in TABLES.values():
        source = triton_source.lookup(spec, tiles.default_lookup(spec, torch.float32))
        assert source.inputs[0] == "row"
