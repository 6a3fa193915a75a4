"""The errors that tensorize raises: each names the site, the cause and the way out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from tensorize.base.printer import plain


class TensorizeError(Exception):
    """Base of every error that tensorize raises on purpose.

    Args:
        cause: what is wrong, in one sentence.
        site: the qualified name of the parameter or module it concerns, if there is one.
        way_out: what the caller can do about it.

    Examples:
        >>> try:
        ...     tensorize.report(dense)
        ... except tensorize.TensorizeError as error:
        ...     print(error.way_out)
        model = tensorize.compile(model, budget=0.1)
    """

    def __init__(self, cause: str, *, site: str | None = None, way_out: str | None = None) -> None:
        self.cause, self.site, self.way_out = cause, site, way_out
        where = f"{site}: " if site else ""
        out = f"\n  way out: {way_out}" if way_out else ""
        super().__init__(plain(f"{where}{cause}{out}"))


class BudgetError(TensorizeError):
    """The budget is malformed, or no choice of formats and ranks satisfies it.

    Examples:
        >>> try:
        ...     tensorize.compile(dense, budget=[0.1, 0.5])
        ... except tensorize.BudgetError as error:
        ...     print(error.cause)
        budget=[0.1, 0.5] is several budgets, and a model is compiled to one
    """


class CaptureError(TensorizeError):
    """The model, its inputs or its calibration data cannot be used.

    Examples:
        >>> try:
        ...     tensorize.compile(dense, calibration=[torch.zeros(4, 3)])
        ... except tensorize.CaptureError as error:
        ...     print(error.cause.splitlines()[0][:40])
        calibration: batch 0 does not fit the mo
    """


class AnalysisError(TensorizeError):
    """Weights, statistics or plan do not allow the analysis or its application.

    Examples:
        >>> try:
        ...     tensorize.compile(small)
        ... except tensorize.AnalysisError as error:
        ...     print(error.cause)
        the weight is compressed already
    """


class ModelError(CaptureError, AnalysisError):
    """What the caller's model did: it raised, or what it gave allows no analysis."""


class MemoryLimitError(AnalysisError, MemoryError):
    """More memory is needed than the caller allows."""


class CheckpointError(TensorizeError):
    """A saved artefact is missing, damaged, foreign or of a newer format.

    Examples:
        >>> try:
        ...     tensorize.load(folder / "nowhere")
        ... except tensorize.CheckpointError as error:
        ...     print(type(error.way_out).__name__)
        str
    """


class FaultError(TensorizeError):
    """Arithmetic or memory did something else than was asked of it, and it could not be mended.

    Examples:
        >>> guarded = tensorize.guard(copy.deepcopy(small), calibration=batches, on_fault="raise")
        >>> try:
        ...     with tensorize.inject(guarded, rate=1.0, where="intermediates", bits=[30]):
        ...         _ = guarded(*inputs)
        ... except tensorize.FaultError as error:
        ...     print(error.site)
        0.weight
    """

    came_right: Callable[[], None] | None = None
    """Of a compiled graph: it may be right when it is run again, and this is called if it was."""


def check_one_of(
    option: str, value: Any, known: Iterable[object], kind: type[TensorizeError] = TensorizeError
) -> Any:
    """The value of an option; raises an error of the kind where it is none of the known ones."""
    names = list(known)
    if value not in names:
        raise kind(
            f"{option}={value!r} is not one of {', '.join(map(repr, names))}",
            way_out=f"{option}={names[0]!r}",
        )
    return value
