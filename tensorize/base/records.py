"""Frozen records to plain JSON values, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def encode(value: Any) -> Any:
    """``value`` as strict JSON data: tuples as lists, floats that JSON does not know as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if isinstance(value, Mapping):
        return {key: encode(item) for key, item in value.items()}
    return [encode(item) for item in value] if isinstance(value, (list, tuple)) else value


def decode(value: Any, mark: str = "float") -> Any:
    """JSON data with their floats: ``{mark: "inf"}`` stands for one that JSON has no number for."""
    if isinstance(value, Mapping):
        if value.keys() == {mark}:
            return float(value[mark])
        return {key: decode(item, mark) for key, item in value.items()}
    return [decode(item, mark) for item in value] if isinstance(value, list) else value


def as_tuples(data: dict[str, Any], *names: str) -> dict[str, Any]:
    return {k: tuple(v) if k in names and v is not None else v for k, v in data.items()}
