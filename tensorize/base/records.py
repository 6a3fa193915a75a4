"""The one codec between frozen records and JSON values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from itertools import repeat
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

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


def record(kind: type[_T], data: Any) -> _T:
    """The record of a kind whose fields, by name or in their order, are JSON values.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: the data are of no such record.
    """
    kinds = _kinds(kind)
    if isinstance(data, Mapping):
        return kind(**{name: _typed(kinds.get(name), value) for name, value in data.items()})
    known = zip(kinds.values(), data, strict=False)
    return kind(*(_typed(*pair) for pair in known), *data[len(kinds) :])


@cache
def _kinds(kind: type) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {f.name: hints[f.name] for f in fields(kind)}  # type: ignore[arg-type]


def _typed(kind: Any, data: Any) -> Any:
    if get_origin(kind) is UnionType:
        return None if data is None else _typed(get_args(kind)[0], data)
    if get_origin(kind) is tuple:
        inner = get_args(kind)
        each = repeat(inner[0], len(data)) if inner[-1] is ... else inner
        return tuple(_typed(*pair) for pair in zip(each, data, strict=True))
    if hasattr(kind, "from_dict"):
        return kind.from_dict(data)
    return record(kind, data) if is_dataclass(kind) else data  # type: ignore[arg-type]
