"""The manifest of an artefact: what a model holds, as data, written to JSON and read back."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from tensorize import weight
from tensorize.errors import CheckpointError
from tensorize.ir import NONLINEARITIES, TTSpec
from tensorize.lazy import FactoredWeight
from tensorize.report import Report
from tensorize.version import __version__

FORMAT, FORMAT_VERSION = "tensorize", 1
MANIFEST = "tensorize.json"
WEIGHTS_NAME = re.compile(r"tensorize-[0-9a-f]{16}\.safetensors")
SAVE_AGAIN = "save the model again, or restore the directory from a copy"
PARAMETER, BUFFER = "parameter", "buffer"
_PLAIN_DISPATCH = getattr(Tensor, "__torch_dispatch__", None)


@dataclass(frozen=True)
class Entry:
    """One entry of the state dict. ``stride`` is given where the tensor is not contiguous."""

    kind: str
    dtype: str
    shape: tuple[int, ...]
    requires_grad: bool
    stride: tuple[int, ...] | None = None


@dataclass(frozen=True)
class SiteRecord:
    """One factorized parameter, under all of its names.

    ``shape`` is the parameter's own (a convolution's has more axes than the matrix), and so is the
    ``spec``, whichever way its module holds the cores. ``nonlinearity``: what is between them.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    spec: TTSpec
    nonlinearity: str | None = None


@dataclass(frozen=True)
class Contents:
    """What a model holds, told without its values.

    ``aliases``: key → the first key of the same tensor object. ``same_memory``: key → the key of
    another tensor object on the very same memory. ``transient``: dtypes of the floating-point
    buffers that are no part of the state dict.
    """

    entries: Mapping[str, Entry]
    aliases: Mapping[str, str]
    same_memory: Mapping[str, str]
    transient: Mapping[str, str]
    sites: tuple[SiteRecord, ...]


@dataclass(frozen=True)
class Manifest:
    """What is read back: where the files are, what they hold, and of which model.

    ``model`` is what ``huggingface.describe`` says of it.
    """

    path: Path
    weights: Path
    sha256: str
    contents: Contents
    model: Mapping[str, Any]
    report: Report


def dtype_name(dtype: torch.dtype) -> str:
    """``"float32"``, as ``dtype_of`` reads it."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """The dtype of a name.

    Raises:
        ValueError: torch has none of that name.
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is no dtype")
    return dtype


# ------------------------------------------------------------------------- what a model holds


@dataclass(frozen=True)
class Slot:
    """A place in a model that holds one entry of its state dict."""

    key: str
    module: nn.Module
    leaf: str
    kind: str

    @property
    def tensor(self) -> Tensor:
        held = self.module._parameters if self.kind == PARAMETER else self.module._buffers
        tensor = held[self.leaf]
        assert tensor is not None
        return tensor

    def put(self, tensor: Tensor) -> None:
        if self.kind == PARAMETER:
            # Not straight into _parameters: recurrent layers keep a list of their weights beside.
            setattr(self.module, self.leaf, tensor)
        else:  # a buffer may be some module's parameter as well, and must stay a buffer here
            self.module._buffers[self.leaf] = tensor


def slots_of(model: nn.Module) -> Iterator[Slot]:
    """Every parameter and persistent buffer, by its state-dict key and in that order."""
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                yield Slot(f"{prefix}{leaf}", module, leaf, PARAMETER)
        for leaf, buffer in module._buffers.items():
            if buffer is not None and leaf not in module._non_persistent_buffers_set:
                yield Slot(f"{prefix}{leaf}", module, leaf, BUFFER)


def transient_buffers(model: nn.Module) -> Iterator[Slot]:
    """Every buffer that is no part of the state dict."""
    for path, module in model.named_modules():
        for leaf in sorted(module._non_persistent_buffers_set):
            if module._buffers.get(leaf) is not None:
                yield Slot(f"{path}.{leaf}" if path else leaf, module, leaf, BUFFER)


