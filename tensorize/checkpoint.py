"""Save a factorized model and load it again: safetensors for the weights, JSON for the rest.

A directory holds ``tensorize-<first 16 digits of the sha256>.safetensors`` and ``tensorize.json``,
the manifest, which names that file and is put in place last. As the weights file is named by its
content, saving again into the same directory never touches what the old manifest refers to: a
crash at any moment leaves the old artefact or the new one, never a mixture. One process may write
to a directory at a time.

Loading never builds a dense weight. The architecture gets its cores as placeholders
(``weight.install``), every state-dict entry is put in by its key, and ties are restored by
identity. All of it is checked, and undone as a whole where a check fails. Nothing is unpickled, no
code is taken from the artefact, and the network is never asked.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib
import importlib.metadata
import json
import os
import platform
import re
import secrets
import shutil
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from tensorize import weight
from tensorize.errors import CheckpointError
from tensorize.ir import TTSpec
from tensorize.report import Report
from tensorize.version import __version__
from tensorize.weight import FactoredWeight

FORMAT, FORMAT_VERSION = "tensorize", 1
MANIFEST = "tensorize.json"

_WEIGHTS = re.compile(r"tensorize-[0-9a-f]{16}\.safetensors")
_DRAFTS = ".tensorize-*.tmp"
_SAVE_AGAIN = "save the model again, or restore the directory from a copy"
_PARAMETER, _BUFFER = "parameter", "buffer"
_PLAIN_DISPATCH = getattr(Tensor, "__torch_dispatch__", None)


@dataclass(frozen=True)
class _Entry:
    """One entry of the state dict. ``stride`` is given where the tensor is not contiguous."""

    kind: str
    dtype: str
    shape: tuple[int, ...]
    requires_grad: bool
    stride: tuple[int, ...] | None = None


@dataclass(frozen=True)
class _Slot:
    """A place in a model that holds one entry of its state dict."""

    key: str
    module: nn.Module
    leaf: str
    kind: str

    @property
    def tensor(self) -> Tensor:
        held = self.module._parameters if self.kind == _PARAMETER else self.module._buffers
        tensor = held[self.leaf]
        assert tensor is not None
        return tensor

    def put(self, tensor: Tensor) -> None:
        if self.kind == _PARAMETER:
            # Not straight into _parameters: recurrent layers keep a list of their weights beside.
            setattr(self.module, self.leaf, tensor)
        else:  # a buffer may be some module's parameter as well, and must stay a buffer here
            self.module._buffers[self.leaf] = tensor


@dataclass(frozen=True)
class _SiteRecord:
    """One factorized parameter, under all of its names.

    ``shape`` is the parameter's own (a convolution's has more axes than the matrix), and so is the
    ``spec``, whichever way its module holds the cores.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    spec: TTSpec


@dataclass(frozen=True)
class _Contents:
    """What a model holds, told without its values.

    ``aliases``: key → the first key of the same tensor object. ``same_memory``: key → the key of
    another tensor object on the very same memory. ``transient``: dtypes of the floating-point
    buffers that are no part of the state dict.
    """

    entries: Mapping[str, _Entry]
    aliases: Mapping[str, str]
    same_memory: Mapping[str, str]
    transient: Mapping[str, str]
    sites: tuple[_SiteRecord, ...]


@dataclass(frozen=True)
class _Manifest:
    path: Path
    weights: Path
    sha256: str
    contents: _Contents
    model: Mapping[str, Any]
    report: Report


# ------------------------------------------------------------------------------------------ save


