"""The one codec between frozen records and JSON values."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from itertools import repeat
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

BAD_DATA = (LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)
"""What readers of JSON values raise for what they do not expect."""
_LARGEST = 2**63 - 1
_SCALARS: dict[Any, tuple[type, ...]] = {
    bool: (bool,),
    int: (int,),
    float: (float, int),
    str: (str,),
}

_T = TypeVar("_T")


def by_field(record: Any) -> dict[str, Any]:
    """The fields of a record, but for those that are no part of its equality."""
    return {f.name: getattr(record, f.name) for f in fields(record) if f.compare}


def plain(value: Any) -> Any:
    """``value`` as JSON values: a record as its ``to_dict`` says, else by its fields."""
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if is_dataclass(value):
        return plain(by_field(value))
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def encode(value: Any) -> Any:
    """``plain``, and strict: floats that JSON does not know as text."""
    return _marked(plain(value))


def _marked(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if isinstance(value, dict):
        return {key: _marked(item) for key, item in value.items()}
    return [_marked(item) for item in value] if isinstance(value, list) else value


def decode(value: Any, mark: str = "float") -> Any:
    """JSON data with their floats: ``{mark: "inf"}`` stands for one that JSON has no number for."""
    if isinstance(value, Mapping):
        if value.keys() == {mark}:
            return float(value[mark])
        return {key: decode(item, mark) for key, item in value.items()}
    return [decode(item, mark) for item in value] if isinstance(value, list) else value


def parse(text: str) -> Any:
    """JSON, and strict: no name twice in an object, no NaN, nothing nested without end.

    Raises:
        ValueError: it is none.
    """
    try:
        return json.loads(text, object_pairs_hook=_once_each, parse_constant=_infinity)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _infinity(name: str) -> float:
    if name == "NaN":
        raise ValueError("it holds NaN")
    return float(name)


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is there twice")
    return found


def checksum(data: Any) -> str:
    """The sha256 of JSON data, whatever the order of their names."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def record(kind: type[_T], data: Any) -> _T:
    """The record of a kind whose fields, by name or in their order, are JSON values.

    Every value has the type that its field says, down to the last one: no bool is a number, no
    float an int, and no int has more than 63 bits.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: the data are of no such record.
    """
    kinds = _kinds(kind)
    if isinstance(data, Mapping):
        return kind(**{name: _typed(kinds.get(name), value, name) for name, value in data.items()})
    _check(data, (list, tuple), kind.__name__)
    known = zip(kinds.values(), data, kinds, strict=False)
    return kind(*(_typed(*each) for each in known), *data[len(kinds) :])


@cache
def _kinds(kind: type) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {f.name: hints[f.name] for f in fields(kind)}  # type: ignore[arg-type]


def _typed(kind: Any, data: Any, name: str) -> Any:
    if get_origin(kind) is UnionType:
        return None if data is None else _typed(get_args(kind)[0], data, name)
    if get_origin(kind) is tuple:
        inner = get_args(kind)
        _check(data, (list, tuple), name)
        each = repeat(inner[0], len(data)) if inner[-1] is ... else inner
        return tuple(_typed(*pair, name) for pair in zip(each, data, strict=True))
    if kind in _SCALARS:
        return _scalar(kind, data, name)
    if hasattr(kind, "from_dict"):
        return kind.from_dict(data)
    return record(kind, data) if is_dataclass(kind) else data  # type: ignore[arg-type]


def _scalar(kind: type, data: Any, name: str) -> Any:
    _check(data, _SCALARS[kind], name)
    if isinstance(data, int) and abs(data) > _LARGEST:
        raise ValueError(f"{name} is an int of {data.bit_length()} bits")
    return data


def _check(data: Any, kinds: tuple[type, ...], name: str) -> None:
    if type(data) not in kinds:
        raise TypeError(f"{name} is a {type(data).__name__}, and no {kinds[0].__name__}")
