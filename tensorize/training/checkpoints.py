"""Checkpoints of training in few bytes: a model, its optimizer, and what else there is."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.optim import Optimizer

from tensorize.base.errors import BudgetError, CheckpointError
from tensorize.base.records import BAD_DATA, checksum, parse
from tensorize.ir.budget import Budget
from tensorize.store import states
from tensorize.store.coded import Coder, lossless, opened

LOSSLESS = "lossless"
_FORMAT, _TREE, _BOUNDS = "tensorize.checkpoint", "tensorize.tree", "tensorize.bounds"
_CHECKSUM = "tensorize.sha256"
_VERSION = "1"
_TENSOR = "tensor"


def save_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer | None = None,
    *,
    coded: str | Budget = LOSSLESS,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write what training goes on from to one file, in fewer bytes than memory holds, atomically.

    Args:
        coded: ``"lossless"``: every bit. ``tensorize.Budget(entry_error=1e-4)``: no entry of a
            weight, a buffer or an optimizer's state is further than this from what it was;
            ``entry_error="1e-3 relative"`` is a share of each tensor's range. Of a tensor without
            negative entries, as second moments are, each entry is besides within that share of
            itself (with an absolute bound: the share that it is of the largest), so that none
            becomes zero. Integers and single numbers are exact.
        extra: what else is to be kept: numbers, text, lists, dictionaries and tensors, as
            ``{"step": 100, "scheduler": scheduler.state_dict()}``. It is kept exactly.

    Raises:
        CheckpointError: it cannot be written, or ``extra`` or the optimizer holds something else.
        BudgetError: ``coded`` is neither.

    Examples:
        >>> path = folder / "step.safetensors"
        >>> optimizer = torch.optim.AdamW(small.parameters())
        >>> tensorize.training.save_checkpoint(path, small, optimizer, extra={"step": 7})
        >>> tensorize.training.load_checkpoint(path, small, optimizer)["step"]
        7
    """
    target = Path(path)
    held: dict[str, Tensor] = {}
    tree = {
        "model": _plain(dict(model.state_dict()), "model", held),
        "optimizer": optimizer and _plain(optimizer.state_dict(), "optimizer", held),
    }
    own = set(held)
    tree["extra"] = _plain(dict(extra or {}), "extra", held)
    made = _coder(coded)({key: held[key] for key in own})
    exact = lossless({key: tensor for key, tensor in held.items() if key not in own})
    both = type(made)({**made.tensors, **exact.tensors}, known=made.known)
    about = {
        _FORMAT: _VERSION,
        _TREE: json.dumps(tree),
        _BOUNDS: json.dumps(both.about),
        _CHECKSUM: checksum(tree),
    }
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        states.write(target, both, about)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{target} cannot be written: {type(error).__name__}: {error}",
            way_out="choose a path with room that you may write to",
        ) from error


def load_checkpoint(
    path: str | os.PathLike[str], model: nn.Module, optimizer: Optimizer | None = None
) -> dict[str, Any]:
    """Read a checkpoint into a model and its optimizer, which are as before if that fails.

    Returns ``extra``. No pickle.

    Raises:
        CheckpointError: it is damaged or foreign, of another model, or holds no optimizer.

    Examples:
        >>> path = folder / "step.safetensors"
        >>> tensorize.training.save_checkpoint(path, small)
        >>> tensorize.training.load_checkpoint(path, small)
        {}
    """
    source = Path(path)
    tree, held = _read(source)
    found = _made(tree["model"], held)
    wanted = model.state_dict()
    shapes = {key: value.shape for key, value in found.items() if isinstance(value, Tensor)}
    if shapes != {key: value.shape for key, value in wanted.items() if isinstance(value, Tensor)}:
        odd = sorted(wanted.keys() ^ found.keys())[:3] or "shapes"
        raise CheckpointError(
            f"{source} is of another model: they differ in {odd}",
            way_out="load it into the model that it was saved of",
        )
    if optimizer is not None:
        if tree["optimizer"] is None:
            raise CheckpointError(
                f"{source} holds no optimizer", way_out="load_checkpoint(path, model)"
            )
        try:
            optimizer.load_state_dict(_made(tree["optimizer"], held))
        except (ValueError, KeyError) as error:
            raise CheckpointError(
                f"{source} is of another optimizer: {error}",
                way_out="make it of the same parameters in the same groups",
            ) from error
    model.load_state_dict(found)
    return _made(tree["extra"], held)


def _read(path: Path) -> tuple[Any, dict[str, Tensor]]:
    """What a file says, and its tensors."""
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
        if about.get(_FORMAT) != _VERSION:
            raise ValueError("it is no checkpoint of this version")
        with opened(path) as file:
            held = {key: file.get_tensor(key) for key in [*file.keys()]}
        tree = parse(about[_TREE])
        if checksum(tree) != about[_CHECKSUM]:
            raise ValueError("what it says is not what was written")
        for part in ("model", "optimizer", "extra"):
            _made(tree[part], held)
        return tree, held
    except (OSError, SafetensorError, *BAD_DATA) as error:
        raise CheckpointError(
            f"{path} cannot be read: {type(error).__name__}: {error}",
            way_out="a file that tensorize.training.save_checkpoint wrote, copied whole",
        ) from error


def _coder(coded: str | Budget) -> Coder:
    if coded == LOSSLESS:
        return lossless
    if isinstance(coded, Budget) and coded == Budget(entry_error=coded.entry_error or 1.0):
        assert coded.entry_error is not None
        return states.within(coded.entry_error)
    raise BudgetError(
        f"coded={coded!r} is nothing that a checkpoint can be",
        way_out='coded="lossless", or coded=tensorize.Budget(entry_error="1e-3 relative")',
    )


def _plain(value: Any, place: str, held: dict[str, Tensor]) -> Any:
    """A value as JSON: tensors are ``held`` by their place, each once; keys keep what they are."""
    if isinstance(value, Tensor):
        for key, known in held.items():
            if known is value or _same(known, value):
                return [_TENSOR, key]
        held[place] = value.detach()
        return [_TENSOR, place]
    if isinstance(value, Mapping):
        pairs = [[key, _plain(each, f"{place}.{key}", held)] for key, each in value.items()]
        if all(isinstance(key, str | int) for key, _ in pairs):
            return ["mapping", pairs]
    elif isinstance(value, list | tuple):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return [kind, [_plain(each, f"{place}.{k}", held) for k, each in enumerate(value)]]
    elif isinstance(value, float):
        return ["float", repr(value)]  # infinities and NaN, too
    elif value is None or isinstance(value, str | bool | int):
        return ["value", value]
    raise CheckpointError(
        f"{place} is a {type(value).__name__}, which no file without pickle holds",
        way_out="keep numbers, text, lists, dictionaries with keys of text, and tensors",
    )


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same memory."""
    alike = one.shape == other.shape and one.stride() == other.stride() and one.numel() > 0
    return alike and one.dtype == other.dtype and one.data_ptr() == other.data_ptr()


def _made(plain: Any, held: Mapping[str, Tensor]) -> Any:
    """The value that ``_plain`` was given."""
    if plain is None:
        return None
    kind, value = plain
    if kind == _TENSOR:
        return held[value]
    if kind == "mapping":
        return {key: _made(each, held) for key, each in value}
    if kind in ("list", "tuple"):
        made = [_made(each, held) for each in value]
        return made if kind == "list" else tuple(made)
    return float(value) if kind == "float" else value
