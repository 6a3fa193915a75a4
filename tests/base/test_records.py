"""The codec: frozen records as JSON values, and back."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

import pytest

from tensorize.base.records import checksum, decode, encode, parse, plain, record


@dataclass(frozen=True)
class Inner:
    name: str
    sizes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Named:
    """Says itself what it is as JSON."""

    text: str

    def to_dict(self) -> dict[str, str]:
        return {"upper": self.text.upper()}

    @classmethod
    def from_dict(cls, data: dict[str, str]) -> Named:
        return cls(data["upper"].lower())


@dataclass(frozen=True)
class Outer:
    inner: tuple[Inner, ...]
    pair: tuple[str, Named] | None = None
    low: float | None = None
    carried: Any = field(default=None, compare=False)


FULL = Outer((Inner("a", (1, 2)), Inner("b")), ("x", Named("spec")), -math.inf, carried=object())


def test_a_record_comes_back_from_json() -> None:
    text = json.dumps(encode(FULL), allow_nan=False)
    assert record(Outer, decode(json.loads(text))) == FULL
    assert record(Outer, json.loads(json.dumps(plain(FULL)))) == FULL


def test_a_record_is_its_fields_but_for_what_it_carries() -> None:
    assert plain(FULL) == {
        "inner": [{"name": "a", "sizes": [1, 2]}, {"name": "b", "sizes": []}],
        "pair": ["x", {"upper": "SPEC"}],
        "low": -math.inf,
    }


def test_fields_come_by_name_or_in_their_order_and_may_be_left_out() -> None:
    assert record(Outer, {"inner": [["a", [1, 2]], {"name": "b"}]}) == Outer(FULL.inner)


@pytest.mark.parametrize(
    "data", [{"name": "a", "odd": 1}, {"sizes": []}, {"name": "a", "sizes": 3}, ["a", [1], 2]]
)
def test_what_is_no_such_record_is_refused(data: Any) -> None:
    with pytest.raises((KeyError, TypeError)):
        record(Inner, data)


@dataclass(frozen=True)
class Figures:
    count: int = 0
    share: float = 0.0
    names: tuple[str, ...] = ()
    fine: bool = True


@pytest.mark.parametrize(
    "data",
    [
        {"count": True},
        {"count": 1.0},
        {"count": "1"},
        {"count": 2**63},
        {"share": "x"},
        {"share": True},
        {"share": 10**400},
        {"names": "abc"},
        {"names": [1]},
        {"names": {"a": 1}},
        {"fine": 1},
        {"fine": None},
        "text",
        5,
    ],
)
def test_every_value_has_the_type_of_its_field(data: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        record(Figures, data)
    assert record(Figures, {"count": 1, "share": 2, "names": ["a"]}) == Figures(1, 2, ("a",))


@pytest.mark.parametrize(
    "text", ['{"a": 1, "a": 2}', "NaN", "[" * 100_000, "[1, NaN]", "", "{", '{"a": 1} x']
)
def test_json_is_strict(text: str) -> None:
    with pytest.raises(ValueError, match=r"twice|NaN|nested|Expecting|Extra"):
        parse(text)
    assert parse('{"a": [1, Infinity]}') == {"a": [1, math.inf]}


def test_a_checksum_is_of_values_and_not_of_their_order() -> None:
    assert checksum({"a": 1, "b": [2]}) == checksum({"b": [2], "a": 1})
    assert len({checksum(v) for v in (1, 1.0, "1", True, None, [1], {"1": 1})}) == 7
