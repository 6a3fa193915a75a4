"""The codec: frozen records as JSON values, and back."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

import pytest

from tensorize.base.records import decode, encode, plain, record


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
