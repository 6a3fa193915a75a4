"""What the command line is given: options as text, SOURCE, and files of calibration data."""

from __future__ import annotations

import copy
import importlib
import json
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tensorize.base.errors import CaptureError
from tensorize.capture.batches import tokenized
from tensorize.capture.inputs import accepted_names, takes
from tensorize.cli.options import Dtype
from tensorize.cli.telling import say
from tensorize.store.load import load
from tensorize.store.manifest import MANIFEST
from tensorize.store.transformers_build import architecture


@dataclass(frozen=True)
class Loaded:
    """A model and what came with it; ``factory`` is the call that makes it, if one does."""

    model: nn.Module
    tokenizer: Any = None
    example_inputs: Any = None
    factory: str | None = None


def example_tokens(loaded: Loaded, length: int) -> Any:
    """Example inputs of a length: random tokens where the model takes some, else its own.

    The same every time; no longer than the model's table of positions.
    """
    config = getattr(loaded.model, "config", None)
    words = getattr(config, "vocab_size", None)
    if words is None or not takes(loaded.model, "input_ids"):
        return loaded.example_inputs
    length = min(length, getattr(config, "max_position_embeddings", None) or length)
    generator = torch.Generator().manual_seed(0)
    return {"input_ids": torch.randint(words, (1, length), generator=generator)}


def load_told(
    source: str, dtype: Dtype, calibration: Path | None, batch_size: int, max_length: int
) -> tuple[Loaded, list[Any] | str | None]:
    """The model and its calibration batches, said on the way."""
    say(f"loading {source}")
    loaded = load_source(source, dtype)
    if calibration is None:
        return loaded, None
    if str(calibration) == "self" and not calibration.exists():
        say("the model makes its own calibration data")
        return loaded, "self"
    batches = read_batches(calibration, loaded, batch_size, max_length)
    say(f"calibrating on {len(batches)} batches from {calibration}")
    return loaded, batches


def load_source(source: str, dtype: Dtype) -> Loaded:
    """The model that SOURCE names, with its tokenizer or example inputs where there are any.

    Raises:
        CaptureError: there is no such model, or it cannot be loaded.
    """
    if ":" in source and not os.path.exists(source):
        return _from_factory(source, dtype)
    return _from_hugging_face(source, dtype)


def _from_factory(source: str, dtype: Dtype) -> Loaded:
    """``package.module:factory``: a callable without arguments, or a module itself.

    Example inputs come with it as ``(model, example_inputs)`` or as ``factory.example_inputs``.
    """
    home, _, path = source.partition(":")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        target: Any = importlib.import_module(home)
        for part in path.split("."):
            target = getattr(target, part)
        call = callable(target) and not isinstance(target, nn.Module)
        made = target() if call else target
        inputs = getattr(target, "example_inputs", None)
        inputs = inputs() if callable(inputs) else inputs
    except Exception as error:  # whatever the caller's own code raises
        raise CaptureError(
            f"{source} cannot be called: {type(error).__name__}: {error}",
            way_out="SOURCE is package.module:factory, importable from here, where factory() "
            "gives a torch.nn.Module",
        ) from error
    if isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module):
        made, inputs = made
    if not isinstance(made, nn.Module):
        raise CaptureError(
            f"{source} gave a {type(made).__name__}, not a torch.nn.Module",
            way_out="return the model, or (model, example_inputs)",
        )
    if dtype is not Dtype.auto:
        made = made.to(getattr(torch, dtype.value))
    return Loaded(made, None, inputs, f"{path}()" if call else path)


def _from_hugging_face(source: str, dtype: Dtype) -> Loaded:
    local = Path(source).expanduser()
    if not local.is_dir() and (local.is_absolute() or source.startswith((".", "~"))):
        raise CaptureError(f"there is no directory {source}", way_out="check the path")
    if (local / MANIFEST).is_file():
        raise CaptureError(
            f"{source} holds a model that is compressed already",
            way_out="tensorize report shows it; compress the dense model again for another budget",
        )
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise CaptureError(
            f"{source} is taken as a Hugging Face model, and transformers is not installed",
            way_out="pip install transformers, or name a package.module:factory",
        ) from error
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    where = str(local) if local.is_dir() else source
    try:
        config = transformers.AutoConfig.from_pretrained(where)
        model = architecture(config).from_pretrained(where, dtype=dtype.value)
    except CaptureError:
        raise
    except Exception as error:  # transformers raises whatever its parts do
        raise CaptureError(
            f"transformers cannot load {source}: {type(error).__name__}: {error}",
            way_out="check the directory or id; a model of your own is named by "
            "package.module:factory",
        ) from error
    return Loaded(model, tokenizer_of(where))


