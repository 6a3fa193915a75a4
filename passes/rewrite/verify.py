"""Check the rewritten model: what it computes, what it costs, and what it lost."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tensorize.base.errors import AnalysisError
from tensorize.base.tensors import doubled
from tensorize.formats import interpret
from tensorize.formats.quantized import inputs_in_full
from tensorize.passes.stages import Rewritten
from tensorize.weight.install import factored
from tensorize.weight.lazy import FactoredWeight
from tensorize.weight.whole_model import numbers

_ROWS = 4
_ENTRIES = 4_000_000
"""Of a weight that the interpreter builds at once."""


@dataclass(frozen=True)
class VerifyResult:
    """Looks at the result, and notes every weight whose error is not the predicted one.

    Raises:
        AnalysisError: a rewritten weight does not compute what its cores say, or the parameters
            are not as many as planned.
    """

    name: str = "verify"

    def run(self, done: Rewritten) -> Rewritten:
        plan = done.plan
        counted = numbers(done.model)
        planned = plan.predicted.parameters
        if counted != planned:
            raise AnalysisError(
                f"the model has {counted:,} parameters, the plan said {planned:,}",
                way_out="this is a defect in tensorize: please report it",
            )
        # On meta they were checked as they were written.
        compared = [(name, w) for name, w in factored(done.model) if not w.is_meta]
        largest = max((check_weight(name, w) for name, w in compared), default=0.0)
        notes = list(done.notes)
        for site in plan.sites:
            if site.spec is None or plan.refine is not None:
                continue  # refined factors are not the best for their own dense weight
            actual = done.errors.get(site.name, 0.0)
            rounding = torch.finfo(getattr(torch, _dtype(done, site.name))).eps
            if actual > 1.05 * site.predicted_error + 8 * rounding:
                notes.append(
                    f"{site.name}: its error is {actual:.4g}, {site.predicted_error:.4g} predicted"
                )
        agreed = f"contractions agree to {largest:.1e} of their size"
        summary = f"{counted:,} parameters; {agreed if compared else 'none to run'}"
        return replace(done, summary=summary, notes=tuple(notes))


def _dtype(done: Rewritten, name: str) -> str:
    return next((site.dtype for site in done.sites if site.name == name), "float32")


def check_weight(name: str, weight: FactoredWeight) -> float:
    """Run a weight on random rows against the interpreter; the relative difference.

    Raises:
        AnalysisError: it is more than rounding in the weight's dtype explains.
    """
    if weight.frame.shape is not None:
        return 0.0  # not used as a matrix of rows; its error is measured as the others'
    if weight.spec.batch:
        weight = weight.seen(replace(weight.frame, expert=0))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_ROWS, weight.shape[-1], generator=generator, dtype=torch.float32)
    x = x.to(weight.device, weight.dtype)
    with torch.no_grad(), inputs_in_full():
        got = F.linear(x, weight)  # type: ignore[arg-type]
        want = torch.cat([_interpreted(part, x) for part in _parts(weight)], dim=-1)
    difference = relative_difference(got, want)
    # Rounding grows with the square root of the longest sums and the number of steps.
    spec, cores = weight.spec, len(weight.cores) + len(weight.indices)
    terms = max(*weight.shape, *spec.ranks)
    allowed = 8 * torch.finfo(weight.dtype).eps * math.sqrt(terms) * cores
    if not difference <= allowed:
        raise AnalysisError(
            f"its contraction differs from the interpreter by {difference:.3g}, "
            f"{allowed:.3g} is allowed",
            site=name,
            way_out="this is a defect in tensorize: please report it",
        )
    return difference


def _parts(weight: FactoredWeight) -> list[FactoredWeight]:
    """A weight of two factors by some of its rows: of a large table no more is ever built at once.
    Others whole."""
    frame = weight.frame
    if not weight.format.pair or frame.transposed or frame.rows is not None:
        return [weight]
    m, n = weight.shape
    step = max(_ENTRIES // n, 1)
    slices = ((start, min(start + step, m)) for start in range(0, m, step))
    return [weight.seen(frame.slice_rows(*rows)) for rows in slices]


def _interpreted(weight: FactoredWeight, x: Tensor) -> Tensor:
    spec, cores = weight.looked_at()
    return interpret.apply(spec, cores, x, "rows" if weight.frame.transposed else "columns")


def relative_difference(got: Tensor, want: Tensor) -> float:
    """‖got − want‖ / ‖want‖, in float64."""
    want, got = doubled(want), doubled(got)
    size = float(want.norm())
    return float((got - want).norm()) / size if size > 0 else 0.0
