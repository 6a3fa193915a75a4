"""Save a factorized model and load it again: safetensors for the weights, JSON for the rest.

A directory holds ``tensorize-<first 16 digits of the sha256>.safetensors`` and ``tensorize.json``,
the manifest, which names that file and is put in place last. As the weights file is named by its
content, saving again into the same directory never touches what the old manifest refers to: a
crash at any moment leaves the old artefact or the new one, never a mixture. Several processes may
save to one directory: it then holds what one of them saved, whole.

The manifest has a checksum over all of it, that of the weights file among it. One from before
there was a checksum is read too. Either way every value is checked before it is used (``checks``).

Loading never builds a dense weight. The architecture gets its cores as placeholders
(``weight.install``), every state-dict entry is put in by its key, and ties are restored by
identity. All of it is checked, and undone as a whole where a check fails. Nothing is unpickled, no
code is taken from the artefact, and the network is never asked.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from tensorize.base.errors import CheckpointError
from tensorize.base.tensorfile import sha256_of
from tensorize.ir.spec import Spec
from tensorize.reports.attach import attach
from tensorize.store import transformers_config
from tensorize.store.checks import check_keys
from tensorize.store.coded import opened
from tensorize.store.contents import (
    PARAMETER,
    Entry,
    SiteRecord,
    Slot,
    dtype_name,
    dtype_of,
    record_of,
    slots_of,
    transient_buffers,
)
from tensorize.store.manifest import SAVE_AGAIN, Manifest, fail, read_manifest
from tensorize.store.transformers_build import build
from tensorize.weight import install
from tensorize.weight.become import all_or_nothing
from tensorize.weight.install import owner_of
from tensorize.weight.whole_model import settle

DRAFT = "tensorize"


def load(
    directory: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Read what ``save`` wrote; the result is in evaluation mode.

    Args:
        directory: where it was saved.
        model: a model of the same architecture, dense (it may be on the meta device) or already
            factorized alike. It is filled and returned: its parameters are new objects. Only a
            Hugging Face model can do without: it is then built from the saved configuration.
        device: where parameters and buffers go. None: where those of ``model`` are, or the CPU.
        dtype: of the floating-point entries of the state dict. None: as they were saved. Buffers
            outside the state dict keep theirs, as in ``from_pretrained``.

    Raises:
        CheckpointError: a file is missing, damaged, foreign or of a newer format, or it does not
            fit ``model``, which is then exactly as it was.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise CheckpointError(
            f"dtype={dtype!r} is no floating-point dtype", way_out="dtype=torch.bfloat16, or None"
        )
    manifest = read_manifest(Path(directory))
    _check_weights(manifest)
    if model is None:
        target = build(manifest)
    else:
        _check_class(model, manifest)
        target = model
    with all_or_nothing(target), install.followed(target):
        _install_sites(target, manifest)
        slots = _matched_slots(target, manifest)
        _fill(slots, manifest, device, dtype)
        settle(target)
        _finish_transient(target, manifest, device)
        target.eval()
        attach(target, manifest.report)
        transformers_config.note_factors(target)
    return target


def _check_weights(manifest: Manifest) -> None:
    path = manifest.weights
    try:
        size, found = path.stat().st_size, sha256_of(path)
    except FileNotFoundError:
        fail(path, f"is missing, and {manifest.path} names it", SAVE_AGAIN)
    except OSError as error:
        fail(path, f"cannot be read: {error.strerror or error}", "check its permissions")
    if (size, found) != (manifest.bytes, manifest.sha256):
        fail(
            path,
            f"is damaged or cut short: it has {size} bytes with the sha256 {found[:16]}..., and "
            f"{manifest.path} says {manifest.bytes} with {manifest.sha256[:16]}...",
            SAVE_AGAIN,
        )


def _check_class(model: nn.Module, manifest: Manifest) -> None:
    # The module's name says little: the same class is in __main__ in one script only.
    saved, given = manifest.model["class"], transformers_config.class_path(model)
    if saved.rpartition(".")[2].rpartition(":")[2] != given.rpartition(".")[2].rpartition(":")[2]:
        fail(
            manifest.path,
            f"is of a {saved}, and the model passed is a {given}",
            "pass a model of the class that was saved",
        )


def _install_sites(model: nn.Module, manifest: Manifest) -> None:
    """Put placeholders of the right shapes where the artefact has cores."""
    factored = dict(install.factored(model))
    extra = factored.keys() - {name for site in manifest.contents.sites for name in site.names}
    if extra:
        _misfit(manifest, f"{min(extra)} is factorized in the model, and dense in the artefact")
    for site in manifest.contents.sites:
        present = [record_of(name, factored[name]) for name in site.names if name in factored]
        if present:
            own = site.shape, site.spec, site.nonlinearity
            alike = all((r.shape, r.spec, r.nonlinearity) == own for r in present)
            if len(present) != len(site.names) or not alike:
                _misfit(
                    manifest,
                    f"{present[0].names[0]} is factorized as {present[0].spec} in the model, and "
                    f"as {site.spec} in the artefact, under the names {', '.join(site.names)}",
                )
            continue
        devices = [_dense_device(model, name, site, manifest) for name in site.names]
        cores = install.blank(site.spec, devices[0], torch.float32)
        install.install(model, site.names, site.spec, cores, site.nonlinearity)


def _dense_device(
    model: nn.Module, name: str, site: SiteRecord, manifest: Manifest
) -> torch.device:
    """Where the parameter is that the cores replace; it must have the shape they stand for."""
    try:
        owner, leaf = owner_of(model, name)
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


def _misfit(manifest: Manifest, cause: str) -> NoReturn:
    fail(
        manifest.path,
        f"does not fit the model: {cause}",
        "pass a model of the same architecture as the one saved "
        f"({manifest.model['class']}), dense or factorized alike",
    )


def _matched_slots(model: nn.Module, manifest: Manifest) -> list[Slot]:
    """The places to fill, after every key and shape was found to agree."""
    slots = list(slots_of(model))
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
        wanted = _dtype_of_index(slot)
        if wanted not in (None, entry.dtype):
            _misfit(manifest, f"{slot.key} holds {entry.dtype}, and codes of {wanted} belong there")
    return slots


def _dtype_of_index(slot: Slot) -> str | None:
    """What the integers beside cores are kept in; None for anything else."""
    spec = getattr(slot.module, "spec", None)
    indices = spec.indices if isinstance(spec, Spec) else ()
    return next((index.dtype for index in indices if index.name == slot.leaf), None)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _fill(
    slots: Sequence[Slot],
    manifest: Manifest,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> None:
    """Put the stored tensors in, one object for all the keys of a tied one."""
    contents = manifest.contents
    firsts = {slot.key: contents.aliases.get(slot.key, slot.key) for slot in slots}
    parameters = {firsts[slot.key] for slot in slots if slot.kind == PARAMETER}
    # What is on meta is put on the CPU.
    places = {s.key: "cpu" if s.tensor.is_meta else s.tensor.device for s in slots}
    values: dict[str, Tensor] = {}
    objects: dict[str, Tensor] = {}
    try:
        with opened(manifest.weights) as file:
            check_keys(file.keys(), contents)
            for first in dict.fromkeys(firsts.values()):
                stored = contents.same_memory.get(first, first)
                if stored not in values:
                    value = _read(file, stored, contents.entries[stored])
                    cast = dtype if value.is_floating_point() else None
                    values[stored] = value.to(device or places[stored], cast)
                # detach() gives another object on the same memory.
                value, entry = values[stored].detach(), contents.entries[first]
                if first in parameters:
                    objects[first] = nn.Parameter(value, requires_grad=entry.requires_grad)
                else:
                    objects[first] = value
    except (OSError, SafetensorError, ValueError) as error:
        fail(manifest.weights, f"cannot be read: {type(error).__name__}: {error}", SAVE_AGAIN)
    for slot in slots:
        slot.put(objects[firsts[slot.key]])


def _read(file: Any, key: str, entry: Entry) -> Tensor:
    """A tensor in memory of its own, aligned as torch does: how a matmul rounds may hang on it."""
    tensor = file.get_tensor(key)
    if (tuple(tensor.shape), tensor.dtype) != (entry.shape, dtype_of(entry.dtype)):
        raise ValueError(
            f"{key} is {dtype_name(tensor.dtype)} of shape {tuple(tensor.shape)}, and the manifest "
            f"says {entry.dtype} of shape {entry.shape}"
        )
    if entry.stride is None:
        return tensor.clone(memory_format=torch.contiguous_format)
    return torch.empty_strided(entry.shape, entry.stride, dtype=tensor.dtype).copy_(tensor)


def _finish_transient(
    model: nn.Module, manifest: Manifest, device: torch.device | str | None
) -> None:
    """Buffers outside the state dict are the model's own; only their dtype is restored."""
    for slot in transient_buffers(model):
        if slot.tensor.is_meta:
            raise CheckpointError(
                "the buffer is on the meta device, and as a non-persistent one it is not in "
                f"{manifest.weights}",
                site=slot.key,
                way_out="build the model outside of torch.device('meta'), or give this buffer "
                "its values before loading",
            )
        tensor, name = slot.tensor.to(device), manifest.contents.transient.get(slot.key)
        if name is not None and tensor.is_floating_point():
            tensor = tensor.to(dtype_of(name))
        slot.put(tensor)
