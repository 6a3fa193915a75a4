"""Hashes by which models and batches are told apart."""

from __future__ import annotations

import hashlib
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tensorize.base.tensors import plain_parts, raw_bytes
from tensorize.ir.sites import Batch


def fingerprint(model: nn.Module) -> str:
    """A hash of every parameter's name, shape, dtype and values."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        hash_tensor(digest, name, parameter.detach())
    return digest.hexdigest()


def hash_tensor(digest: Any, name: str, tensor: Tensor) -> None:
    """Add one parameter to a hash: its name, shape, dtype and values."""
    digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
    for part in plain_parts(tensor):
        digest.update(raw_bytes(part))


def hash_model(digest: Any, model: torch.nn.Module) -> None:
    """What a model computes with its weights, and the version of the library that it comes from."""
    for name, module in model.named_modules():
        kind = type(module)
        digest.update(f"{name} {kind.__module__}.{kind.__qualname__};".encode())
    for name, buffer in model.named_buffers():
        digest.update(name.encode())
        _hash_values(digest, buffer)
    config = getattr(model, "config", None)
    if hasattr(config, "to_json_string"):
        digest.update(str(config.to_json_string()).encode())  # type: ignore[union-attr]
    home = sys.modules.get(type(model).__module__.partition(".")[0])
    digest.update(repr(getattr(home, "__version__", None)).encode())


def hash_batch(digest: Any, batch: Batch) -> None:
    """Put the content of a batch into a hash."""
    leaves, structure = pytree.tree_flatten((batch.args, dict(batch.kwargs)))
    digest.update(str(structure).encode())
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            _hash_values(digest, leaf)
        else:
            digest.update(repr(leaf).encode())


def _hash_values(digest: Any, tensor: Tensor) -> None:
    digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(raw_bytes(tensor))
