"""``tensorize.guard`` and what goes with it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from tensorize.base.errors import CaptureError, FaultError, TensorizeError
from tensorize.base.tensors import unwrapped
from tensorize.capture.batches import ToInputs, calibration_batches
from tensorize.capture.forward import in_usual_modes
from tensorize.capture.inputs import check_model
from tensorize.checking.faults import RAISE, RECOMPUTE, Mend, OnFault
from tensorize.checking.guarding import Guard, guard_of, unguard
from tensorize.checking.report import GuardReport, reported


@in_usual_modes("guard")
def guard(
    model: nn.Module,
    *,
    calibration: Iterable[Any],
    on_fault: OnFault = RECOMPUTE,
    tokenizer: Any = None,
    to_inputs: ToInputs | None = None,
) -> nn.Module:
    """Let a model notice when a product, a gradient or a weight is not what it should be.

    The same model comes back. Every product of a covered weight is checked by one number a row,
    y · s = x · (Wᵀ s), whatever factors W is made of; so are its gradients. Limits are what
    rounding did on the calibration data, times three, for each weight and dtype: call it again
    after the weights, the dtype or the kind of data changed much. ``guard_report`` says what is not
    covered.

    Args:
        model: dense or compressed.
        calibration: as in ``compile``: some thousand rows of typical data. Of a model over several
            processes all of them call this, with the same data where they share its weights.
        on_fault: ``"recompute"``: the product is computed again; if it stays wrong, the weight is
            mended (``scrub``) and the product computed once more. ``"raise"``: FaultError at once,
            and nothing is mended. A function: it is called with the ``Fault`` first.

    Raises:
        CaptureError: there are no data, or the model does not run on them.
        TensorizeError: no weight of the model has a check, or ``on_fault`` is nothing known.
        FaultError: later, by the model: a fault that stays.

    Examples:
        >>> guarded = tensorize.guard(copy.deepcopy(small), calibration=batches)
        >>> torch.equal(guarded(*inputs), small(*inputs))
        True
    """
    given, model = model, check_model(model)
    _check_on_fault(on_fault)
    batches = calibration_batches(calibration, model, tokenizer, to_inputs=to_inputs)
    if not batches:
        raise CaptureError(
            "guard needs data: how far rounding goes hangs on the weights and on what meets them",
            way_out="tensorize.guard(model, calibration=[batch, …])",
        )
    before = guard_of(model)
    if before is not None:
        before.detach()
    made = Guard(model, on_fault, together=isinstance(given, nn.parallel.DistributedDataParallel))
    try:
        made.attach()
        made.calibrate(batches)
        if not any(use.limits for site in made.sites.values() for use in site.uses.values()):
            raise TensorizeError(
                "no product of this model has a check: it has no linear layer, no table and no "
                "compressed weight that the data reach",
                way_out="tensorize.compile(model, budget=0.5, calibration=data) first, or other "
                "calibration data",
            )
    except BaseException:
        made.detach()
        if before is not None:
            before.attach()
        raise
    made.prepare()
    return given


@contextlib.contextmanager
def guarded(
    model: nn.Module, *, calibration: Iterable[Any], on_fault: OnFault = RECOMPUTE, **options: Any
) -> Iterator[nn.Module]:
    """``guard`` within a block: after it the model is as it was before.

    Raises:
        CaptureError, TensorizeError, FaultError: as ``guard``.

    Examples:
        >>> with tensorize.guarded(small, calibration=batches) as guarded:
        ...     y = guarded(*inputs)
    """
    found = guard(model, calibration=calibration, on_fault=on_fault, **options)
    try:
        yield found
    finally:
        unguard(unwrapped(found))


def scrub(model: nn.Module) -> list[Mend]:
    """Look at every parameter and buffer in memory, and put back what changed by itself.

    Integer sums of rows and columns, made when the model was guarded, find and mend any single
    word of a tensor exactly; where more is damaged the artefact's copy is taken (of a model that
    was saved or loaded). What was written through PyTorch (a step of an optimizer) is no damage.

    Returns what was mended, tensor by tensor.

    Raises:
        TensorizeError: the model is not guarded.
        FaultError: a tensor is damaged, and there is no copy of it; all others are mended.

    Examples:
        >>> guarded = tensorize.guard(copy.deepcopy(small), calibration=batches)
        >>> tensorize.scrub(guarded)
        []
    """
    known = _known(model)
    mends, lost = known.mend()
    if lost:
        raise FaultError(
            f"its memory is damaged in more places than sums can tell apart, and no artefact has a "
            f"copy of it{_others(lost)}",
            site=lost[0],
            way_out="tensorize.load(directory, model=model) from a saved copy; a model that was "
            "saved with tensorize.save mends itself from there",
        )
    return mends


def guard_report(model: nn.Module) -> GuardReport:
    """What is checked, what is not, and what happened: ``str()`` is a page.

    Raises:
        TensorizeError: the model is not guarded.

    Examples:
        >>> guarded = tensorize.guard(copy.deepcopy(small), calibration=batches)
        >>> tensorize.guard_report(guarded).faults
        ()
    """
    return reported(_known(model))


def _known(model: nn.Module) -> Guard:
    found = guard_of(unwrapped(model)) if isinstance(model, nn.Module) else None
    if found is None:
        raise TensorizeError(
            f"this {type(model).__name__} is not guarded",
            way_out="tensorize.guard(model, calibration=[batch, …])",
        )
    return found


def _others(lost: list[str]) -> str:
    return "" if len(lost) == 1 else f", and so are {', '.join(lost[1:])}"


def _check_on_fault(on_fault: Any) -> None:
    if on_fault not in (RECOMPUTE, RAISE) and not callable(on_fault):
        raise TensorizeError(
            f"on_fault={on_fault!r} is nothing that can be done about a fault",
            way_out='on_fault="recompute", "raise", or a function of a Fault',
        )