def save(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write a factorized model into ``directory``, which is made where it does not exist.

    Every tensor is stored once. Two tensors that overlap only in part are stored in full each, and
    are apart after loading. Other files in the directory (a tokenizer) are left alone; a Hugging
    Face model's ``config.json`` and ``generation_config.json`` are written beside.

    Raises:
        CheckpointError: the model carries no report (it does not come from ``tensorize.compile``,
            ``apply`` or ``load``), holds something that safetensors cannot store, or the directory
            cannot be written. What was saved there before is then still valid.
    """
    directory = Path(directory)
    report = model.__dict__.get("_tensorize")
    if not isinstance(report, Report):
        inner = [n for n, m in model.named_children() if "_tensorize" in m.__dict__]
        raise CheckpointError(
            f"this {type(model).__name__} carries no tensorize report, so it cannot be saved",
            way_out=f"pass the model that it wraps (model.{inner[0]})"
            if inner
            else "make it with tensorize.compile or tensorize.apply first",
        )
    contents, stored = _contents_of(model)
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "versions": _versions(),
        "weights": {},
        "model": _describe(model),
        **_contents_to_dict(contents),
        "report": report.to_dict(),
    }
    draft = directory / f".tensorize-{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _write_tensors(stored, draft)
        sha256 = _sha256(draft)
        weights = directory / f"tensorize-{sha256[:16]}.safetensors"
        _into_place(draft, weights)
        manifest["weights"] = {
            "file": weights.name,
            "sha256": sha256,
            "bytes": weights.stat().st_size,
        }
        if manifest["model"]["huggingface"]:
            _save_configs(model, directory, draft)
        draft.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        _into_place(draft, directory / MANIFEST)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{directory} cannot be written: {type(error).__name__}: {error}",
            way_out="choose a directory with room that you may write to; what was saved there "
            "before is still valid",
        ) from error
    finally:
        _remove(draft)
    for old in (*directory.glob("tensorize-*.safetensors"), *directory.glob(_DRAFTS)):
        if old.name != weights.name and (_WEIGHTS.fullmatch(old.name) or old.suffix == ".tmp"):
            _remove(old)


def _write_tensors(tensors: dict[str, Tensor], draft: Path) -> None:
    draft.touch()
    usual = draft.stat().st_mode
    try:
        save_file(tensors, draft, metadata={"format": "pt"})
        draft.chmod(usual)  # safetensors makes files that only their owner may read
    except KeyError as error:  # what safetensors says of a dtype that it does not know
        dtypes = {name: _dtype_name(tensor) for name, tensor in tensors.items()}
        unknown = str(error).removeprefix("torch.")
        raise CheckpointError(
            f"safetensors cannot store {unknown}",
            site=next((name for name, dtype in dtypes.items() if dtype == unknown), None),
            way_out="cast it to another dtype",
        ) from error


def _into_place(draft: Path, target: Path) -> None:
    """Give a finished file its name, so that it survives a crash of the machine."""
    with open(draft, "rb") as file:
        os.fsync(file.fileno())
    os.replace(draft, target)
    with contextlib.suppress(OSError):  # not every system can open a directory
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


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


# ------------------------------------------------------------------------- what a model holds


def _slots(model: nn.Module) -> Iterator[_Slot]:
    """Every parameter and persistent buffer, by its state-dict key and in that order."""
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                yield _Slot(f"{prefix}{leaf}", module, leaf, _PARAMETER)
        for leaf, buffer in module._buffers.items():
            if buffer is not None and leaf not in module._non_persistent_buffers_set:
                yield _Slot(f"{prefix}{leaf}", module, leaf, _BUFFER)


def _transient_buffers(model: nn.Module) -> Iterator[_Slot]:
    """Every buffer that is no part of the state dict."""
    for path, module in model.named_modules():
        for leaf in sorted(module._non_persistent_buffers_set):
            if module._buffers.get(leaf) is not None:
                yield _Slot(f"{path}.{leaf}" if path else leaf, module, leaf, _BUFFER)


def _contents_of(model: nn.Module) -> tuple[_Contents, dict[str, Tensor]]:
    """The description of a model's tensors, and those to store, contiguous and each once."""
    entries: dict[str, _Entry] = {}
    aliases: dict[str, str] = {}
    same_memory: dict[str, str] = {}
    stored: dict[str, Tensor] = {}
    objects: dict[int, str] = {}
    memory: dict[tuple[Any, ...], str] = {}
    storages: set[int] = set()
    _check_no_extra_state(model)
    for slot in _slots(model):
        key, tensor = slot.key, slot.tensor
        _check_storable(key, tensor)
        entries[key] = _entry_of(slot)
        first = objects.setdefault(id(tensor), key)
        if first != key:
            aliases[key] = first
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
        slot.key: _dtype_name(slot.tensor)
        for slot in _transient_buffers(model)
        if slot.tensor.is_floating_point()
    }
    return _Contents(entries, aliases, same_memory, transient, _site_records(model)), stored


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


def _entry_of(slot: _Slot) -> _Entry:
    tensor = slot.tensor
    return _Entry(
        kind=slot.kind,
        dtype=_dtype_name(tensor),
        shape=tuple(tensor.shape),
        requires_grad=tensor.requires_grad,
        # The layout decides how a matmul rounds, so it is kept where it can be.
        stride=None if tensor.is_contiguous() or not _is_dense(tensor) else tensor.stride(),
    )


