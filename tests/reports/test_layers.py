"""Weights folded by layer: nothing is left out, and nothing shown twice."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from tensorize.reports.layers import folded, hint, label, place


@dataclass(frozen=True)
class Kept:
    name: str
    format: str = "low_rank"
    ranks: tuple[int, ...] = (8,)
    share: float = 0.5
    precision: str | None = None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.12.mlp.up_proj.weight", ("model.layers.*.mlp.up_proj", 12)),
        ("lm_head.weight", ("lm_head", None)),
        ("h.3.experts.7.w1", ("h.*.experts.7.w1", 3)),
        ("0.weight", ("0", None)),
    ],
)
def test_the_first_number_of_a_name_is_its_layer(name: str, expected: tuple[str, int]) -> None:
    assert place(name) == expected


def test_every_weight_has_one_place() -> None:
    names = ["embed.weight"]
    names += [f"m.h.{k}.b.weight" for k in (0, 1, 10)]
    names += [f"m.h.{k}.a.weight" for k in (1, 10)]
    found = folded([Kept(name) for name in names])
    assert found.numbers == (0, 1, 10)
    assert [kind.name for kind in found.kinds] == ["embed", "m.h.*.b", "m.h.*.a"]
    assert found.kinds[2].by_layer[0] is None  # there is no m.h.0.a
    assert sorted(w.name for kind in found.kinds for w in kind.weights) == sorted(names)
    assert found.prefix == "m.h.*."


def test_without_layers_there_is_one_column() -> None:
    found = folded([Kept("first.weight"), Kept("second.weight")])
    assert found.numbers == ()
    assert found.some_alone
    assert found.prefix == ""


def test_a_cell_says_ranks_else_bits_else_dense() -> None:
    assert label(Kept("w", ranks=(8, 12))) == "12"
    assert label(Kept("w", "dense", (), 1.0, "int4")) == "int4"
    assert label(Kept("w", "dense", (), 1.0)) == "d"
    assert hint(Kept("w", ranks=(8,))) == "w: low rank 8, 50.0 % kept"
