"""Hugging Face models: described in a manifest, saved with their configurations, built again.

Their configurations tell transformers what was factorized, under ``quantization_config``, so that
``from_pretrained`` builds the model again (``pretrained.py``) from what ``tensorize.save`` or
``save_pretrained`` wrote. transformers is imported only where a model is built. No code is taken
from an artefact, and the network is never asked.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from tensorize.errors import CaptureError, CheckpointError
from tensorize.files import into_place
from tensorize.manifest import (
    FORMAT_VERSION,
    PARAMETER,
    Manifest,
    aliases_of,
    damage_named,
    dtype_name,
    dtype_of,
    fail,
    site_records,
    sites_to_list,
)
from tensorize.report import decode

# The weights of a checkpoint that is not ours.
_DENSE = ("model*.safetensors", "pytorch_model*.bin", "*.safetensors.index.json")
# Those that every machine has; the others are chosen anew where the model is loaded.
_IMPLEMENTATIONS = {"attn": ("eager", "sdpa"), "experts": ("eager", "batched_mm", "grouped_mm")}


# ------------------------------------------------------------------------------------- describing


def class_path(model: nn.Module) -> str:
    """``"module:class"`` of a model, as it was before its weights were factorized."""
    kind = getattr(model, "_dense_class", type(model))
    return f"{kind.__module__}:{kind.__qualname__}"


def is_huggingface(model: nn.Module) -> bool:
    config = getattr(model, "config", None)
    return hasattr(model, "save_pretrained") and hasattr(config, "to_json_string")


def architecture(config: Any) -> Any:
    """The class of transformers that a checkpoint's configuration names; a decoder where none is.

    Raises:
        CaptureError: transformers has no such class.
    """
    transformers: Any = importlib.import_module("transformers")
    names = getattr(config, "architectures", None) or ()
    kinds = [getattr(transformers, name) for name in names if hasattr(transformers, name)]
    if kinds:
        return kinds[0]
    decoders = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if names or type(config) not in decoders:
        raise CaptureError(
            f"transformers has no {' or '.join(names) or 'decoder'} for this {config.model_type} "
            "checkpoint",
            way_out="load the model with its own code, and pass it to tensorize.compile",
        )
    return decoders[type(config)]


def describe(model: nn.Module) -> dict[str, Any]:
    """The model's class, and for a Hugging Face model what it takes to build it again."""
    if not is_huggingface(model):
        return {"class": class_path(model), "huggingface": False}
    config: Any = model.config
    generation = getattr(model, "generation_config", None)
    # The configuration is kept here as well, complete: config.json alone could be of another save.
    return {
        "class": class_path(model),
        "huggingface": True,
        "config": _without_factors(json.loads(config.to_json_string(use_diff=False))),
        "generation_config": None
        if generation is None
        else json.loads(generation.to_json_string(use_diff=False)),
        "implementations": {
            name: getattr(config, f"_{name}_implementation", None) for name in _IMPLEMENTATIONS
        },
    }


def _without_factors(config: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value
        for key, value in config.items()
        if key != "quantization_config" or not _is_ours(value)
    }


def check_place(directory: Path) -> None:
    """Raises CheckpointError where a configuration would take the place of a dense checkpoint's."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    kept = [path.name for pattern in _DENSE for path in directory.glob(pattern)]
    if kept and not _is_ours(config.get("quantization_config")):
        raise CheckpointError(
            f"{directory} holds a dense checkpoint ({kept[0]}), whose config.json would be lost",
            way_out="choose another directory",
        )


def save_configs(model: nn.Module, directory: Path, weights: str, draft: Path) -> None:
    """``config.json`` and ``generation_config.json``, for ``from_pretrained`` and other tools."""
    config: Any = copy.deepcopy(model.config)
    config.architectures = [class_path(model).rpartition(":")[2]]
    config.dtype = dtype_name(next(model.parameters()).dtype)
    config.quantization_config = {**factors_to_dict(model), "weights": weights}
    config.to_json_file(draft)
    into_place(draft, directory / "config.json")
    generation: Any = getattr(model, "generation_config", None)
    if generation is not None:
        generation.to_json_file(draft)
        into_place(draft, directory / "generation_config.json")


# ------------------------------------------------------------------------- what transformers reads

METHOD = "tensorize"


def factors_to_dict(model: nn.Module) -> dict[str, Any]:
    """What was factorized in a model, as transformers keeps it in a configuration."""
    return {
        "quant_method": METHOD,
        "format_version": FORMAT_VERSION,
        "sites": sites_to_list(site_records(model)),
        "aliases": aliases_of(model),
    }


def note_factors(model: nn.Module) -> None:
    """Keep in the configurations what was factorized, so that ``save_pretrained`` writes it too.

    A model that some other method quantized keeps the note of that one.
    """
    for part in _huggingface_models(model):
        noted = getattr(part.config, "quantization_config", None)
        if noted is None or _is_ours(noted):
            part.config.quantization_config = factors_to_dict(part)  # type: ignore[union-attr]


def forget_factors(model: nn.Module) -> None:
    """Take the note away again."""
    for part in _huggingface_models(model):
        if _is_ours(getattr(part.config, "quantization_config", None)):
            del part.config.quantization_config  # type: ignore[union-attr]


def _is_ours(noted: Any) -> bool:
    return isinstance(noted, Mapping) and noted.get("quant_method") == METHOD


def _huggingface_models(model: nn.Module) -> Iterator[nn.Module]:
    """The outermost ones: a part of another model goes by that one's configuration."""
    if is_huggingface(model):
        yield model
        return
    for child in model.children():
        yield from _huggingface_models(child)