def tokenizer_of(source: str) -> Any:
    """The tokenizer of a Hugging Face directory or id; None where there is none (vision, audio)."""
    try:
        return importlib.import_module("transformers").AutoTokenizer.from_pretrained(source)
    except Exception:  # whatever a directory without one makes transformers raise
        return None


def load_compressed(directory: str, dense: Loaded) -> nn.Module:
    """The compressed model in a directory; one of the caller's own code fills a copy of ``dense``.

    Raises:
        CheckpointError: there is none, it is damaged, or it was not made from this model.
    """
    return load(directory, None if dense.factory is None else copy.deepcopy(dense.model))


# --------------------------------------------------------------------------------- calibration


def read_batches(
    path: Path, loaded: Loaded, batch_size: int, max_length: int, *, labels: bool = False
) -> list[Any]:
    """Batches of a text file or of named tensors, as the model's forward takes them.

    ``labels``: they may hold labels as well, whether forward takes them or not.

    Raises:
        CaptureError: there is no such file, it is of another kind, or it does not fit the model.
    """
    if not path.is_file():
        raise CaptureError(f"there is no file {path}", way_out="check the path")
    if path.suffix == ".safetensors":
        return _tensor_batches(path, loaded.model, batch_size, {"labels"} if labels else set())
    return _text_batches(path, loaded, batch_size, max_length)


def _tensor_batches(path: Path, model: nn.Module, batch_size: int, more: set[str]) -> list[Any]:
    """Named inputs, cut along their first axis; one tensor of any name is the only input.

    ``more`` names what may be there beside them.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CaptureError(
            f"{path} is no safetensors file: {error}", way_out="write it with safetensors.torch"
        ) from error
    lengths = {name: len(t) if t.dim() else 0 for name, t in tensors.items()}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise CaptureError(
            f"the tensors of {path} have different numbers of samples: {lengths}",
            way_out="give all of them the same first axis, the sample",
        )
    accepted = accepted_names(model)
    positional = len(tensors) == 1 and accepted is not None and not accepted & tensors.keys()
    count = next(iter(lengths.values()))
    cuts = [slice(start, start + batch_size) for start in range(0, count, batch_size)]
    if positional:
        (only,) = tensors.values()
        return [(only[cut],) for cut in cuts]
    if unknown := {name for name in tensors.keys() - more if not takes(model, name)}:
        raise CaptureError(
            f"{path} holds {', '.join(sorted(unknown))}, which the model's forward does not take",
            way_out=f"name the tensors as its arguments: {', '.join(sorted(accepted or ()))}",
        )
    return [{name: tensor[cut] for name, tensor in tensors.items()} for cut in cuts]


def read_questions(path: Path) -> list[Any]:
    """Multiple choice as JSON lines: question, choices and answer, as MMLU's files have them.

    Raises:
        CaptureError: there is no such file, or a line is no JSON.
    """
    if not path.is_file():
        raise CaptureError(f"there is no file {path}", way_out="check the path")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines if line.strip()]
    except ValueError as error:
        raise CaptureError(
            f"{path} is no file of JSON lines: {error}",
            way_out='one object a line: {"question": "…", "choices": ["…", "…"], "answer": 0}',
        ) from error


def documents(text: str) -> list[str]:
    """Paragraphs between blank lines; lines where there is no blank line."""
    parts = re.split(r"\n[ \t]*\n", text)
    if len(parts) == 1:
        parts = text.splitlines()
    return [part.strip() for part in parts if part.strip()]


def _text_batches(
    path: Path, loaded: Loaded, batch_size: int, max_length: int
) -> list[Mapping[str, Tensor]]:
    if loaded.tokenizer is None:
        raise CaptureError(
            f"{path} is text, and the model has no tokenizer",
            way_out="give a .safetensors file with a tensor for each input",
        )
    try:
        texts = documents(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise CaptureError(
            f"{path} is not UTF-8 text: {error}", way_out="give text, or a .safetensors file"
        ) from error
    if not texts:
        raise CaptureError(f"{path} holds no text", way_out="one document a paragraph or line")
    return tokenized(texts, loaded.model, loaded.tokenizer, batch_size, max_length)
