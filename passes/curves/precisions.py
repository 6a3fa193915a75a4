"""Which precisions weights may take, from what the caller asks for."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from tensorize.base.errors import AnalysisError
from tensorize.ir.precision import INTEGERS

PrecisionOption = str | Sequence[str] | None

AUTO = "auto"
OWN = ("float64", "float32", "bfloat16", "float16")
"""Dtypes that weights may have: the one that a weight has is its own."""


def check_precision(option: Any) -> PrecisionOption:
    """What ``precision=`` is: None, "auto", or names as a tuple.

    Raises:
        AnalysisError: a name is none, whatever the model.
    """
    if option in (None, AUTO):
        return option
    names = (option,) if isinstance(option, str) else option
    known = (*OWN, *INTEGERS)
    if not isinstance(names, Sequence) or not names or any(name not in known for name in names):
        raise AnalysisError(
            f"precision={option!r} is no precision",
            way_out=f'precision="auto", or one or more of {", ".join(known)}',
        )
    return tuple(names)


def check_own(option: PrecisionOption, dtypes: Collection[str]) -> None:
    """Raises AnalysisError for a dtype that weights of these dtypes cannot have."""
    for name in option if isinstance(option, tuple) else ():
        if name in OWN and dtypes and name not in dtypes:
            own = ", ".join(sorted(dtypes))
            raise AnalysisError(
                f"precision={name!r} is no dtype of the weights, which are in {own}: they keep "
                "that one, or become integers",
                way_out=f"model.to(torch.{name}) first, or precision={min(dtypes)!r}",
            )


def integers(option: PrecisionOption) -> tuple[str, ...]:
    """The integers among what was asked for."""
    if option == AUTO:
        return tuple(INTEGERS)
    return tuple(name for name in option or () if name in INTEGERS)


def takes_own(option: PrecisionOption, dtype: str) -> bool:
    """Whether a weight of a dtype may keep it."""
    return option in (None, AUTO) or dtype in option
