"""Hugging Face models: described in a manifest, saved with their configurations, built again.

Their configurations tell transformers what was factorized, under ``quantization_config``, so that
``from_pretrained`` builds the model again (``pretrained.py``) from what ``tensorize.save`` or
``save_pretrained`` wrote. transformers is imported only where a model is built. No code is taken
from an artefact, and the network is never asked.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from tensorize.base.errors import CheckpointError
from tensorize.base.files import into_place
from tensorize.store.contents import aliases_of, dtype_name, site_records
from tensorize.store.manifest import FORMAT_VERSION, sites_to_list
from tensorize.weight.become import dense_class

# The weights of a checkpoint that is not ours.
_DENSE = ("model*.safetensors", "pytorch_model*.bin", "*.safetensors.index.json")
# Those that every machine has; the others are chosen anew where the model is loaded.
IMPLEMENTATIONS = {"attn": ("eager", "sdpa"), "experts": ("eager", "batched_mm", "grouped_mm")}


# ------------------------------------------------------------------------------------- describing


def class_path(model: nn.Module) -> str:
    """``"module:class"`` of a model, as it was before its weights were factorized."""
    kind = dense_class(model)
    return f"{kind.__module__}:{kind.__qualname__}"


def is_huggingface(model: nn.Module) -> bool:
    config = getattr(model, "config", None)
    return hasattr(model, "save_pretrained") and hasattr(config, "to_json_string")


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
            name: getattr(config, f"_{name}_implementation", None) for name in IMPLEMENTATIONS
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
