"""A Hugging Face checkpoint directory, read one tensor at a time.

The model is built on the meta device from ``config.json``, as ``from_pretrained`` would build it:
the same dtypes, ties, renamings, and fused stacks of experts. Its weights are then made of the
checkpoint's tensors when they are asked for, each in memory of its own that is given up after use;
no shard is ever held. The network is never asked, and no code is taken from the directory.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tensorize.base.errors import AnalysisError, CaptureError
from tensorize.base.tensors import is_finite
from tensorize.store.contents import PARAMETER, slots_of, transient_buffers
from tensorize.store.fingerprint import fingerprint
from tensorize.store.manifest import MANIFEST
from tensorize.store.transformers_build import ParametersOnMeta, architecture
from tensorize.weight.install import owner_of

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_WHOLE = "compress it without streaming: the model is then loaded by transformers, whole"


@dataclass(frozen=True)
class Recipe:
    """How a tensor of the model is made: of the checkpoint's keys, as (pattern, key).

    ``convert`` is transformers' converter for a tensor that is stored in another form (experts one
    by one); None where it is stored as it is.
    """

    parts: Sequence[tuple[str, str]]
    convert: Any = None


@dataclass(frozen=True)
class Checkpoint:
    """A model on the meta device, and where the values of its weights are.

    ``entries`` are those of its state dict, on meta, ``recipes`` say of which keys each is made,
    ``files`` which shard holds a key. ``unused`` are keys that the model has no place for.
    """

    directory: Path
    model: Any
    files: Mapping[str, Path]
    entries: Mapping[str, Tensor]
    recipes: Mapping[str, Recipe]
    unused: tuple[str, ...]

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of the checkpoint."""
        if len(self.unused) == 0:
            return ()
        names, more = ", ".join(self.unused[:3]), len(self.unused) - 3
        said = f" and {more} more" if more > 0 else ""
        return (f"left out, as the model has no place for it: {names}{said}",)

    def shard(self, name: str) -> str:
        """The file that holds (the first part of) an entry: what to sort by to read in order."""
        return self.files[self.recipes[name].parts[0][1]].name

    def read(self, name: str) -> Tensor:
        """The values of a parameter or a buffer, in the model's dtype and memory of its own.

        Raises:
            CaptureError: the shard cannot be read, or holds another shape.
        """
        recipe, blank = self.recipes[name], self.entries[name]
        if recipe.convert is None:
            value = self._tensor(recipe.parts[0][1])
        else:
            value = self._converted(name, recipe, blank.dtype)
        if tuple(value.shape) != tuple(blank.shape):
            raise CaptureError(
                f"the checkpoint holds shape {tuple(value.shape)}, and config.json asks for "
                f"{tuple(blank.shape)}",
                site=name,
                way_out="check that both are of one model",
            )
        return value.to(blank.dtype)

    def value(self, name: str) -> Tensor:
        """``read``, also of a buffer that is computed and in no checkpoint."""
        if name in self.recipes:
            return self.read(name)
        return self._computed[name].clone()

    @cached_property
    def _computed(self) -> dict[str, Tensor]:
        """The buffers that are no part of the state dict, as the architecture computes them."""
        model = self.model
        shapes = {tuple(p.shape) for p in model.parameters() if p.dim() > 1}
        with _built_as(model.config.dtype), ParametersOnMeta(shapes):
            twin = type(model)(copy.deepcopy(model.config))
        return {slot.key: slot.tensor for slot in transient_buffers(twin)}

    def fingerprint(self, tell: Callable[[int, int], None]) -> str:
        """What ``analysis.fingerprint`` says of the model once loaded; checks that all is finite.

        Raises:
            AnalysisError: a weight holds NaN or an infinity.
        """
        return fingerprint(self._finite(tell))

    def _finite(self, tell: Callable[[int, int], None]) -> Iterator[tuple[str, Tensor]]:
        parameters = list(self.model.named_parameters())
        for done, (name, _) in enumerate(parameters):
            tell(done, len(parameters))
            value = self.read(name)
            if not is_finite(value):
                raise AnalysisError(
                    "the parameter holds NaN or infinite values",
                    site=name,
                    way_out="repair the checkpoint: no factorization of such a weight means "
                    "anything",
                )
            yield name, value
        tell(len(parameters), len(parameters))

    def _tensor(self, key: str) -> Tensor:
        path = self.files[key]
        try:
            # Opened for this tensor alone: what is mapped of a file counts as memory.
            with safe_open(path, framework="pt", device="cpu") as file:
                return file.get_tensor(key).clone()
        except (OSError, SafetensorError) as error:
            raise CaptureError(
                f"{path} cannot be read: {error}", site=key, way_out="fetch the shard again"
            ) from error

    def _converted(self, name: str, recipe: Recipe, dtype: torch.dtype) -> Tensor:
        converter = copy.deepcopy(recipe.convert)
        first = name
        for pattern, key in recipe.parts:
            value = self._tensor(key).to(dtype)
            converter.add_tensor(first, key, pattern, lambda value=value: value)
        made = converter.convert(first, model=self.model, config=self.model.config)
        value = made.get(name)
        value = value[0] if isinstance(value, list) else value
        if not isinstance(value, Tensor):
            raise CaptureError(
                f"transformers makes {', '.join(made) or 'nothing'} of what is stored for it",
                site=name,
                way_out=_WHOLE,
            )
        return value


