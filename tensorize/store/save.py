"""Write an artefact."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from tensorize.base.errors import CheckpointError
from tensorize.base.files import beside_others, draft_of, drafts_of, into_place
from tensorize.base.sharded import by_first_rank, is_sharded
from tensorize.base.tensorfile import sha256_of
from tensorize.base.tensors import unwrapped
from tensorize.reports.attach import known_report
from tensorize.reports.report import Report
from tensorize.store import transformers_config
from tensorize.store.card import write_card
from tensorize.store.coded import METADATA, CodedTensors, Coder
from tensorize.store.contents import Contents, contents_of, dtype_name
from tensorize.store.load import DRAFT
from tensorize.store.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    WEIGHTS_NAME,
    manifest_to_dict,
    signed,
)


def save(
    model: nn.Module,
    directory: str | os.PathLike[str],
    coder: Coder | None = None,
    guard: Mapping[str, Any] | None = None,
) -> None:
    """Write a factorized model into ``directory``, which is made where it does not exist.

    A model that is sharded over processes is saved by all of them, and the first one writes what
    it is on one machine.
    Several processes may do so at once: the directory then holds what one of them saved, whole.
    ``coder`` says in which bytes tensors are stored; None: as they lie in memory. ``guard``: what
    the checks of a guarded model know. Every tensor is stored once. Two tensors that overlap only
    in part are stored in full each, and are apart after loading. Other files in the directory (a
    tokenizer) are left alone; a Hugging Face model's ``config.json`` and
    ``generation_config.json`` are written beside.

    Raises:
        CheckpointError: the model carries no report (it does not come from ``tensorize.compile``,
            ``apply`` or ``load``), is a stage of a pipeline (``way_to_save`` says what to do then),
            holds something that safetensors cannot store, or the directory cannot be written or
            holds a dense checkpoint. What was saved there before is then still valid.
    """
    directory, model = Path(directory), unwrapped(model)
    if (way_out := getattr(model, "way_to_save", None)) is not None:
        raise CheckpointError(
            f"a {type(model).__name__} is a part of a model, and is not saved by itself",
            way_out=way_out,
        )
    report = known_report(model)
    if report is None:
        inner = [name for name, part in model.named_modules() if known_report(part)]
        raise CheckpointError(
            f"this {type(model).__name__} carries no tensorize report, so it cannot be saved",
            way_out=f'tensorize.save(model.get_submodule("{inner[0]}"), directory)'
            if inner
            else "make it with tensorize.compile or tensorize.apply first",
        )
    if transformers_config.is_huggingface(model):
        transformers_config.check_place(directory)
    contents, stored = contents_of(model)
    made = None if coder is None else coder(stored)

    def write() -> None:
        with _drafted(directory) as draft:
            _write_tensors(stored if made is None else made.as_bytes(), draft)
            _finish(model, contents, report, draft, draft, directory, made, guard)

    if any(is_sharded(parameter) for parameter in model.parameters()):
        by_first_rank(write, CheckpointError)
    else:
        write()


def save_written(
    model: nn.Module, contents: Contents, report: Report, weights: Path, directory: Path
) -> None:
    """As ``save``, for a model on meta whose tensors are in the file ``weights``, which is moved.

    It has to be on the disk of the directory.

    Raises:
        CheckpointError: the directory cannot be written.
    """
    with _drafted(directory) as draft:
        _finish(model, contents, report, weights, draft, directory)


@contextlib.contextmanager
def _drafted(directory: Path) -> Iterator[Path]:
    """A file in a directory that is not there after the block; failures are named.

    Who leaves as the last one takes away what is not of the artefact any more: until then it may be
    somebody's who has not put the manifest in place that names it.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with beside_others(directory / f".{DRAFT}") as is_alone:
            with draft_of(directory / DRAFT) as draft:
                yield draft
            if is_alone():
                _clean(directory)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{directory} cannot be written: {type(error).__name__}: {error}",
            way_out="choose a directory with room that you may write to; what was saved there "
            "before is still valid",
        ) from error


def _clean(directory: Path) -> None:
    """Take away the files of earlier saves and of killed ones."""
    kept = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))["weights"]["file"]
    for old in (*directory.glob("tensorize-*.safetensors"), *drafts_of(directory / DRAFT)):
        if old.name != kept and (WEIGHTS_NAME.fullmatch(old.name) or old.suffix == ".tmp"):
            _remove(old)


def _finish(
    model: nn.Module,
    contents: Contents,
    report: Report,
    tensors: Path,
    draft: Path,
    directory: Path,
    made: CodedTensors | None = None,
    guard: Mapping[str, Any] | None = None,
) -> None:
    """Put the file of tensors in place, and the manifest last."""
    manifest = manifest_to_dict(contents, transformers_config.describe(model), report)
    if made is not None:
        manifest |= {"format_version": FORMAT_VERSION, "coding": made.about}
    if guard is not None:
        manifest["guard"] = guard
    sha256 = sha256_of(tensors)
    weights = directory / f"tensorize-{sha256[:16]}.safetensors"
    into_place(tensors, weights)
    manifest["weights"] = {
        "file": weights.name,
        "sha256": sha256,
        "bytes": weights.stat().st_size,
    }
    version, configs = manifest["format_version"], {}
    if manifest["model"]["huggingface"]:
        configs = transformers_config.save_configs(model, directory, weights.name, version, draft)
        write_card(directory, report, manifest["model"], draft)
    draft.write_text(signed(manifest), encoding="utf-8")
    into_place(draft, directory / MANIFEST)
    found = {name: (directory / name).read_text(encoding="utf-8") for name in configs}
    if found != configs:  # those of another save came in between
        transformers_config.save_configs(model, directory, weights.name, version, draft)


def _write_tensors(tensors: dict[str, Tensor], draft: Path) -> None:
    usual = draft.stat().st_mode
    try:
        save_file(tensors, draft, metadata=METADATA)
        draft.chmod(usual)  # safetensors makes files that only their owner may read
    except KeyError as error:  # what safetensors says of a dtype that it does not know
        dtypes = {name: dtype_name(tensor.dtype) for name, tensor in tensors.items()}
        unknown = str(error).removeprefix("torch.")
        raise CheckpointError(
            f"safetensors cannot store {unknown}",
            site=next((name for name, dtype in dtypes.items() if dtype == unknown), None),
            way_out="cast it to another dtype",
        ) from error


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
