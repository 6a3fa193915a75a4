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
from tensorize.base.records import checksum
from tensorize.store.contents import SiteRecord, aliases_of, dtype_name, site_records
from tensorize.store.manifest import PLAIN_VERSION, damage_named, sites_from_list, sites_to_list
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
        for key, value in _without_marks(config).items()
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


def save_configs(
    model: nn.Module, directory: Path, weights: str, version: int, draft: Path
) -> dict[str, str]:
    """``config.json`` and ``generation_config.json``, for ``from_pretrained`` and other tools; what
    is in them, by their names. ``version`` is that of the artefact's format."""
    config: Any = copy.deepcopy(model.config)
    config.quantization_config = {
        **factors_to_dict(model),
        "format_version": version,
        "weights": weights,
    }
    # Where transformers alone would look for the weights: it says that there is no such file.
    config.transformers_weights = NEEDS_US
    return _written(model, config, directory, draft)


def save_plain(
    model: nn.Module, directory: Path, draft: Path, quantization: Mapping[str, Any]
) -> dict[str, str]:
    """The same for readers that are not ours, with what they are to know of the weights."""
    config: Any = copy.deepcopy(model.config)
    unmark(config)
    config.quantization_config = dict(quantization)
    return _written(model, config, directory, draft)


def _written(model: nn.Module, config: Any, directory: Path, draft: Path) -> dict[str, str]:
    config.architectures = [class_path(model).rpartition(":")[2]]
    config.dtype = dtype_name(next(model.parameters()).dtype)
    texts = {"config.json": config.to_json_string()}
    generation: Any = getattr(model, "generation_config", None)
    if generation is not None:
        texts["generation_config.json"] = generation.to_json_string()
    for name, text in texts.items():
        draft.write_text(text, encoding="utf-8")
        into_place(draft, directory / name)
    return texts


# ------------------------------------------------------------------------- what transformers reads

METHOD = "tensorize"


NEEDS_US = "the weights were compressed by tensorize: run `import tensorize` before from_pretrained"
_EXPERTS, _FUSION = "experts_implementation", "fusion_config"
_MARKS: dict[str, Any] = {_EXPERTS: NEEDS_US, _FUSION: {NEEDS_US: True}}
"""transformers warns of a quantization that it does not know, and goes on with dense weights that
it makes up. Of these entries it knows the names and not the values: then it refuses, and says the
value. Two, as either is one that a caller may give himself, or that a version does not read."""


def factors_to_dict(model: nn.Module) -> dict[str, Any]:
    """What was factorized in a model, as transformers keeps it in a configuration."""
    found = {"sites": sites_to_list(site_records(model)), "aliases": aliases_of(model)}
    known = {"quant_method": METHOD, "format_version": PLAIN_VERSION}
    return {**known, **found, "sha256": checksum(found)}


def factors_from_dict(
    sites: Any, aliases: Any, sha256: Any
) -> tuple[tuple[SiteRecord, ...], dict[str, str]]:
    """The sites and the aliases that ``factors_to_dict`` wrote, checked.

    Raises:
        CheckpointError: they are damaged.
    """
    with damage_named(Path("config.json")):
        if sha256 not in (None, checksum({"sites": sites, "aliases": aliases})):
            raise ValueError("its sites are not what their sha256 says")
        if not all(isinstance(name, str) for pair in aliases.items() for name in pair):
            raise TypeError("aliases are names")
        return sites_from_list(sites), aliases


def mark(config: Any) -> None:
    """Make transformers without tensorize refuse a configuration, and the parts of it."""
    for part in _parts(config):
        for name, value in _MARKS.items():
            if getattr(part, name, None) is None:
                setattr(part, name, copy.copy(value))


def unmark(config: Any) -> None:
    """Take that away again."""
    for part in _parts(config):
        for name, value in _MARKS.items():
            if vars(part).get(name) == value:
                delattr(part, name)
        if getattr(part, f"_{_EXPERTS}", None) == NEEDS_US:  # what transformers read of it
            setattr(part, f"_{_EXPERTS}", None)


def _parts(config: Any) -> Iterator[Any]:
    yield config
    for name in getattr(config, "sub_configs", ()):
        if (part := getattr(config, name, None)) is not None:
            yield from _parts(part)


def _without_marks(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_marks(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if _MARKS.get(key) != value
    }


def note_factors(model: nn.Module) -> None:
    """Keep in the configurations what was factorized, so that ``save_pretrained`` writes it too.

    A model that some other method quantized keeps the note of that one.
    """
    for part in _huggingface_models(model):
        noted = getattr(part.config, "quantization_config", None)
        if noted is None or _is_ours(noted):
            part.config.quantization_config = factors_to_dict(part)  # type: ignore[union-attr]
            mark(part.config)


def forget_factors(model: nn.Module) -> None:
    """Take the note away again."""
    for part in _huggingface_models(model):
        if _is_ours(getattr(part.config, "quantization_config", None)):
            del part.config.quantization_config  # type: ignore[union-attr]
            unmark(part.config)


def _is_ours(noted: Any) -> bool:
    return isinstance(noted, Mapping) and noted.get("quant_method") == METHOD


def _huggingface_models(model: nn.Module) -> Iterator[nn.Module]:
    """The outermost ones: a part of another model goes by that one's configuration."""
    if is_huggingface(model):
        yield model
        return
    for child in model.children():
        yield from _huggingface_models(child)
