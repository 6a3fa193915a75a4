"""What the inputs of quantized weights are rounded to, so that products are ones of integers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tensorize.ir.machine import Machine
from tensorize.ir.precision import FLOAT, INTEGERS, ONE_DIGIT, TWO_DIGITS
from tensorize.ir.sites import Site
from tensorize.passes.allocate.forms import Forms
from tensorize.passes.curves.curve import Spectrum
from tensorize.passes.curves.rounding import Rounding

_STEPS = {ONE_DIGIT: 127, TWO_DIGITS: 127 * 254}
"""Steps from zero to the largest entry of a row of inputs."""


@dataclass(frozen=True)
class Inputs:
    """What inputs may be rounded to.

    ``asked``: as it is called in ``INPUTS``; None: one digit, or two where one would cost more than
    the rounding of the weight, and two are no slower than dense. ``packs``: whether a weight of
    fewer than eight bits may hold them as eight as well, which products of integers need.
    """

    asked: str | None = None
    packs: bool = True

    def of(
        self, forms: Forms, curve: Spectrum, ranks: np.ndarray, pivoted: int, rounding: Rounding
    ) -> Iterator[tuple[str, np.ndarray]]:
        """What they are rounded to at ranks of a form (0: the matrix itself): each with its own."""
        if len(ranks):
            alone = self._alone(curve.site, rounding.precision, forms.machine)
            if alone is not None:
                yield alone, ranks
                return
            weights = np.where(ranks > 0, rounding.low_rank.numpy()[ranks], rounding.dense)
            one = inputs_lost(curve, ranks, rounding.precision, ONE_DIGIT, forms.machine)
            slow = forms.slow(ranks, pivoted, rounding.precision, TWO_DIGITS)
            two = (one > weights) & ~slow
            parts = (ONE_DIGIT, ranks[~two]), (TWO_DIGITS, ranks[two])
            yield from (part for part in parts if len(part[1]))

    def _alone(self, site: Site, precision: str, machine: Machine) -> str | None:
        """What there is no choice of; None where there is one."""
        contracts = meets_rows(site)
        needs_packs = INTEGERS[precision].bits < 8 or "rows" in contracts
        if self.asked == FLOAT or (needs_packs and not self.packs) or not contracts:
            return FLOAT
        if not machine.multiplies_integers:
            return FLOAT if needs_packs else ONE_DIGIT
        return self.asked


def meets_rows(site: Site) -> set[str]:
    """The sides of a weight that rows of inputs meet in a product of two matrices."""
    if site.experts:
        return set()
    plain = (use for use in site.uses if not use.convolves and not use.partial)
    return {use.contract for use in plain} & {"columns", "rows"}


def inputs_lost(
    curve: Spectrum, ranks: np.ndarray, precision: str, inputs: str, machine: Machine
) -> np.ndarray:
    """What is lost by inputs that are rounded, too, as products of integers want: at each rank.

    Of rank 0 it is the matrix itself. A row has one step, and so the more noise the further its
    largest entry is out: of n entries of a normal distribution by sqrt(2 log n) deviations. Weights
    of fewer bits are rounded so as well, to eight.
    """
    if inputs == FLOAT or not machine.multiplies_integers:
        return np.zeros(len(ranks))
    m, n = curve.site.matrix
    logs = math.log(n if "columns" in meets_rows(curve.site) else m) + np.log(np.maximum(ranks, 1))
    steps = _STEPS[inputs] ** -2.0
    if INTEGERS[precision].bits < 8:
        steps += _STEPS[ONE_DIGIT] ** -2.0
    return float(curve.distortion[0]) * 2 * logs / 12 * steps
