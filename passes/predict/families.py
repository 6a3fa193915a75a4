"""Plans with fewer bits to try, and what a distortion of each family of forms is worth.

One function takes the sum of distortions to the loss, whatever the weights have become. But where
entries are rounded a plan loses less than one of ranks alone with the same sum. So plans of a
single family are measured, and its distortions count as much as those of ranks that cost the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from tensorize.ir.precision import INTEGERS
from tensorize.ir.spec import DENSE, LOW_RANK
from tensorize.passes.allocate.forms import BITS, BOTH
from tensorize.passes.curves.precisions import AUTO
from tensorize.passes.predict.predictor import Predictor, Trial
from tensorize.passes.predict.trials import losing
from tensorize.passes.stages import Learned, Planned

FAMILY_LOSSES = (0.003, 0.1)
"""What plans of one family lose, as the curves say."""

MIXED_LOSSES = (0.001, 0.01, 0.1, 1.0)
"""What plans of all that is allowed lose."""

REFIT_LOSSES = (0.01, 0.1)
"""Those of them that are tried with a refit as well."""

# In logarithms: how far from 1 the worth of a family may be, and how much its trials scatter.
_FAMILIES_SPREAD, _TRIALS_SPREAD = 0.5, 0.3


def precisions_of(learned: Learned) -> tuple[str, ...]:
    """The integers that were analysed."""
    known = {each.precision for curve in learned.spectra.values() for each in curve.roundings}
    return tuple(name for name in INTEGERS if name in known)


def single_families(learned: Learned) -> dict[str, list[Planned]]:
    """Plans in which every weight is rounded: as it is, or in its factors."""
    names = precisions_of(learned)
    found: dict[str, list[Planned]] = {}
    for family, form in ((BITS, DENSE), (BOTH, LOW_RANK)):
        if all(form in curve.formats for curve in learned.spectra.values()):
            how = {"formats": dict.fromkeys(learned.spectra, (form,)), "precision": names}
            plans = {lost: losing(learned, lost, {}, **how) for lost in FAMILY_LOSSES}
            found[family] = list(_different(plans).values())
    return found


def mixed(learned: Learned, worth: Mapping[str, float]) -> dict[float, Planned]:
    """Plans of all that is allowed, by what they lose.

    ``worth``: what distortions of each family count.
    """
    plans = {lost: losing(learned, lost, worth, precision=AUTO) for lost in MIXED_LOSSES}
    return _different(plans)


def worth_of_families(ranks: Predictor, trials: Mapping[str, Sequence[Trial]]) -> dict[str, float]:
    """By what the distortions of each family are to be multiplied, to cost what those of ranks do.

    That is a mean over its trials on logarithmic scales, which is the nearer to 1 the fewer they
    are and the more they scatter. ``ranks`` predicts what ranks alone lose.
    """
    found: dict[str, float] = {}
    for family, those in trials.items():
        weights = [1 / (_TRIALS_SPREAD**2 + trial.spread**2) for trial in those]
        logs = [math.log(ranks.inverse(trial.measured) / trial.raw) for trial in those]
        total = sum(weight * log for weight, log in zip(weights, logs, strict=True))
        found[family] = math.exp(total / (sum(weights) + _FAMILIES_SPREAD**-2))
    return found


def _different(plans: Mapping[float, Planned | None]) -> dict[float, Planned]:
    """Of those that do the same the first."""
    first: dict[object, tuple[float, Planned]] = {}
    for lost, planned in plans.items():
        if planned is not None:
            first.setdefault(planned.plan.sites, (lost, planned))
    return dict(first.values())