def contents_of(model: nn.Module, *, on_meta: bool = False) -> tuple[Contents, dict[str, Tensor]]:
    """The description of a model's tensors, and those to store, contiguous and each once.

    ``on_meta``: the model has no values yet, and nor have the tensors to store.
    """
    entries: dict[str, Entry] = {}
    aliases: dict[str, str] = {}
    same_memory: dict[str, str] = {}
    stored: dict[str, Tensor] = {}
    objects: dict[int, str] = {}
    memory: dict[tuple[Any, ...], str] = {}
    storages: set[int] = set()
    _check_no_extra_state(model)
    for slot in slots_of(model):
        key, tensor = slot.key, slot.tensor
        if not on_meta:
            _check_storable(key, tensor)
        entries[key] = _entry_of(slot)
        first = objects.setdefault(id(tensor), key)
        if first != key:
            aliases[key] = first
            continue
        if on_meta:
            stored[key] = tensor
            continue
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        first = memory.setdefault(place, key) if tensor.numel() else key
        if first != key:
            same_memory[key] = first
            continue
        flat = tensor.detach().contiguous()
        if flat.untyped_storage().data_ptr() in storages:  # safetensors refuses what overlaps
            flat = flat.clone()
        storages.add(flat.untyped_storage().data_ptr())
        stored[key] = flat
    transient = {
        slot.key: dtype_name(slot.tensor.dtype)
        for slot in transient_buffers(model)
        if slot.tensor.is_floating_point()
    }
    return Contents(entries, aliases, same_memory, transient, site_records(model)), stored


def aliases_of(model: nn.Module) -> dict[str, str]:
    """Key → first key of the same parameter."""
    first: dict[int, str] = {}
    keys = [(slot.key, id(slot.tensor)) for slot in slots_of(model) if slot.kind == PARAMETER]
    return {key: first[i] for key, i in keys if first.setdefault(i, key) != key}


def _check_storable(key: str, tensor: Tensor) -> None:
    if is_lazy(tensor):
        raise CheckpointError(
            "the parameter is not initialized yet", site=key, way_out="run the model once"
        )
    if tensor.is_meta:
        raise CheckpointError(
            "the tensor is on the meta device: it has no values to save",
            site=key,
            way_out="load the weights first",
        )
    # A subclass that dispatches for itself (DTensor, a quantized tensor) has no plain memory.
    own_dispatch = getattr(type(tensor), "__torch_dispatch__", None) is not _PLAIN_DISPATCH
    if own_dispatch or tensor.layout != torch.strided:
        raise CheckpointError(
            f"a {type(tensor).__name__} cannot be stored in safetensors",
            site=key,
            way_out="gather or convert it to a plain tensor before saving",
        )