def _is_dense(tensor: Tensor) -> bool:
    """Whether the tensor is a permutation of a contiguous one."""
    order = sorted(range(tensor.dim()), key=lambda axis: tensor.stride(axis), reverse=True)
    return tensor.permute(order).is_contiguous()


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is no dtype")
    return dtype


def _site_records(model: nn.Module) -> tuple[_SiteRecord, ...]:
    groups: dict[tuple[int, ...], _SiteRecord] = {}
    for name, factors in weight.factored(model):
        key = tuple(id(core) for core in factors.cores)
        before = groups[key].names if key in groups else ()
        record = _record(name, factors)
        groups[key] = replace(record, names=(*before, name))
    return tuple(groups.values())


def _record(name: str, factors: FactoredWeight) -> _SiteRecord:
    return _SiteRecord((name,), tuple(factors.shape), _own_spec(factors))


def _own_spec(factors: FactoredWeight) -> TTSpec:
    """The spec of the parameter itself: a Conv1D's layer holds the factors of its transpose."""
    if not factors.frame.transposed:
        return factors.spec
    rows, columns = factors.spec.shape
    return TTSpec.low_rank(columns, rows, factors.spec.ranks[0])


# -------------------------------------------------------------------------------- the manifest


def _contents_to_dict(contents: _Contents) -> dict[str, Any]:
    tensors = {}
    for key, entry in contents.entries.items():
        tensors[key] = {**asdict(entry), "shape": list(entry.shape)}
        if entry.stride is None:
            del tensors[key]["stride"]
    return {
        "sites": [
            {"names": list(site.names), "shape": list(site.shape), "spec": site.spec.to_dict()}
            for site in contents.sites
        ],
        "tensors": tensors,
        "aliases": dict(contents.aliases),
        "same_memory": dict(contents.same_memory),
        "transient": dict(contents.transient),
    }


