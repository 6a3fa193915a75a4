"""The rewriting pipeline: from a plan, and what was learned, to a model with factors.

``apply`` runs it on a model in memory, a stream from a checkpoint into a file, and a prediction
beside the model, to see what a plan will cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tensorize.ir.plan import POLISH
from tensorize.ir.sites import Batch
from tensorize.passes.pipeline import Pass
from tensorize.passes.rewrite.factorize import Factorize, Sink, in_model
from tensorize.passes.rewrite.polish import Polish
from tensorize.passes.rewrite.refit import Refit
from tensorize.passes.rewrite.verify import VerifyResult


def rewriting(
    refine: str | None,
    batches: Sequence[Batch] = (),
    polish: Callable[[], Polish] | None = None,
    *,
    sink: Sink | None = in_model,
    verified: bool = True,
) -> tuple[Pass, ...]:
    """The passes that carry out a plan: from ``Opened`` to ``Rewritten``.

    Factors are what a refit makes, else the ``cores`` of the stage, else each weight's curve's.

    Args:
        refine: what is done to the factors after the decompositions: None, "refit" or "polish".
        batches: what they are refit on.
        polish: makes the pass, where it is asked for.
        sink: where they are put; None: nowhere, they are the ``cores`` of the stage.
        verified: look at the result.
    """
    assert refine != POLISH or polish is not None
    steps = (
        None if refine is None else Refit(tuple(batches)),
        None if sink is None else Factorize(sink),
        polish() if refine == POLISH and polish is not None else None,
        VerifyResult() if verified else None,
    )
    return tuple(step for step in steps if step is not None)
