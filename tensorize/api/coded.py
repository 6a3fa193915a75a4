"""What ``tensorize.save(coded=)`` may be, and what codes it."""

from __future__ import annotations

from tensorize.base.errors import BudgetError
from tensorize.ir.budget import Budget
from tensorize.store.coded import Coder, lossless, within

LOSSLESS = "lossless"


def coder_for(coded: str | Budget | None) -> Coder | None:
    """What codes a model's tensors as a caller asks for it; None: nothing does.

    Raises:
        BudgetError: it is nothing that a file can be.
    """
    if coded is None:
        return None
    if coded == LOSSLESS:
        return lossless
    if isinstance(coded, Budget) and coded.entry_error is not None:
        if str(coded) == str(Budget(entry_error=coded.entry_error)):
            return within(coded.entry_error)
    raise BudgetError(
        f"coded={coded!r} is nothing that a file can be",
        way_out='coded="lossless", or coded=tensorize.Budget(entry_error=1e-4)',
    )