def _contents_from_dict(data: Mapping[str, Any]) -> _Contents:
    entries = {}
    for key, entry in data["tensors"].items():
        stride = entry.get("stride")
        entries[key] = _Entry(
            **{
                **entry,
                "shape": tuple(entry["shape"]),
                "stride": None if stride is None else tuple(stride),
            }
        )
        _dtype(entry["dtype"])
    for key, first in (*data["aliases"].items(), *data["same_memory"].items()):
        if key not in entries or first not in entries:
            raise ValueError(f"{key!r} stands for {first!r}, and one of them is not there")
    for name in data["transient"].values():
        _dtype(name)
    sites = tuple(
        _SiteRecord(tuple(s["names"]), tuple(s["shape"]), TTSpec.from_dict(s["spec"]))
        for s in data["sites"]
    )
    return _Contents(entries, data["aliases"], data["same_memory"], data["transient"], sites)


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
        _fail(path, f"cannot be read: {error.strerror or error}", "check its permissions")
    except ValueError as error:
        _fail(path, f"is not valid JSON, it is damaged or cut short: {error}", _SAVE_AGAIN)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        _fail(path, "is not a tensorize manifest", "check the path")
    version = data.get("format_version")
    if not isinstance(version, int) or version < 1:
        _fail(path, f"is damaged: format_version is {version!r}", _SAVE_AGAIN)
    if version > FORMAT_VERSION:
        by = data.get("versions") or {}
        _fail(
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
    with _damage_named(path):
        return Report.from_dict(data["report"])


def _read_manifest(directory: Path) -> _Manifest:
    path, data = _read_json(directory)
    with _damage_named(path):
        name = data["weights"]["file"]
        if not _WEIGHTS.fullmatch(name):
            raise ValueError(f"{name!r} is not the name of a weights file")
        return _Manifest(
            path=path,
            weights=directory / name,
            sha256=str(data["weights"]["sha256"]),
            contents=_contents_from_dict(data),
            model={**data["model"], "class": str(data["model"]["class"])},
            report=Report.from_dict(data["report"]),
        )


@contextlib.contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        _fail(path, f"is damaged: {type(error).__name__}: {error}", _SAVE_AGAIN)


def _fail(path: Path, cause: str, way_out: str) -> NoReturn:
    raise CheckpointError(f"{path} {cause}", way_out=way_out)


# ------------------------------------------------------------------------------------------ load


def load(directory: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """Read what ``save`` wrote; the result is in evaluation mode.

    Args:
        directory: where it was saved.
        model: a model of the same architecture, dense (it may be on the meta device) or already
            factorized alike. It is filled and returned: its parameters are new objects in the
            dtypes of the artefact, on the device where the old ones were. Only a Hugging Face
            model can do without: it is then built from the saved configuration, on the CPU.

    Raises:
        CheckpointError: a file is missing, damaged, foreign or of a newer format, or it does not
            fit ``model``, which is then exactly as it was.
    """
    manifest = _read_manifest(Path(directory))
    _check_weights(manifest)
    if model is None:
        target = _build(manifest)
    else:
        _check_class(model, manifest)
        target = model
    with _all_or_nothing(target):
        _install_sites(target, manifest)
        slots = _matched_slots(target, manifest)
        _fill(slots, manifest)
        _finish_transient(target, manifest)
        target.eval()
        target.__dict__["_tensorize"] = manifest.report
    return target


def _check_weights(manifest: _Manifest) -> None:
    path = manifest.weights
    try:
        found = _sha256(path)
    except FileNotFoundError:
        _fail(path, f"is missing, and {manifest.path} names it", _SAVE_AGAIN)
    except OSError as error:
        _fail(path, f"cannot be read: {error.strerror or error}", "check its permissions")
    if found != manifest.sha256:
        _fail(
            path,
            f"is damaged or cut short: its sha256 is {found[:16]}…, and {manifest.path} says "
            f"{manifest.sha256[:16]}…",
            _SAVE_AGAIN,
        )


def _class_path(model: nn.Module) -> str:
    kind = getattr(model, "_dense_class", type(model))
    return f"{kind.__module__}:{kind.__qualname__}"


def _check_class(model: nn.Module, manifest: _Manifest) -> None:
    # The module's name says little: the same class is in __main__ in one script only.
    saved, given = manifest.model["class"], _class_path(model)
    if saved.rpartition(".")[2].rpartition(":")[2] != given.rpartition(".")[2].rpartition(":")[2]:
        _fail(
            manifest.path,
            f"is of a {saved}, and the model passed is a {given}",
            "pass a model of the class that was saved",
        )


@contextlib.contextmanager
def _all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Undo every change of modules and their state if the body fails."""
    before = [
        (module, type(module), dict(module.__dict__), [_shallow(v) for v in vars(module).values()])
        for module in model.modules()
    ]
    try:
        yield
    except BaseException:
        for module, kind, state, containers in before:
            module.__class__ = kind
            module.__dict__.clear()
            module.__dict__.update(state)
            for live, items in containers:
                if items is not None:
                    live.clear()
                    live.extend(items) if isinstance(live, list) else live.update(items)
        raise


def _shallow(value: Any) -> tuple[Any, Any]:
    """A container of a module's state and a copy of it, None for everything else."""
    kind = type(value)
    return value, kind(value) if kind in (dict, OrderedDict, list, set) else None


def _install_sites(model: nn.Module, manifest: _Manifest) -> None:
    """Put placeholders of the right shapes where the artefact has cores."""
    factored = dict(weight.factored(model))
    extra = factored.keys() - {name for site in manifest.contents.sites for name in site.names}
    if extra:
        _misfit(manifest, f"{min(extra)} is factorized in the model, and dense in the artefact")
    for site in manifest.contents.sites:
        present = [_record(name, factored[name]) for name in site.names if name in factored]
        if present:
            alike = all((r.shape, r.spec) == (site.shape, site.spec) for r in present)
            if len(present) != len(site.names) or not alike:
                _misfit(
                    manifest,
                    f"{present[0].names[0]} is factorized as {present[0].spec} in the model, and "
                    f"as {site.spec} in the artefact, under the names {', '.join(site.names)}",
                )
            continue
        devices = [_dense_device(model, name, site, manifest) for name in site.names]
        weight.install(model, site.names, site.spec, _placeholders(site.spec, devices[0]))


def _dense_device(
    model: nn.Module, name: str, site: _SiteRecord, manifest: _Manifest
) -> torch.device:
    """Where the parameter is that the cores replace; it must have the shape they stand for."""
    try:
        owner, leaf = weight.owner_of(model, name)
    except AttributeError:
        owner, leaf = None, ""
    parameter = None if owner is None else owner._parameters.get(leaf)
    if parameter is None:
        _misfit(manifest, f"the model has no parameter {name}")
    shape = None if is_lazy(parameter) else tuple(parameter.shape)
    if shape != site.shape:
        _misfit(
            manifest, f"{name} has shape {shape} in the model, and {site.shape} in the artefact"
        )
    return parameter.device


def _placeholders(spec: TTSpec, device: torch.device) -> list[nn.Parameter]:
    """Parameters of the cores' shapes that hold one number of memory each."""
    point = torch.zeros((), device=device)
    return [nn.Parameter(point.expand(shape), requires_grad=False) for shape in spec.core_shapes]


def _misfit(manifest: _Manifest, cause: str) -> NoReturn:
    raise CheckpointError(
        f"{manifest.path} does not fit the model: {cause}",
        way_out=f"pass a model of the same architecture as the one saved "
        f"({manifest.model['class']}), dense or factorized alike",
    )


def _matched_slots(model: nn.Module, manifest: _Manifest) -> list[_Slot]:
    """The places to fill, after every key and shape was found to agree."""
    slots = list(_slots(model))
    entries = manifest.contents.entries
    keys = {slot.key for slot in slots}
    lacking = [key for key in entries if key not in keys]
    unknown = [slot.key for slot in slots if slot.key not in entries]
    if lacking:
        _misfit(manifest, f"the model has no {_some(lacking)}")
    if unknown:
        _misfit(manifest, f"the artefact has no {_some(unknown)}")
    for slot in slots:
        entry = entries[slot.key]
        shape = None if is_lazy(slot.tensor) else tuple(slot.tensor.shape)
        if (slot.kind, shape) != (entry.kind, entry.shape):
            _misfit(
                manifest,
                f"{slot.key} is a {slot.kind} of shape {shape} in the model, and a {entry.kind} "
                f"of shape {entry.shape} in the artefact",
            )
    return slots


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _fill(slots: Sequence[_Slot], manifest: _Manifest) -> None:
    """Put the stored tensors in, one object for all the keys of a tied one."""
    contents = manifest.contents
    firsts = {slot.key: contents.aliases.get(slot.key, slot.key) for slot in slots}
    parameters = {firsts[slot.key] for slot in slots if slot.kind == _PARAMETER}
    devices = {slot.key: slot.tensor.device for slot in slots}
    values: dict[str, Tensor] = {}
    objects: dict[str, Tensor] = {}
    try:
        with safe_open(manifest.weights, framework="pt", device="cpu") as file:
            for first in dict.fromkeys(firsts.values()):
                stored = contents.same_memory.get(first, first)
                if stored not in values:
                    device = devices[stored]
                    value = _read(file, stored, contents.entries[stored])
                    values[stored] = value if device.type == "meta" else value.to(device)
                # detach() gives another object on the same memory.
                value, entry = values[stored].detach(), contents.entries[first]
                if first in parameters:
                    objects[first] = nn.Parameter(value, requires_grad=entry.requires_grad)
                else:
                    objects[first] = value
    except (OSError, SafetensorError, ValueError) as error:
        _fail(manifest.weights, f"cannot be read: {type(error).__name__}: {error}", _SAVE_AGAIN)
    for slot in slots:
        slot.put(objects[firsts[slot.key]])


def _read(file: Any, key: str, entry: _Entry) -> Tensor:
    """A tensor in memory of its own, aligned as torch does: how a matmul rounds may hang on it."""
    tensor = file.get_tensor(key)
    if (tuple(tensor.shape), tensor.dtype) != (entry.shape, _dtype(entry.dtype)):
        raise ValueError(
            f"{key} is {_dtype_name(tensor)} of shape {tuple(tensor.shape)}, and the manifest "
            f"says {entry.dtype} of shape {entry.shape}"
        )
    if entry.stride is None:
        return tensor.clone(memory_format=torch.contiguous_format)
    return torch.empty_strided(entry.shape, entry.stride, dtype=tensor.dtype).copy_(tensor)


def _finish_transient(model: nn.Module, manifest: _Manifest) -> None:
    """Buffers outside the state dict are the model's own; only their dtype is restored."""
    for slot in _transient_buffers(model):
        if slot.tensor.is_meta:
            raise CheckpointError(
                "the buffer is on the meta device, and as a non-persistent one it is not in "
                f"{manifest.weights}",
                site=slot.key,
                way_out="build the model outside of torch.device('meta'), or give this buffer "
                "its values before loading",
            )
        name = manifest.contents.transient.get(slot.key)
        if name is not None and slot.tensor.is_floating_point():
            slot.put(slot.tensor.to(_dtype(name)))


# --------------------------------------------------------------------------------- Hugging Face


def _describe(model: nn.Module) -> dict[str, Any]:
    """The model's class, and for a Hugging Face model what it takes to build it again."""
    config: Any = getattr(model, "config", None)
    if not (hasattr(model, "save_pretrained") and hasattr(config, "to_json_string")):
        return {"class": _class_path(model), "huggingface": False}
    generation = getattr(model, "generation_config", None)
    # The configuration is kept here as well, complete: config.json alone could be of another save.
    return {
        "class": _class_path(model),
        "huggingface": True,
        "config": json.loads(config.to_json_string(use_diff=False)),
        "generation_config": None
        if generation is None
        else json.loads(generation.to_json_string(use_diff=False)),
        "implementations": {
            name: getattr(config, f"_{name}_implementation", None) for name in _IMPLEMENTATIONS
        },
    }


# Those that every machine has; the others are chosen anew where the model is loaded.
_IMPLEMENTATIONS = {"attn": ("eager", "sdpa"), "experts": ("eager", "batched_mm", "grouped_mm")}


def _save_configs(model: nn.Module, directory: Path, draft: Path) -> None:
    """``config.json`` and ``generation_config.json``, for other tools that look for them."""
    config: Any = copy.deepcopy(model.config)
    config.architectures = [_class_path(model).rpartition(":")[2]]
    config.dtype = _dtype_name(next(model.parameters()))
    config.to_json_file(draft)
    _into_place(draft, directory / "config.json")
    generation: Any = getattr(model, "generation_config", None)
    if generation is not None:
        generation.to_json_file(draft)
        _into_place(draft, directory / "generation_config.json")


def _build(manifest: _Manifest) -> nn.Module:
    """The architecture of a Hugging Face model with its parameters on the meta device."""
    about = manifest.model
    if not about.get("huggingface"):
        _fail(
            manifest.path,
            f"is of a {about['class']}, and only Hugging Face models are built from an artefact",
            "pass model=, one of the same architecture; its weights are not needed, so it may be "
            "built under torch.device('meta')",
        )
    kind = _architecture(manifest)
    try:
        with _damage_named(manifest.path):
            config = kind.config_class.from_dict(_plain_floats(about["config"]))
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
        _fail(
            manifest.path,
            f"describes a {about['class']} that this transformers cannot build: "
            f"{type(error).__name__}: {error}",
            "use the transformers version named in it, or pass model=",
        )
    return model


def _plain_floats(data: Any) -> Any:
    """Infinity and NaN as floats: transformers writes them as ``{"__float__": "Infinity"}``."""
    if isinstance(data, dict):
        if data.keys() == {"__float__"}:
            return float(data["__float__"])
        return {key: _plain_floats(value) for key, value in data.items()}
    return [_plain_floats(value) for value in data] if isinstance(data, list) else data


def _architecture(manifest: _Manifest) -> Any:
    """The class to build; only transformers' own are taken by name."""
    home, _, name = manifest.model["class"].partition(":")
    if home.partition(".")[0] != "transformers":
        _fail(
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
        _fail(
            manifest.path,
            f"is of a {name}, which transformers {transformers.__version__} does not have",
            "use the transformers version named in it, or pass model=",
        )
    return kind


@contextlib.contextmanager
def _quiet_build(manifest: _Manifest, dtype: Any) -> Iterator[None]:
    """Build without initial values, with parameters on meta, and leave the random state alone."""
    entries = manifest.contents.entries.values()
    shapes = {entry.shape for entry in entries if entry.kind == _PARAMETER}
    shapes |= {site.shape for site in manifest.contents.sites}
    try:
        no_init: Any = importlib.import_module("transformers.initialization").no_init_weights
    except (ImportError, AttributeError):
        no_init = importlib.import_module("transformers.modeling_utils").no_init_weights
    before = torch.get_default_dtype()
    # As from_pretrained does; a model that is not in its config's dtype was not built with it.
    name = str(dtype).removeprefix("torch.")
    built_with = any(entry.dtype == name for entry in entries)
    if built_with and _dtype(name).is_floating_point:
        torch.set_default_dtype(_dtype(name))
    try:
        shapes = {shape for shape in shapes if len(shape) > 1}
        with torch.random.fork_rng(devices=[]), no_init(), _ParametersOnMeta(shapes):
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
