"""Every format of the registry answers what it is asked, and agrees with its dense weight."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tensorize.algebra.metric import Metric
from tensorize.formats import registry
from tensorize.formats.format import Format, TensorTrain
from tensorize.ir.machine import GENERIC
from tensorize.ir.sites import Site, Use
from tensorize.ir.spec import READERS, Spec, TTSpec
from tensorize.weight.contractions import contractions
from tensorize.weight.products import lookup, matmul
from tests.test_house import folder_of, modules

M, N = 24, 36
NAMES = ("dense", "low_rank", "shared", "tt", "block")
SITE = Site("w", (M, N), "float32", (Use("linear", "columns"),))
CONVOLUTION = Site("c", (M, 4, 3, 3), "float32", (Use("conv2d", "columns", split=1),))
FORMATS = [registry.named(name) for name in ("low_rank", "tt", "block")]
formats = pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


WEIGHT = draw(M, N)


def structures(form: Format) -> list[TensorTrain | None]:
    return [None] if form.spectral else list(form.exact(WEIGHT, asked=True))


def specs(form: Format) -> Iterator[tuple[Spec, TensorTrain | None]]:
    for exact in structures(form):
        if exact is None:
            yield from ((TTSpec.low_rank(M, N, rank), None) for rank in (1, 4, min(M, N)))
        else:
            yield from ((spec, exact) for spec in form.ladder(exact.spec))


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_the_registry_lists_them_in_order() -> None:
    assert registry.names() == NAMES == tuple(form.name for form in registry.formats())
    assert [form.name for form in registry.formats() if form.unasked] == list(NAMES[:3])
    assert [form.name for form in registry.formats() if form.joins] == ["shared"]
    assert registry.named("shared").brings == ("low_rank",)
    assert len({form.colors for form in registry.formats()}) == len(NAMES)
    assert READERS == {}


@pytest.mark.parametrize("form", registry.formats(), ids=lambda form: form.name)
def test_what_takes_no_cores_of_its_own_says_so(form: Format) -> None:
    assert form.title
    if form in FORMATS:
        return
    assert form.exact(WEIGHT, asked=True) == form.widest(M, N) == []
    with pytest.raises(NotImplementedError, match=form.name):
        form.read({})


@formats
def test_its_specs_are_its_own_and_are_read_again(form: Format) -> None:
    for spec, exact in specs(form):
        assert registry.format_of(spec) is form
        assert Spec.from_dict(spec.to_dict()) == form.read(spec.to_dict()) == spec
        assert form.is_cut(spec, spec if exact is None else exact.spec)


@formats
def test_its_factors_stand_for_a_weight_near_the_given_one(form: Format) -> None:
    for spec, exact in specs(form):
        cores = form.factors(spec, WEIGHT, [Metric(1.0, None, None)], exact)
        assert tuple(tuple(core.shape) for core in cores) == spec.core_shapes
        left = (form.reconstruct(spec, cores) - WEIGHT).square().sum()
        assert form.error(spec, cores, WEIGHT, [Metric(1.0, None, None)]) == pytest.approx(
            float(left), abs=1e-18
        )
        assert left < WEIGHT.square().sum()
        close(form.inner(spec, cores, WEIGHT), (WEIGHT * form.reconstruct(spec, cores)).sum())
        root = Metric(2.0, draw(M, M, seed=1).tril(), draw(N, seed=2).abs())
        want = 2 * root.whiten(form.reconstruct(spec, cores)).square().sum()
        close(form.energy(spec, cores, [root]), want)
        better = form.improved(spec, cores, WEIGHT, [root])
        assert form.error(spec, better, WEIGHT, [root]) <= form.error(spec, cores, WEIGHT, [root])


@formats
def test_products_and_rows_are_those_of_its_weight(form: Format) -> None:
    rows, ids = {"columns": draw(5, N), "rows": draw(5, M)}, torch.tensor([[0, 3], [M - 1, 3]])
    for spec, exact in specs(form):
        cores = form.factors(spec, WEIGHT, [Metric(1.0, None, None)], exact)
        weight = form.reconstruct(spec, cores)
        planned = contractions(spec, dtype=torch.float64)
        assert bool(planned) == form.planned
        for contract, x in rows.items():
            want = x @ (weight.t() if contract == "columns" else weight)
            close(matmul(spec, planned, cores, x, contract), want)
            close(Format.multiply(form, spec, cores, x, contract, None), want)
        close(lookup(spec, cores, ids), F.embedding(ids, weight))
        close(Format.lookup(form, spec, cores, ids), F.embedding(ids, weight))


@formats
def test_it_costs_something(form: Format) -> None:
    for spec, _ in specs(form):
        for contract in ("lookup",) if form.planned else ("columns", "rows", "lookup", "whole"):
            assert form.flops(spec, contract) > 0
            few, many = (form.time(spec, contract, b, GENERIC, "float32") for b in (1, 256))
            assert 0 < few < many


@formats
def test_fresh_weights_have_structures_too(form: Format) -> None:
    for spec in form.widest(M, N):
        assert registry.format_of(spec) is form
        assert spec.ranks == form.largest_ranks(spec)
        (*_, last) = form.ladder(spec)
        cores = form.nearest(last, WEIGHT)
        assert tuple(tuple(core.shape) for core in cores) == last.core_shapes


def test_only_low_rank_fits_every_use() -> None:
    assert all(form.fits(SITE) for form in FORMATS)
    assert [form.name for form in FORMATS if form.fits(CONVOLUTION)] == ["low_rank"]


def test_trains_suggest_themselves_where_the_weight_is_a_kronecker_product() -> None:
    product = torch.kron(draw(6, 6), draw(8, 8))
    suggested = [f.name for f in registry.formats() if f.suggests(product)]
    assert suggested == ["tt"]
    assert not any(f.suggests(draw(48, 48)) for f in registry.formats())


# ------------------------------------------------------------------------ how entries are stored


@pytest.mark.parametrize(
    "make", [lambda **given: TTSpec.low_rank(6, 8, 2, **given),
             lambda **given: TTSpec((2, 3), (4, 2), (3,), **given),
             lambda **given: TTSpec.block((2, 3), (4, 2), 2, experts=2, **given)]
)  # fmt: skip
def test_a_spec_says_how_its_entries_are_stored(make: object) -> None:
    plain, stored = make(), make(storage="int8")  # type: ignore[operator]
    assert "storage" not in repr(plain)
    assert "storage" not in plain.to_dict()
    assert plain != stored == Spec.from_dict(stored.to_dict())
    assert stored.with_ranks((1,)).storage == stored.single.storage == "int8"
    assert eval(repr(stored), {"TTSpec": TTSpec}) == stored
    assert plain.bytes(4) == 4 * stored.bytes(4)


# -------------------------------------------------------------------------------------- the house

CONSTANTS = {"DENSE", "LOW_RANK", "SHARED", "TT", "BLOCK"}


def test_names_of_formats_are_compared_in_formats_alone() -> None:
    """And where a spec tells which it is."""
    for name, path in modules().items():
        if folder_of(path) == "formats" or name == "tensorize.ir.spec":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                inside = list(ast.walk(node))
                used = {n.id for n in inside if isinstance(n, ast.Name)}
                said = {n.value for n in inside if isinstance(n, ast.Constant)}
                asked = {n.attr for n in inside if isinstance(n, ast.Attribute)}
                assert not used & CONSTANTS, f"{name}:{node.lineno}"
                of_format = asked & {"format", "formats"} and said & set(NAMES)
                assert not of_format, f"{name}:{node.lineno}"
