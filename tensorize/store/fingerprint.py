"""Hashes by which models, batches and settings are told apart."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tensorize.base.tensors import plain_parts, raw_bytes
from tensorize.ir.sites import Batch


def fingerprint(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """A hash of the names, shapes, dtypes and values of parameters, as ``named_parameters``."""
    digest = hashlib.sha256()
    for name, parameter in parameters:
        _add(digest, f"{name} {tuple(parameter.shape)} {parameter.dtype};", parameter)
    return digest.hexdigest()


def identity(*parts: str | bytes | nn.Module | Batch) -> str:
    """A hash of all that something depends on: texts, the content of batches, and of models what
    they compute with their weights, and the version of the library that they come from."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, nn.Module):
            _add_model(digest, part)
        elif isinstance(part, Batch):
            leaves, structure = pytree.tree_flatten((part.args, dict(part.kwargs)))
            digest.update(str(structure).encode())
            for leaf in leaves:
                if isinstance(leaf, Tensor):
                    _add(digest, f"{leaf.dtype}{tuple(leaf.shape)}", leaf)
                else:
                    digest.update(repr(leaf).encode())
        else:
            digest.update(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()


def _add_model(digest: Any, model: nn.Module) -> None:
    for name, module in model.named_modules():
        kind = type(module)
        digest.update(f"{name} {kind.__module__}.{kind.__qualname__};".encode())
    for name, buffer in model.named_buffers():
        _add(digest, f"{name}{buffer.dtype}{tuple(buffer.shape)}", buffer)
    config = getattr(model, "config", None)
    if hasattr(config, "to_json_string"):
        digest.update(str(config.to_json_string()).encode())  # type: ignore[union-attr]
    home = sys.modules.get(type(model).__module__.partition(".")[0])
    digest.update(repr(getattr(home, "__version__", None)).encode())


def _add(digest: Any, text: str, tensor: Tensor) -> None:
    digest.update(text.encode())
    for part in plain_parts(tensor):
        digest.update(raw_bytes(part))