def open_checkpoint(directory: Path) -> Checkpoint:
    """The checkpoint in a directory; nothing but headers is read.

    Raises:
        CaptureError: it is no checkpoint of safetensors that transformers knows, or some of the
            model's weights are not in it.
    """
    files = _files(directory)
    tensors = _headers(files)
    model = _blank_model(directory, tensors)
    recipes, unused = _recipes(model, tensors)
    found = Checkpoint(directory, model, files, _entries(model), recipes, unused)
    _untie_what_differs(found)
    return replace(found, entries=_entries(model), recipes=_with_ties(found))


def _entries(model: nn.Module) -> dict[str, Tensor]:
    return {slot.key: slot.tensor for slot in slots_of(model)}


def _with_ties(found: Checkpoint) -> dict[str, Recipe]:
    """The recipes, with those of entries that the checkpoint holds under another name.

    Raises:
        CaptureError: an entry is in the checkpoint under none of its names.
    """
    recipes = dict(found.recipes)
    entries = _entries(found.model)
    stored = {id(entries[name]): recipe for name, recipe in recipes.items()}
    lacking = [name for name, tensor in entries.items() if id(tensor) not in stored]
    if lacking:
        more = f" and for {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise CaptureError(
            f"{found.directory} holds no values for it{more}", site=lacking[0], way_out=_WHOLE
        )
    return {name: recipes.get(name, stored[id(tensor)]) for name, tensor in entries.items()}


# ----------------------------------------------------------------------------------------- files


def _files(directory: Path) -> dict[str, Path]:
    """Every key of the checkpoint, and the file that holds it."""
    if not directory.is_dir():
        raise CaptureError(f"there is no directory {directory}", way_out="check the path")
    if (directory / MANIFEST).is_file():
        raise CaptureError(
            f"{directory} holds a model that is compressed already",
            way_out="compress the dense model again for another budget",
        )
    index = directory / INDEX
    if index.is_file():
        try:
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = {str(key): directory / str(name) for key, name in names.items()}
        except (ValueError, KeyError, AttributeError, OSError) as error:
            raise CaptureError(
                f"{index} is damaged: {type(error).__name__}: {error}", way_out="fetch it again"
            ) from error
        for path in sorted(set(files.values())):
            if path.parent != directory or not path.is_file():
                raise CaptureError(
                    f"{index} names {path.name}, which is not there", way_out="fetch that shard"
                )
        return files
    single = directory / SINGLE
    if not single.is_file():
        raise CaptureError(
            f"{directory} holds neither {INDEX} nor {SINGLE}",
            way_out="streaming reads safetensors; save the model with save_pretrained first",
        )
    return dict.fromkeys(_keys(single), single)


def _keys(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError) as error:
        raise CaptureError(f"{path} cannot be read: {error}", way_out="fetch it again") from error


def _headers(files: Mapping[str, Path]) -> dict[str, Tensor]:
    """Every tensor of the checkpoint on meta: its shape and dtype."""
    by_file: dict[Path, list[str]] = defaultdict(list)
    for key, path in files.items():
        by_file[path].append(key)
    found: dict[str, Tensor] = {}
    for path, keys in by_file.items():
        there = set(_keys(path))
        with safe_open(path, framework="pt") as file:
            for key in keys:
                if key not in there:
                    raise CaptureError(
                        f"{path} lacks it, and the index says it is there",
                        site=key,
                        way_out="fetch index and shards again",
                    )
                found[key] = torch.empty_like(file.get_tensor(key), device="meta")
    return found


# ----------------------------------------------------------------------------------------- model