# --------------------------------------------------------------------------------------- building


def build(manifest: Manifest) -> nn.Module:
    """The architecture of a Hugging Face model with its parameters on the meta device."""
    about = manifest.model
    if not about.get("huggingface"):
        fail(
            manifest.path,
            f"is of a {about['class']}, and only Hugging Face models are built from an artefact",
            "pass model=, one of the same architecture; its weights are not needed, so it may be "
            "built under torch.device('meta')",
        )
    kind = _architecture(manifest)
    try:
        with damage_named(manifest.path):
            # transformers writes infinity and NaN as {"__float__": "Infinity"}.
            config = kind.config_class.from_dict(decode(about["config"], "__float__"))
            for name, known in _IMPLEMENTATIONS.items():
                chosen = about["implementations"].get(name)
                if chosen in known:
                    setattr(config, f"_{name}_implementation", chosen)
        with _quiet_build(manifest, getattr(config, "dtype", None)):
            model = kind(config)
        if about["generation_config"] is not None:
            generation: Any = type(model.generation_config)
            model.generation_config = generation.from_dict(dict(about["generation_config"]))
    except CheckpointError:
        raise
    except Exception as error:  # whatever an architecture raises on a config that does not fit it
        fail(
            manifest.path,
            f"describes a {about['class']} that this transformers cannot build: "
            f"{type(error).__name__}: {error}",
            "use the transformers version named in it, or pass model=",
        )
    return model


def _architecture(manifest: Manifest) -> Any:
    """The class to build; only transformers' own are taken by name."""
    home, _, name = manifest.model["class"].partition(":")
    if home.partition(".")[0] != "transformers":
        fail(
            manifest.path,
            f"is of a {manifest.model['class']}, which is not in transformers",
            "pass model=; it may be built under torch.device('meta')",
        )
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise CheckpointError(
            f"{manifest.path} is of a Hugging Face model, and transformers is not installed",
            way_out="pip install transformers",
        ) from error
    kind = getattr(transformers, name, None)
    if kind is None:
        with contextlib.suppress(ImportError):
            kind = getattr(importlib.import_module(home), name, None)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        fail(
            manifest.path,
            f"is of a {name}, which transformers {transformers.__version__} does not have",
            "use the transformers version named in it, or pass model=",
        )
    return kind


@contextlib.contextmanager
def _quiet_build(manifest: Manifest, dtype: Any) -> Iterator[None]:
    """Build without initial values, with parameters on meta, and leave the random state alone."""
    entries = manifest.contents.entries.values()
    shapes = {entry.shape for entry in entries if entry.kind == PARAMETER}
    shapes |= {site.shape for site in manifest.contents.sites}
    matrices = {shape for shape in shapes if len(shape) > 1}
    try:
        no_init: Any = importlib.import_module("transformers.initialization").no_init_weights
    except (ImportError, AttributeError):
        no_init = importlib.import_module("transformers.modeling_utils").no_init_weights
    before = torch.get_default_dtype()
    # As from_pretrained does; a model that is not in its config's dtype was not built with it.
    name = dtype_name(dtype)
    built_with = any(entry.dtype == name for entry in entries)
    if built_with and dtype_of(name).is_floating_point:
        torch.set_default_dtype(dtype_of(name))
    try:
        with torch.random.fork_rng(devices=[]), no_init(), _ParametersOnMeta(matrices):
            yield
    finally:
        torch.set_default_dtype(before)


_MADE_FOR_PARAMETERS = (torch.empty,)
_FACTORIES = (torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.normal)


class _ParametersOnMeta(TorchFunctionMode):
    """Sends to the meta device the tensors that become parameters, and keeps the rest real.

    Layers make their weights with ``torch.empty``. What other factories make is a weight where it
    has the shape of one; tables that are computed, such as those of rotary embeddings, stay real.
    """

    def __init__(self, shapes: set[tuple[int, ...]]) -> None:
        super().__init__()
        self._shapes = shapes

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _MADE_FOR_PARAMETERS or func in _FACTORIES:
            with contextlib.suppress(RuntimeError, TypeError):  # a generator of another device
                blank = func(*args, **{**kwargs, "device": "meta"})
                known = func in _MADE_FOR_PARAMETERS or tuple(blank.shape) in self._shapes
                if known and blank.is_floating_point():
                    return blank
        return func(*args, **kwargs)
