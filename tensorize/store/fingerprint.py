"""Hashes by which weights and texts are told apart."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from tensorize.base.tensors import plain_parts, raw_bytes


def fingerprint(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """A hash of the names, shapes, dtypes and values of parameters, as ``named_parameters``."""
    digest = hashlib.sha256()
    for name, parameter in parameters:
        _add(digest, f"{name} {tuple(parameter.shape)} {parameter.dtype};", parameter)
    return digest.hexdigest()


def identity(*parts: str | bytes) -> str:
    """A hash of texts."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()


def _add(digest: Any, text: str, tensor: Tensor) -> None:
    digest.update(text.encode())
    for part in plain_parts(tensor):
        digest.update(raw_bytes(part))