def _check_no_extra_state(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise CheckpointError(
                f"a {type(module).__name__} keeps extra state that is no tensor",
                site=path or None,
                way_out="keep it in a buffer instead of get_extra_state()",
            )


def _entry_of(slot: Slot) -> Entry:
    tensor = slot.tensor
    return Entry(
        kind=slot.kind,
        dtype=dtype_name(tensor.dtype),
        shape=tuple(tensor.shape),
        requires_grad=tensor.requires_grad,
        # The layout decides how a matmul rounds, so it is kept where it can be.
        stride=None if tensor.is_contiguous() or not _is_dense(tensor) else tensor.stride(),
    )


def _is_dense(tensor: Tensor) -> bool:
    """Whether the tensor is a permutation of a contiguous one."""
    order = sorted(range(tensor.dim()), key=lambda axis: tensor.stride(axis), reverse=True)
    return tensor.permute(order).is_contiguous()


def site_records(model: nn.Module) -> tuple[SiteRecord, ...]:
    """Every factorized parameter of a model."""
    groups: dict[tuple[int, ...], SiteRecord] = {}
    for name, factors in weight.factored(model):
        key = tuple(id(core) for core in factors.cores)
        before = groups[key].names if key in groups else ()
        groups[key] = replace(record_of(name, factors), names=(*before, name))
    return tuple(groups.values())


def record_of(name: str, factors: FactoredWeight) -> SiteRecord:
    """The record of a factorized parameter, under one of its names."""
    return SiteRecord((name,), tuple(factors.shape), _own_spec(factors), factors.nonlinearity)


def _own_spec(factors: FactoredWeight) -> TTSpec:
    """The spec of the parameter itself: a Conv1D's layer holds the factors of its transpose."""
    if not factors.frame.transposed:
        return factors.spec
    rows, columns = factors.spec.shape
    return TTSpec.low_rank(columns, rows, factors.spec.ranks[0])


# ------------------------------------------------------------------------------------- written


def manifest_to_dict(
    contents: Contents, model: Mapping[str, Any], report: Report
) -> dict[str, Any]:
    """The manifest as JSON data; ``"weights"`` is filled in once the file of weights is written."""
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "versions": _versions(),
        "weights": {},
        "model": model,
        **_contents_to_dict(contents),
        "report": report.to_dict(),
    }


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {
        "tensorize": __version__,
        "python": platform.python_version(),
    }
    for package in ("torch", "safetensors", "transformers"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def _contents_to_dict(contents: Contents) -> dict[str, Any]:
    tensors = {}
    for key, entry in contents.entries.items():
        tensors[key] = {**asdict(entry), "shape": list(entry.shape)}
        if entry.stride is None:
            del tensors[key]["stride"]
    return {
        "sites": sites_to_list(contents.sites),
        "tensors": tensors,
        "aliases": dict(contents.aliases),
        "same_memory": dict(contents.same_memory),
        "transient": dict(contents.transient),
    }


def sites_to_list(sites: Iterable[SiteRecord]) -> list[dict[str, Any]]:
    """Site records as JSON data."""
    return [
        {
            "names": list(site.names),
            "shape": list(site.shape),
            "spec": site.spec.to_dict(),
            **({} if site.nonlinearity is None else {"nonlinearity": site.nonlinearity}),
        }
        for site in sites
    ]


def sites_from_list(data: Iterable[Mapping[str, Any]]) -> tuple[SiteRecord, ...]:
    """What ``sites_to_list`` made."""
    return tuple(
        SiteRecord(
            tuple(s["names"]),
            tuple(s["shape"]),
            TTSpec.from_dict(s["spec"]),
            _known_nonlinearity(s.get("nonlinearity")),
        )
        for s in data
    )


def _known_nonlinearity(name: str | None) -> str | None:
    """A name out of a file is looked up nowhere unless it is one of those that are written."""
    if name is not None and name not in NONLINEARITIES:
        raise ValueError(f"{name!r} is no non-linearity between factors")
    return name


# ----------------------------------------------------------------------------------- read back


def _read_json(directory: Path) -> tuple[Path, dict[str, Any]]:
    """The manifest's JSON, known to be ours and of a version that can be read."""
    path = directory / MANIFEST
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        missing = f"there is no {MANIFEST} in it" if directory.is_dir() else "no such directory"
        raise CheckpointError(
            f"{directory} holds no tensorize artefact: {missing}",
            way_out="check the path; tensorize.save(model, directory) writes an artefact",
        ) from error
    except OSError as error:
        fail(path, f"cannot be read: {error.strerror or error}", "check its permissions")
    except ValueError as error:
        fail(path, f"is not valid JSON, it is damaged or cut short: {error}", SAVE_AGAIN)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        fail(path, "is not a tensorize manifest", "check the path")
    version = data.get("format_version")
    if not isinstance(version, int) or version < 1:
        fail(path, f"is damaged: format_version is {version!r}", SAVE_AGAIN)
    if version > FORMAT_VERSION:
        by = data.get("versions") or {}
        fail(
            path,
            f"has format version {version}, and this tensorize reads up to {FORMAT_VERSION}",
            f"upgrade tensorize (the artefact was written by version {by.get('tensorize')})",
        )
    return path, data


def read_report(directory: str | os.PathLike[str]) -> Report:
    """The report of a saved model; reads the manifest only.

    Raises:
        CheckpointError: there is no manifest, or it is foreign, damaged or too new.
    """
    path, data = _read_json(Path(directory))
    with damage_named(path):
        return Report.from_dict(data["report"])


def read_manifest(directory: Path) -> Manifest:
    """All that the manifest in a directory says.

    Raises:
        CheckpointError: there is no manifest, or it is foreign, damaged or too new.
    """
    path, data = _read_json(directory)
    with damage_named(path):
        name = data["weights"]["file"]
        if not WEIGHTS_NAME.fullmatch(name):
            raise ValueError(f"{name!r} is not the name of a weights file")
        return Manifest(
            path=path,
            weights=directory / name,
            sha256=str(data["weights"]["sha256"]),
            contents=_contents_from_dict(data),
            model={**data["model"], "class": str(data["model"]["class"])},
            report=Report.from_dict(data["report"]),
        )


def _contents_from_dict(data: Mapping[str, Any]) -> Contents:
    entries = {}
    for key, entry in data["tensors"].items():
        stride = entry.get("stride")
        entries[key] = Entry(
            **{
                **entry,
                "shape": tuple(entry["shape"]),
                "stride": None if stride is None else tuple(stride),
            }
        )
        dtype_of(entry["dtype"])
    for key, first in (*data["aliases"].items(), *data["same_memory"].items()):
        if key not in entries or first not in entries:
            raise ValueError(f"{key!r} stands for {first!r}, and one of them is not there")
    for name in data["transient"].values():
        dtype_of(name)
    sites = sites_from_list(data["sites"])
    return Contents(entries, data["aliases"], data["same_memory"], data["transient"], sites)


@contextlib.contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """What wrong data raise when they are read becomes a CheckpointError that names the file."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        fail(path, f"is damaged: {type(error).__name__}: {error}", SAVE_AGAIN)


def fail(path: Path, cause: str, way_out: str) -> NoReturn:
    """Raises CheckpointError: what is wrong with a file, and what to do about it."""
    raise CheckpointError(f"{path} {cause}", way_out=way_out)