def _blank_model(directory: Path, tensors: Mapping[str, Tensor]) -> Any:
    """The architecture of config.json on the meta device, in evaluation mode."""
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError as error:
        raise CaptureError(
            f"{directory} is a Hugging Face checkpoint, and transformers is not installed",
            way_out="pip install 'transformers>=5'",
        ) from error
    try:
        config = transformers.AutoConfig.from_pretrained(directory)
        if getattr(config, "quantization_config", None) is not None:
            raise CaptureError(f"{directory} is quantized", way_out="stream the dense checkpoint")
        kind = architecture(config)
        dtype = _dtype(config, tensors)
        config.dtype = dtype
        with _built_as(dtype), torch.device("meta"):
            model = kind(config)
        model.tie_weights()
        model.generation_config = _generation_config(transformers, directory, model)
        _keep_precision(model, dtype)
    except CaptureError:
        raise
    except Exception as error:  # transformers raises whatever its parts do
        raise CaptureError(
            f"transformers cannot build the model of {directory} without its weights: "
            f"{type(error).__name__}: {error}",
            way_out=_WHOLE,
        ) from error
    for slot in transient_buffers(model):
        slot.put(slot.tensor.to("meta"))
    return model.eval()


def _dtype(config: Any, tensors: Mapping[str, Tensor]) -> torch.dtype:
    """That of config.json, or of the first weight, as ``from_pretrained(dtype="auto")`` has it."""
    named = getattr(config, "dtype", None)
    if isinstance(named, torch.dtype):
        return named
    floating = (tensor.dtype for tensor in tensors.values() if tensor.is_floating_point())
    return next(floating, torch.get_default_dtype())


@contextlib.contextmanager
def _built_as(dtype: torch.dtype) -> Iterator[None]:
    """Build an architecture in a dtype, without initial values."""
    initialization: Any = importlib.import_module("transformers.initialization")
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.random.fork_rng(devices=[]), initialization.no_init_weights():
            yield
    finally:
        torch.set_default_dtype(before)


def _generation_config(transformers: Any, directory: Path, model: Any) -> Any:
    """That of the directory, as ``from_pretrained`` has it."""
    if not model.can_generate():
        return getattr(model, "generation_config", None)
    kind = transformers.GenerationConfig
    if (directory / "generation_config.json").is_file():
        return kind.from_pretrained(directory)
    return kind.from_pretrained(directory, config_file_name="config.json", _from_model_config=True)


def _keep_precision(model: Any, dtype: torch.dtype) -> None:
    """Parameters that the architecture keeps in float32, as ``from_pretrained`` has them."""
    plan: Mapping[str, torch.dtype] = model._get_dtype_plan(dtype)
    for slot in list(slots_of(model)):
        kept = next((d for part, d in plan.items() if re.search(part, slot.key)), None)
        if kept is not None and slot.kind == PARAMETER:
            grad = slot.tensor.requires_grad
            slot.put(nn.Parameter(slot.tensor.to(kept), requires_grad=grad))


# --------------------------------------------------------------------------------------- recipes


def _recipes(
    model: Any, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Recipe], tuple[str, ...]]:
    """Of which keys each entry of the state dict is made, by transformers' own tables."""
    loading: Any = importlib.import_module("transformers.core_model_loading")
    mapping: Any = importlib.import_module("transformers.conversion_mapping")
    transforms = mapping.get_model_conversion_mapping(model) or []
    converters = [t for t in transforms if isinstance(t, loading.WeightConverter)]
    renamings = [t for t in transforms if isinstance(t, loading.WeightRenaming)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    entries = _entries(model)
    prefix = model.base_model_prefix
    keys: dict[str, list[tuple[str, str]]] = defaultdict(list)
    used: dict[str, Any] = {}
    unused = []
    for key in sorted(tensors, key=lambda k: loading.dot_natural_key(k)):
        name, pattern = loading.rename_source_key(key, renamings, converters, prefix, entries)
        if name not in entries and key in entries:
            name, pattern = loading.rename_source_key(key, [], [], prefix, entries)
        if name not in entries:
            unused.append(key)
            continue
        keys[name].append((pattern or key, key))
        if pattern is not None:
            used[name] = by_pattern[pattern]
    recipes: dict[str, Recipe] = {}
    for name, parts in keys.items():
        converter = used.get(name)
        recipes[name] = Recipe(tuple(parts), converter)
        if converter is None:
            continue
        if len(converter.target_patterns) > 1:
            raise CaptureError(
                "one tensor of the checkpoint becomes several of the model",
                site=name,
                way_out=_WHOLE,
            )
    return recipes, tuple(unused)


def _untie_what_differs(found: Checkpoint) -> None:
    """Weights that the architecture ties and the checkpoint holds apart become two, if they differ.

    As ``from_pretrained`` has it; all it takes is to compare two tensors.
    """
    model = found.model
    for target, source in dict(getattr(model, "all_tied_weights_keys", None) or {}).items():
        if not (target in found.recipes and source in found.recipes):
            continue
        one, other = found.read(target), found.read(source)
        if torch.equal(one, other):
            continue
        owner, leaf = owner_of(model, target)
        old = getattr(owner, leaf)
        blank = torch.empty_like(old, device="meta")
        setattr(owner, leaf, nn.Parameter(blank, requires_grad=old.requires_grad))
        model.all_tied_weights_keys.pop(target)
