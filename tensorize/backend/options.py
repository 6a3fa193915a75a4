"""What ``torch.compile(model, backend="tensorize", options=…)`` takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from tensorize.base.errors import TensorizeError

INNER = ("auto", "eager", "inductor")


@dataclass(frozen=True)
class BackendOptions:
    """What ``options=`` may hold.

    ``budget``, ``formats``, ``ranks`` and ``seed`` are those of ``tensorize.compile`` and serve
    the preview of a dense model. ``inner`` runs what is left: ``"auto"``, ``"eager"`` or
    ``"inductor"``.
    """

    budget: Any = None
    formats: Any = None
    ranks: Any = None
    seed: int = 0
    inner: str = "auto"

    @classmethod
    def of(cls, options: Mapping[str, Any] | None) -> BackendOptions:
        """Raises TensorizeError for an option that is unknown."""
        options = dict(options or {})
        known = {f.name for f in fields(cls)}
        for name in options:
            if name not in known:
                raise TensorizeError(
                    f"options[{name!r}] is not one of {', '.join(sorted(known))}",
                    way_out='options={"budget": 0.25}',
                )
        found = cls(**options)
        if found.inner not in INNER:
            raise TensorizeError(
                f"options['inner']={found.inner!r} is not one of {', '.join(INNER)}",
                way_out='options={"inner": "auto"}',
            )
        return found
