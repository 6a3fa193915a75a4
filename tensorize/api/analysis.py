"""The expensive stage, done once: every weight's curve, and the plans that follow from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from weakref import WeakKeyDictionary

from torch import nn

from tensorize.api.options import Options
from tensorize.base import printer
from tensorize.base.errors import AnalysisError, BudgetError
from tensorize.ir.budget import Budget
from tensorize.ir.plan import POLISH, REFIT, Plan, Prediction
from tensorize.ir.sites import Batch
from tensorize.ir.sufficiency import Sufficiency
from tensorize.passes.allocate.allocate import BATCH_SIZES, Allocate, RanksOption
from tensorize.passes.curves.formats import FormatsOption, formats_by_site
from tensorize.passes.curves.precisions import PrecisionOption, check_own, integers
from tensorize.passes.observe.loss import LossOption
from tensorize.passes.pipeline import run_passes
from tensorize.passes.stages import Analysed, Planned
from tensorize.reports.curve import Curve
from tensorize.reports.data import CurvePoint

NO_REFIT = "no refit"
"""How the note begins that says why there was none."""

AS_ANALYSED = "as analysed"

CURVE_BUDGETS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9)


@dataclass(frozen=True, eq=False)
class Analysis:
    """What was learned of one model: its sites, their curves, and how to predict the loss.

    Made by ``tensorize.analyze``; it keeps the calibration data alive, which refining the factors
    needs, and not the model.

    Examples:
        >>> analysis = tensorize.analyze(dense, example_inputs=inputs)
        >>> analysis.metric
        'frobenius'
        >>> analysis.plan(0.5).predicted.parameters <= 0.5 * analysis.plan(0.5).dense.parameters
        True
    """

    program: Analysed
    fingerprint: str
    cache: str | None = None
    calibration: tuple[Batch, ...] = ()
    loss_fn: LossOption = None
    precision: PrecisionOption = None
    activations: str | None = None

    @property
    def metric(self) -> str:
        """``frobenius``, ``input`` or ``loss``."""
        return self.program.metric

    @property
    def unit(self) -> str | None:
        """What its loss is counted in; None where it predicts none."""
        return None if self.program.predictor is None else self.program.predictor.unit

    @property
    def notes(self) -> tuple[str, ...]:
        return self.program.notes

    @property
    def sufficiency(self) -> Sufficiency | None:
        """How far the calibration data suffice; None where no loss is predicted from any."""
        return None if self.program.predictor is None else self.program.predictor.sufficiency

    def plan(
        self,
        budget: float | str | Budget | None,
        *,
        refine: str | None = "auto",
        formats: FormatsOption = None,
        precision: PrecisionOption = AS_ANALYSED,
        activations: str | None = AS_ANALYSED,
        ranks: RanksOption = None,
        batch_sizes: Sequence[int] = BATCH_SIZES,
        rank_multiple: int | None = None,
    ) -> Plan:
        """The best formats and ranks within a budget, in milliseconds.

        Args:
            budget: a share of the parameters, a ``Budget``, "auto" and the like, as in ``compile``,
                or None where ``ranks`` says it all.
            refine: what ``apply`` does to the factors: None, ``"refit"`` or ``"polish"``; "auto" is
                a refit where there are calibration data and no limit on single errors.
            formats: which formats may be used, among those that were analysed.
            precision: which precisions, likewise; by default those that were analysed. With any, a
                budget that is a share is one of the bytes.
            activations: what a CPU rounds inputs of quantized weights to; by default as analysed.
            ranks: pattern → rank or ``"full"``; overrides the allocation.
            batch_sizes: input rows at which FLOPs are counted; the worst counts.
            rank_multiple: low ranks are multiples of this (or smaller than it), as matrix units
                want; None: 8 for a GPU, 1 for a CPU, where it gains nothing.

        Raises:
            BudgetError: no choice satisfies the budget; it names the nearest feasible value.
            AnalysisError: ``refine`` needs data or predictions that this analysis has not, or
                ``formats`` or ``ranks`` do not fit its weights.
        """
        given = locals()
        open_ = [name for name in ("precision", "activations") if given[name] == AS_ANALYSED]
        Options.of({**given, **dict.fromkeys(open_)})  # what is wrong is said before any work
        return planned(self, Options.of({**given, **{name: getattr(self, name) for name in open_}}))

    def _allocation(self, options: Options) -> Allocate:
        options.check_choice()
        budget = options.limits(self.unit)
        chosen, multiple = None, options.rank_multiple
        if options.formats is not None:
            chosen = formats_by_site(self.program.free, options.formats)
            for site in self.program.free:
                self.program.spectra[site.name].require(chosen[site.name])
        self._require(options.precision)
        refine, why_not = self._refinement(options.refine, budget, options.precision)
        return Allocate(
            budget,
            ranks=options.ranks,
            formats=chosen,
            batch_sizes=options.batch_sizes,
            refine=refine,
            precision=options.precision,
            activations=options.activations,
            notes=() if why_not is None else (f"{NO_REFIT}: {why_not}",),
            rank_multiple=self.program.machine.rank_multiple if multiple is None else multiple,
            fingerprint=self.fingerprint,
            pivots=options.backend != "triton",  # whose other kernels read whole factors only
        )

    def _require(self, precision: PrecisionOption) -> None:
        """Raises AnalysisError for a precision that was not analysed, or that no weight has."""
        check_own(precision, {site.dtype for site in self.program.free})
        known = integers(self.precision)
        for name in integers(precision):
            if name not in known:
                raise AnalysisError(
                    f"the precision {name!r} was not analysed (only {', '.join(known) or 'none'})",
                    way_out=f"analyse with precision={(*known, name)!r}",
                )

    def _refinement(
        self, refine: str | None, budget: Budget | None, precision: PrecisionOption
    ) -> tuple[str | None, str | None]:
        """What ``refine`` comes to, and why "auto" is no refit.

        Raises:
            AnalysisError: it cannot be done or predicted.
        """
        predictor = self.program.predictor
        if refine == "auto":
            if not self.calibration:
                return None, None  # nobody gave data
            if budget is not None and budget.error is not None:
                return None, "it moves errors between weights, and the budget limits each"
            if predictor is not None and integers(precision):
                predictor = predictor.with_bits
            if predictor is not None and not predictor.pays(REFIT):
                return None, "in trials it did not lower the loss"
            return REFIT, None
        if refine is None:
            return None, None
        if not self.calibration:
            raise AnalysisError(
                f"refine={refine!r} needs calibration data", way_out="analyse with calibration="
            )
        if refine == POLISH and (predictor is None or POLISH not in predictor.refinements):
            raise AnalysisError(
                "this analysis cannot predict what a polish gains",
                way_out="analyse for it: analyze(model, calibration=calibration, refine='polish')",
            )
        return refine, None

    def curve(self, budgets: Sequence[float] | None = None) -> Curve:
        """Predicted quality, parameters, bytes and FLOPs for several budgets.

        With ``budgets=None`` a ladder from 0.05 to 0.9 of which the feasible part is shown. Where
        precisions were analysed they are shares of the bytes, and what ranks alone give stands
        beside.

        Raises:
            BudgetError: one of the given budgets is not feasible.
        """
        several = budgets is None or isinstance(budgets, Sequence)
        if not several or not all(isinstance(b, float | int) for b in budgets or ()):
            raise BudgetError(
                f"budgets are shares of the parameters, got {budgets!r}",
                way_out="curve([0.25, 0.5]), and plan(tensorize.Budget(bytes=1e6)) for others",
            )
        points: list[CurvePoint] = []
        demand = None
        for budget in CURVE_BUDGETS if budgets is None else budgets:
            allocation = self._asked(budget, self.precision)
            demand = demand or allocation.demand(self.program)
            try:
                planned = allocation.within(demand)
            except BudgetError:
                if budgets is not None:
                    raise
                continue
            point = CurvePoint(**vars(planned.plan.predicted), budget=budget)
            alone = self.ranks_alone(Budget(stored=budget))
            points.append(replace(point, ranks_alone=alone))
        return Curve(tuple(points), self.metric)

    def predicted(self, budget: Budget, refine: str | None) -> Prediction:
        """What the plan for a budget is predicted to give, where factors are refined so."""
        return self._predicted(budget, self.precision, refine)

    def _predicted(
        self, budget: float | Budget, precision: PrecisionOption, refine: str | None = "auto"
    ) -> Prediction:
        return self._asked(budget, precision, refine).run(self.program).plan.predicted

    def _asked(
        self, budget: float | Budget, precision: PrecisionOption, refine: str | None = "auto"
    ) -> Allocate:
        asked = {"precision": precision, "activations": self.activations, "refine": refine}
        return self._allocation(Options.of({"budget": budget, **asked}))

    def ranks_alone(self, budget: Budget) -> float | None:
        """The predicted quality of ranks alone within a budget, where bits were analysed as well.

        None where there is none.
        """
        if not integers(self.precision):
            return None
        try:
            predicted = self._predicted(budget, None)
        except BudgetError:
            return None
        return predicted.output_error if predicted.loss is None else predicted.loss

    def others(self, budget: Budget, precision: PrecisionOption) -> Iterator[str]:
        """What other choices of precisions would lose within a budget, among those analysed."""
        if not integers(self.precision):
            return
        asked = integers(precision), precision is None
        for each, called in ((None, "ranks alone are"), (self.precision, "all precisions are")):
            if (integers(each), each is None) == asked:
                continue
            try:
                predicted = self._predicted(budget, each)
            except BudgetError:
                continue
            lost = predicted.output_error if predicted.loss is None else predicted.loss
            yield f"at as many bytes {called} predicted to lose {printer.number(lost)}"

    def __str__(self) -> str:
        return (
            f"analysis in the {self.metric} metric: {len(self.program.free)} of "
            f"{len(self.program.sites)} weights can be factorized\n{self.curve()}"
        )


@dataclass(frozen=True, eq=False)
class AnalysedPlan(Plan):
    """A plan that carries the analysis that it comes from, whose factors ``apply`` uses."""

    analysis: Analysis | None = field(default=None, compare=False, repr=False)


def planned(analysis: Analysis, options: Options) -> AnalysedPlan:
    """``Analysis.plan`` with its options as one record."""
    plan = run_passes(analysis.program, (analysis._allocation(options),), Planned).plan
    plan = replace(plan, cache=analysis.cache, own_loss=analysis.loss_fn is not None)
    budget = options.limits(analysis.unit)
    if budget is not None and budget.of_bytes.bytes is not None:
        plan = replace(plan, notes=(*plan.notes, *analysis.others(budget, options.precision)))
    return AnalysedPlan(**vars(plan), analysis=analysis)


_of_models: WeakKeyDictionary[nn.Module, Analysis] = WeakKeyDictionary()
"""The analyses of models whose plans limit their files: ``save(coded=True)`` needs them."""


def keep_analysis(model: nn.Module, analysis: Analysis) -> None:
    """Keep an analysis as long as a model that was made by it; not with copies of this."""
    _of_models[model] = analysis


def kept_analysis(model: nn.Module) -> Analysis | None:
    """What was kept with a model."""
    return _of_models.get(model)


def analysis_of(plan: Plan) -> Analysis | None:
    """The analysis that a plan carries; one that was pickled before has it as an attribute, too."""
    return getattr(plan, "analysis", None)
