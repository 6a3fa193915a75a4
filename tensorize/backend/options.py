"""What ``torch.compile(model, backend="tensorize", options=…)`` takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tensorize.api.options import Options
from tensorize.base.errors import TensorizeError

TAKEN = ("budget", "formats", "inner", "precision", "ranks", "seed")


def read_options(given: Mapping[str, Any] | None) -> Options:
    """The record of what ``options=`` holds.

    ``budget``, ``formats``, ``precision``, ``ranks`` and ``seed`` are those of
    ``tensorize.compile`` and serve the preview of a dense model. ``inner`` runs what is left:
    ``"auto"``, ``"eager"`` or ``"inductor"``.

    Raises:
        TensorizeError: an option is unknown, or has a value that it cannot have.
    """
    for name in given or {}:
        if name not in TAKEN:
            raise TensorizeError(
                f"options[{name!r}] is not one of {', '.join(TAKEN)}",
                way_out='options={"budget": 0.25}',
            )
    preview = {"budget": None, "metric": "frobenius", "inplace": True, "progress": False}
    return Options.of({**preview, **(given or {})})
