"""Build a Hugging Face model from its config, without making its dense weights."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from tensorize.base.errors import CaptureError, CheckpointError
from tensorize.base.records import decode
from tensorize.store.contents import PARAMETER, dtype_name, dtype_of
from tensorize.store.manifest import Manifest, damage_named, fail
from tensorize.store.transformers_config import IMPLEMENTATIONS


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
            for name, known in IMPLEMENTATIONS.items():
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
        with torch.random.fork_rng(devices=[]), no_init(), ParametersOnMeta(matrices):
            yield
    finally:
        torch.set_default_dtype(before)


_MADE_FOR_PARAMETERS = (torch.empty,)
_FACTORIES = (torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.normal)


class ParametersOnMeta(TorchFunctionMode):
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
