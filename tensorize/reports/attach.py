"""Which report belongs to which model."""

from __future__ import annotations

import hashlib
from dataclasses import replace

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from tensorize.base.errors import TensorizeError
from tensorize.base.tensors import is_plain, raw_bytes, unwrapped
from tensorize.reports.report import Report


def attach(model: nn.Module, found: Report) -> None:
    """Keep a report on the model that it is of."""
    model.__dict__["_tensorize"] = found


CHANGED = (
    "parameters have changed since (trained, edited or cast): errors, sizes and predictions are "
    "those of before; tensorize.evaluate measures the model as it is"
)

_SAMPLE = 4096  # entries of a parameter


def samples_of(model: nn.Module) -> tuple[str, ...]:
    """For each parameter a hash of its shape, its dtype and some of its values; none where values
    are not here."""
    found = []
    for parameter in model.parameters():
        if parameter.is_meta or not is_plain(parameter):
            return ()
        flat = parameter.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // _SAMPLE)]
        digest = hashlib.blake2b(raw_bytes(some), digest_size=8)
        digest.update(f"{tuple(parameter.shape)} {parameter.dtype}".encode())
        found.append(digest.hexdigest())
    return tuple(found)


_fused: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""What the launch of a compiled graph took in, by a core of each of its weights."""


def note_fused(core: Tensor, what: str) -> None:
    """Remember what the launch of a weight took in; reports of its model say it."""
    _fused[core] = what


def _fused_in(model: nn.Module) -> tuple[tuple[str, tuple[str, ...]], ...]:
    found: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters():
        if (what := _fused.get(parameter)) is not None:
            name = name.rpartition(".")[0]  # of the module that holds the core
            found.setdefault(what, []).append(name.removesuffix(".second").removesuffix("_cores"))
    return tuple((what, tuple(names)) for what, names in found.items())


def detach(model: nn.Module) -> None:
    """Let a model and its parts know nothing of what was done to them."""
    for module in model.modules():
        module.__dict__.pop("_tensorize", None)


def known_report(model: nn.Module) -> Report | None:
    """The report of a compressed model; None for any other."""
    found = model.__dict__.get("_tensorize")
    return found if isinstance(found, Report) else None


def report(model: nn.Module) -> Report:
    """What was done to a compiled model: ``str()`` is a table, ``to_html(path)`` a page.

    Raises:
        TensorizeError: the model was not made by tensorize.

    Examples:
        >>> tensorize.report(small).verdict.ruined
        False
    """
    if not isinstance(model, nn.Module):
        raise TensorizeError(
            f"a {type(model).__name__} has no report",
            way_out="tensorize.report(tensorize.load(directory)), or `tensorize report directory`",
        )
    model = unwrapped(model)
    found = known_report(model)
    if found is None:
        parts = [name for name, part in model.named_modules() if known_report(part)]
        raise TensorizeError(
            "the model was not made by tensorize" + (" as a whole" if parts else ""),
            way_out=f'tensorize.report(model.get_submodule("{parts[0]}"))'
            if parts
            else "model = tensorize.compile(model, budget=0.1)",
        )
    notes = found.notes
    now = samples_of(model) if found.weights else ()
    if now and CHANGED not in notes and not set(found.weights) <= set(now):
        notes = (*notes, CHANGED)
    return replace(found, fused=_fused_in(model), notes=notes)
