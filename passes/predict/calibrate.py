"""Calibrate the prediction of the loss: a few trial plans, measured.

The sum of the curves predicts the rise of the loss to second order, and as if weights, inputs and
gradients were independent. For large compressions both fail, by a factor that changes slowly with
the size of the damage. So a few plans are tried on calibration batches, the dense weights replaced
for one forward pass (the model itself is not touched), and the ratio measured : predicted is
interpolated between them, on logarithmic scales. What refining the factors gains is measured in the
same way, at fewer points: it changes slowly with the size of the damage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from tensorize.base import printer
from tensorize.ir.plan import POLISH, REFIT, RUINED
from tensorize.ir.sites import Batch
from tensorize.ir.sufficiency import MOST_UNSEEN, OUTPUTS, Sufficiency
from tensorize.passes.allocate.allocate import smallest_share
from tensorize.passes.observe.loss import PreservedLoss
from tensorize.passes.observe.outputs import images_in
from tensorize.passes.predict.families import (
    REFIT_LOSSES,
    mixed,
    precisions_of,
    single_families,
    worth_of_families,
)
from tensorize.passes.predict.metrics import MetricFunction
from tensorize.passes.predict.predictor import Predictor, Trial
from tensorize.passes.predict.trials import Measurement, Measuring, Reference, trial_plan, untried
from tensorize.passes.rewrite.factorize import Cores, in_copy
from tensorize.passes.rewrite.pipeline import rewriting
from tensorize.passes.rewrite.polish import Polish
from tensorize.passes.stages import Analysed, Learned, Opened, Planned, Rewritten
from tensorize.weight.install import factored

TRIAL_SHARES = (0.9, 0.75, 0.5, 0.25, 0.1)
# A refit's gain changes slowly from half the parameters on, a polish's does not, and neither does
# that of a model with one output row a sample, where a table is the first to lose: it has no refit.
_REFINED_SHARES = {REFIT: (0.5, 0.25), POLISH: (0.75, 0.5, 0.25)}
_REFINED_POOLED = (0.75, 0.5, 0.25)


# A refinement leaves at least this share of a rise, as far as predictions go.
_NOTHING = 0.01


@dataclass(frozen=True)
class CalibratePrediction:
    """Makes the predictor, where there is a loss to preserve and data to measure it on.

    Trial plans are measured on ``held_out`` batches, or on those ``learnt`` from where there are
    none; ``refinements`` are measured as well, and so are ``metrics`` of the caller's.
    ``measuring`` gives what measures plans there, where the model is not in memory. No plan will
    keep less than a ``share`` of the parameters.
    """

    learnt: tuple[Batch, ...]
    held_out: tuple[Batch, ...]
    loss: PreservedLoss | None
    refinements: tuple[str, ...] = ()
    metrics: Mapping[str, MetricFunction] | None = None
    measuring: Callable[[], Measuring] | None = None
    share: float = 0.0
    name: str = "predict"

    @property
    def _batches(self) -> tuple[Batch, ...]:
        return self.held_out or self.learnt

    def run(self, learned: Learned) -> Analysed:
        if learned.metric != "loss" or self.loss is None:
            return _without(learned, "weights and inputs alone")
        if not any(curve.in_nats for curve in learned.spectra.values()):
            return _without(learned, "its gradients say nothing")
        reference = (
            Reference(learned.model, self._batches, self.loss, self.metrics)
            if self.measuring is None
            else self.measuring()
        )
        least = smallest_share(untried(learned))
        plans = {share: trial_plan(learned, trial_share(least, share)) for share in TRIAL_SHARES}
        # Of shares that come to one plan the first is tried.
        first = {p.plan.sites: share for share, p in reversed(plans.items()) if p is not None}
        chosen = {first[sites]: plans[first[sites]] for sites in reversed(first)}
        tried = {share: planned for share, planned in chosen.items() if planned is not None}
        found = reference.try_plans(learned, [p.plan.sites for p in tried.values()], cut=True)
        plain = [_trial(*each, None) for each in zip(tried.values(), found, strict=True)]
        lost = {share: trial.measured for share, trial in zip(tried, plain, strict=True)}
        refined = [
            (tried[share], refine)
            for refine in self.refinements
            for share in refined_shares(
                refine,
                lost,
                self.loss.unit,
                pooled=reference.one_row_a_sample,
                few=bool(learned.few),
                least=self.share,
            )
        ]
        trials = plain + self._measured(learned, refined, reference)
        without = None if self.held_out else reference.try_nothing(learned).rise
        ranks = Predictor(
            _ordered(trials),
            self.loss.unit,
            bool(self.held_out),
            self.refinements,
            without,
            metrics=reference.metrics,
            batches=len(self._batches),
            text_loss=reference.text_loss,
            row=reference.row,
            images=_images(learned, reference),
            sufficiency=_sufficiency(learned, reference),
        )
        predictor = self._with_families(ranks, learned, reference)
        notes = _of_few(learned, reference, bool(self.held_out))
        summary = f"measured : predicted {_ratios(predictor.trials) or 'nothing to measure'}"
        summary += f" ({self.loss.unit})"
        for family, worth in predictor.worth.items():
            summary += f"; {family} count {worth:.2f}"
        if predictor.rounded:
            summary += f"; with bits {_ratios(predictor.rounded)}"
        known = {"predictor": predictor, "summary": summary}
        return learned.to(Analysed, **known, notes=(*learned.notes, *notes))

    def _with_families(self, ranks: Predictor, learned: Learned, reference: Measuring) -> Predictor:
        """Where there are precisions, with what their families are worth, and their trials."""
        if not precisions_of(learned):
            return ranks
        tried = {
            family: self._measured(learned, [(each, None) for each in plans], reference)
            for family, plans in single_families(learned).items()
        }
        worth = worth_of_families(ranks, {k: _ordered(trials) for k, trials in tried.items()})
        plans = mixed(learned, worth)
        wanted: list[tuple[Planned, str | None]] = [(plan, None) for plan in plans.values()]
        if REFIT in self.refinements:
            wanted += [(plan, REFIT) for lost, plan in plans.items() if lost in REFIT_LOSSES]
        rounded = _ordered(self._measured(learned, wanted, reference))
        return replace(ranks, rounded=rounded, worth=worth)

    def _measured(
        self,
        learned: Learned,
        wanted: Sequence[tuple[Planned, str | None]],
        reference: Measuring,
    ) -> list[Trial]:
        """Plans with what is done to their factors, each tried."""
        plain = [planned for planned, refine in wanted if refine is None]
        sites = [planned.plan.sites for planned in plain]
        found = reference.try_plans(learned, sites, cut=False) if plain else []
        trials = [_trial(*each, None) for each in zip(plain, found, strict=True)]
        refined = [(planned, refine) for planned, refine in wanted if refine is not None]
        for done, (planned, refine) in enumerate(refined):
            learned.progress("prediction", done, len(refined))
            cores = partial(self._cores, learned, planned, refine)
            lost = reference.try_refined(learned, planned.plan.sites, cores)
            trials.append(_trial(planned, lost, refine))
        if refined:
            learned.progress("prediction", len(refined), len(refined))
        return trials

    def _cores(self, learned: Learned, planned: Planned, refine: str) -> Mapping[str, Cores]:
        """The factors of a plan, after what is done to them."""
        loss = self.loss
        assert loss is not None
        tried: Opened | Rewritten = planned.to(Opened, model=learned.model, cores={})
        for step in rewriting(
            refine,
            self.learnt,
            lambda: Polish(learned.model, self.learnt, self.held_out, loss),
            sink=in_copy if refine == POLISH else None,
            verified=False,
        ):
            tried = step.run(tried)
        if isinstance(tried, Opened):
            return tried.cores
        return {name: weight.plain_cores for name, weight in factored(tried.model)}


def refined_shares(
    refine: str, lost: Mapping[float, float], unit: str, *, pooled: bool, few: bool, least: float
) -> Iterator[float]:
    """Of the shares at which plans were tried, those at which a refinement of them is.

    ``lost``: what each lost, in ``unit``. Where a model is ruined, one trial tells enough.
    ``pooled``: it has one output row a sample; ``few``: weights met few rows. ``least`` is the
    smallest share that is asked for: what smaller trials say changes no prediction of larger ones.
    """
    wanted = _REFINED_POOLED if pooled else _REFINED_SHARES[refine]
    if refine == REFIT and few:
        # What is solved on few rows may lose on others what it gains on these.
        wanted = TRIAL_SHARES
    for share in (share for share in wanted if share in lost):
        yield share
        if share <= least or lost[share] > RUINED.get(unit, math.inf):
            return


def _ratios(trials: Sequence[Trial]) -> str:
    return ", ".join(f"{t.measured / t.raw:.2f}" for t in trials if t.refine is None)


def _trial(planned: Planned, found: Measurement, refine: str | None) -> Trial:
    raw = sum(site.predicted_loss for site in planned.plan.sites)
    return Trial(raw, found.rise, found.spread, found.output_error, refine, found.metrics)


def _images(learned: Learned, reference: Measuring) -> int:
    """How many images the batch holds by which uses were seen, where a row of outputs is one."""
    seen = learned.inputs
    return 0 if seen is None or reference.row != "image" else images_in(seen)


def _of_few(learned: Learned, reference: Measuring, held_out: bool) -> Iterator[str]:
    """What is to be said of few calibration data."""
    unseen = " that were held out" * held_out
    where = f"measured on {_rows(reference.rows)} of outputs{unseen}"
    if learned.few:
        name = _worst_off(learned)
        (m, n), (met, _) = learned.spectra[name].site.matrix, learned.few[name]
        others = f" and {len(learned.few) - 1} more" * (len(learned.few) > 1)
        yield (
            f"few calibration data: {name}{others} met fewer rows than they have columns "
            f"({_rows(met)} for {m} x {n}), so new data hold what none of these had; "
            f"what is predicted was {where}"
        )
    elif reference.rows < OUTPUTS:
        yield f"few calibration data: what is predicted was {where}"
    table = max(learned.unforeseen, key=learned.unforeseen.__getitem__, default="")
    if table and (share := learned.unforeseen[table]) > MOST_UNSEEN:
        yield (
            f"few calibration data: of lookups to come in {table} some {printer.percent(share)} "
            "are of rows (words, elements) that none of these met, which are judged by their "
            "weights alone"
        )


def _sufficiency(learned: Learned, reference: Measuring) -> Sufficiency:
    """How far the data suffice, as figures."""
    found = Sufficiency(outputs=min(reference.rows / OUTPUTS, 1.0))
    if learned.few:
        name = _worst_off(learned)
        met, columns = learned.few[name]
        found = replace(found, rows=met / columns, weight=name)
    if learned.unforeseen:
        table = max(learned.unforeseen, key=learned.unforeseen.__getitem__)
        found = replace(found, lookups=1.0 - learned.unforeseen[table], table=table)
    return found


def _worst_off(learned: Learned) -> str:
    """The weight that met the fewest rows for its size, of those that met few."""
    return min(learned.few, key=lambda name: learned.few[name][0] / learned.few[name][1])


def _rows(count: int) -> str:
    return f"{count} row{'s' * (count != 1)}"


def _without(learned: Learned, why: str) -> Analysed:
    return learned.to(Analysed, predictor=None, summary=f"no loss to predict: {why}")


def trial_share(least: float, share: float) -> float:
    """A share of a trial; where no model is so small, that of what can be saved at all."""
    return share if share > least else least + (1 - least) * share


def _ordered(trials: Sequence[Trial]) -> tuple[Trial, ...]:
    """Those that tell something, by growing damage."""
    return tuple(sorted(_positive(trials), key=lambda trial: trial.raw))


def _positive(trials: Sequence[Trial]) -> Iterator[Trial]:
    """Trials whose rise can be predicted from: those that are worse than the dense model.

    Refined factors may be better than it, by a loss of the caller's: then almost nothing is lost.
    """
    plain = {t.raw: t.measured for t in trials if t.refine is None}
    for trial in trials:
        least = 0.0 if trial.refine is None else _NOTHING * plain.get(trial.raw, 0.0)
        if max(trial.measured, least) > 0:
            yield replace(trial, measured=max(trial.measured, least))
