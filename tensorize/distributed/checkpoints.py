"""``save`` and ``load``: a training run on disk, which goes on on any other mesh.

Every save is a folder of its own, written by PyTorch's distributed checkpointing (DCP) while
training goes on. Its ``.metadata`` is written last, so a folder is whole or is none: a kill costs
what was not whole yet, never an older one.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as read_state
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.state_dict_saver import save as write_state

from tensorize.base.errors import CheckpointError
from tensorize.base.sharded import by_first_rank, is_first_rank
from tensorize.base.tensors import unwrapped
from tensorize.distributed.pipeline import names_in_the_model

_STEP = re.compile(r"step-(\d{9})")
_WHOLE = ".metadata"  # DCP writes it last, under another name first
_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


class Saving:
    """A checkpoint that is being written. ``wait()`` returns once it is whole."""

    def __init__(self, future: Future[Any], folder: Path, keep: int) -> None:
        self.folder, self._future, self._keep = folder, future, keep

    def wait(self) -> Path:
        """The checkpoint's folder, once it is whole; those before the last ``keep`` are gone then.

        Raises:
            CheckpointError: it could not be written; the ones before are still whole.
        """
        try:
            self._future.result()
        except (OSError, RuntimeError, CheckpointException) as error:
            raise CheckpointError(
                f"{self.folder} cannot be written: {type(error).__name__}: {error}",
                way_out="make room; load() takes the last checkpoint that is whole",
            ) from error
        if is_first_rank():
            for old in _steps(self.folder.parent)[: -self._keep]:
                shutil.rmtree(old, ignore_errors=True)
        return self.folder


_last: dict[Path, Saving] = {}
"""The save that may still be going on, by its directory."""


def save(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    directory: str | os.PathLike[str],
    *,
    step: int,
    keep: int = 2,
    others: Mapping[str, Any] | None = None,
) -> Saving:
    """Write model and optimizer while training goes on; every process has to call it.

    The state is copied to the CPU before this returns, and written after (at once where there is
    no process group). A save waits for the one before it. Call ``wait()`` of the last one before
    the program ends.

    Args:
        directory: of all of a run's checkpoints, on a disk that all processes see.
        step: how many steps were taken.
        keep: how many whole checkpoints stay.
        others: objects with ``state_dict()`` and ``load_state_dict()`` by name, as a schedule of
            learning rates; what they give is to be the same on all processes.

    Returns:
        What tells when it is whole.

    Raises:
        CheckpointError: the directory, or the save before, could not be written.
    """
    top = Path(directory).absolute()
    if top in _last:
        _last.pop(top).wait()
    folder = top / f"step-{step:09d}"
    by_first_rank(lambda: _cleared(folder), CheckpointError)
    state = {**_state(model, optimizer), "step": step}
    state["others"] = {name: each.state_dict() for name, each in (others or {}).items()}
    _last[top] = saving = Saving(_begun(state, folder), folder, keep)
    return saving


def load(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    directory: str | os.PathLike[str],
    *,
    others: Mapping[str, Any] | None = None,
) -> int:
    """Go on from the last whole checkpoint, on whatever mesh the model is now.

    Args:
        model, optimizer: of the same names and sizes as those that were saved; over any mesh, or
            on one machine.
        others: as in ``save``: their states are loaded.

    Returns:
        The step that it was saved at.

    Raises:
        CheckpointError: there is no whole checkpoint, or it is of another model.
    """
    top = Path(directory).absolute()
    if top in _last:
        _last.pop(top).wait()
    found = _steps(top)
    if not found:
        raise CheckpointError(
            f"{top} holds no whole checkpoint",
            way_out="start from the beginning, or name the directory that save() was given",
        )
    state = {**_state(model, optimizer), "step": 0}
    state["others"] = {name: each.state_dict() for name, each in (others or {}).items()}
    try:
        with _one_process_is_meant():
            read_state(state, checkpoint_id=found[-1], process_group=_own_group())
    except (CheckpointException, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{found[-1]} is of another model or optimizer: {error}",
            way_out="make them as they were when it was saved; the mesh may be another one",
        ) from error
    inner = unwrapped(model)
    here = {first: here for here, first in names_in_the_model(inner).items()}
    set_state_dict(
        inner,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=_renamed(state["optimizer"], here),
        options=_FLAT,
    )
    for name, each in (others or {}).items():
        each.load_state_dict(state["others"][name])
    return state["step"]


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Both by the names of parameters, whatever groups and meshes there are."""
    inner = unwrapped(model)
    of_model, of_optimizer = get_state_dict(inner, optimizer, options=_FLAT)
    # A whole model's optimizer knows a tied parameter by the first of its names.
    of_optimizer = _renamed(of_optimizer, names_in_the_model(inner))
    return {"model": of_model, "optimizer": of_optimizer}


def _renamed(flat: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The flat state of an optimizer (``state.NAME.…``), with other names of parameters."""

    def renamed(key: str) -> str:
        kind, rest = key.split(".", 1)
        old = next((name for name in names if rest.startswith(f"{name}.")), None)
        return key if old is None else f"{kind}.{names[old]}{rest.removeprefix(old)}"

    return {renamed(key): value for key, value in flat.items()}


def _steps(directory: Path) -> list[Path]:
    """The whole checkpoints of a directory, the newest one last."""
    found = directory.glob("step-*")
    return sorted(f for f in found if _STEP.fullmatch(f.name) and (f / _WHOLE).exists())


def _cleared(folder: Path) -> None:
    """Make a folder, and take away what a kill left there: it is none that ``load`` would take."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for other in folder.parent.glob("step-*"):
            if _STEP.fullmatch(other.name) and not (other / _WHOLE).exists():
                shutil.rmtree(other)
        if folder.exists():
            raise CheckpointError(
                f"{folder} is there already", way_out="another step, or another directory"
            )
        folder.mkdir()
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be made: {error}", way_out="choose a directory that can be written"
        ) from error


def _begun(state: dict[str, Any], folder: Path) -> Future[Any]:
    """Begin to write. Alone it is done at once: only so can DCP's warning of that be kept away."""
    if dist.is_initialized():
        future = async_save(state, checkpoint_id=folder, process_group=_own_group())
        assert isinstance(future, Future)
        return future
    done: Future[Any] = Future()
    with _one_process_is_meant():
        done.set_result(write_state(state, checkpoint_id=folder))
    return done


@contextlib.contextmanager
def _one_process_is_meant() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _own_group() -> Any:
    """Processes that speak of checkpoints, on the CPU and apart from those of the training."""
    return _beside(dist.group.WORLD) if dist.is_initialized() else None


@lru_cache(maxsize=1)
def _beside(world: Any) -> Any:
    return dist.new_group(backend="gloo")
