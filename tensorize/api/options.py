"""The options of the verbs, of the backend and of the command line: one record.

A field is an option: its default, and what checks it. What it means stands in the docstring of
``compile``, and in the words of the command line (``cli/options.py``). Functions that users call
have signatures of their own, make the record of them, and hand it on.
"""
# ruff: noqa: RUF009 -- _option gives a field

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

import torch

from tensorize.base.errors import AnalysisError, BudgetError, CaptureError, check_one_of
from tensorize.base.progress import Progress
from tensorize.capture.batches import ToInputs, check_batches
from tensorize.capture.synthetic import is_self
from tensorize.ir.budget import AUTO, AUTO_LOSSES, Budget, as_written, parse_bytes
from tensorize.ir.choices import Activations, Backend, Inner, Metric, Refine
from tensorize.ir.plan import POLISH, REFIT, THE_CALLERS
from tensorize.passes.allocate.allocate import BATCH_SIZES, RanksOption, check_ranks
from tensorize.passes.curves.formats import FormatsOption, check_formats
from tensorize.passes.curves.precisions import PrecisionOption, check_precision
from tensorize.passes.observe.loss import LossOption, check_loss
from tensorize.passes.observe.select import Select, check_select
from tensorize.passes.predict.metrics import MetricFunction, check_metrics

OF_WEIGHTS = "frobenius", "input"
"""Metrics that predict no loss."""


def _option(default: Any, check: Callable[[Any], Any]) -> Any:
    """A field. ``check`` gives a value as it is used, or raises."""
    return field(default=default, metadata={"check": check})


def _budget(given: Any) -> Any:
    if given is None or (isinstance(given, str) and given == AUTO):
        return given
    return Budget.of(given)


def _data(given: Any) -> Any:
    return given if is_self(given) else check_batches(given, "calibration")


def _function(given: Any) -> Any:
    if not callable(given):
        raise CaptureError(
            f"to_inputs={given!r} is no function", way_out="to_inputs=lambda batch: batch[0]"
        )
    return given


def _seed(given: Any) -> int:
    try:
        return operator.index(given)
    except TypeError:
        raise AnalysisError(f"seed must be an integer, got {given!r}", way_out="seed=0") from None


@dataclass(frozen=True, eq=False, kw_only=True)
class Options:
    """What a caller chose, checked as far as it can be without the model.

    Raises:
        TensorizeError: a value that an option cannot have; of the kind that ``compile`` names.
    """

    budget: Budget | Literal["auto"] | None = _option(0.1, _budget)
    example_inputs: Any = None
    calibration: Iterable[Any] | str | None = _option(None, _data)
    tokenizer: Any = None
    to_inputs: ToInputs | None = _option(None, _function)
    loss_fn: LossOption = _option(None, check_loss)
    metrics: Mapping[str, MetricFunction] | None = _option(None, check_metrics)
    metric: Metric | None = _option(
        None, lambda given: check_one_of("metric", given, get_args(Metric), AnalysisError)
    )
    refine: Refine = _option(
        "auto", lambda given: check_one_of("refine", given, get_args(Refine), AnalysisError)
    )
    include: Select = _option(None, check_select)
    exclude: Select = _option(None, check_select)
    formats: FormatsOption = _option(None, check_formats)
    precision: PrecisionOption = _option(None, check_precision)
    activations: Activations = _option(
        None,
        lambda given: check_one_of("activations", given, get_args(Activations), AnalysisError),
    )
    ranks: RanksOption = _option(None, check_ranks)
    batch_sizes: Sequence[int] = BATCH_SIZES
    rank_multiple: int | None = None
    backend: Backend = _option(
        "auto", lambda given: check_one_of("backend", given, get_args(Backend))
    )
    inner: Inner = _option(
        "auto", lambda given: check_one_of("options['inner']", given, get_args(Inner))
    )
    autotune: bool = False
    inplace: bool = False
    seed: int = _option(0, _seed)
    device: torch.device | str | None = None
    cache_dir: str | os.PathLike[str] | None = None
    scratch: str | os.PathLike[str] | None = None
    max_memory: int | None = _option(None, parse_bytes)
    progress: Progress | bool | None = None

    def __post_init__(self) -> None:
        share = as_written(self.budget)
        for each in fields(self):
            check, given = each.metadata.get("check"), getattr(self, each.name)
            left_open = given is None and each.default is None
            if check is not None and not left_open:
                object.__setattr__(self, each.name, check(given))
        if isinstance(share, float) and self.precision is not None:
            object.__setattr__(self, "budget", Budget(stored=share))

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Options:
        """The options among the arguments of a call: ``locals()``, at its start."""
        names = cls.__dataclass_fields__
        return cls(**{name: value for name, value in given.items() if name in names})

    @property
    def share(self) -> float:
        """The share of the parameters that plans keep, as far as the budget says; 0: it does not.

        An analysis of no budget has the small one that is the default.
        """
        if not isinstance(self.budget, Budget):
            return 0.0
        given = (self.budget.params, self.budget.bytes, self.budget.stored)
        return next((limit for limit in given if isinstance(limit, float)), 0.0)

    @property
    def says_nothing_of_data(self) -> bool:
        """Whether data, metric and loss are all left open."""
        return self.calibration is None and self.metric is None and self.loss_fn is None

    def check_choice(self) -> None:
        """Raises BudgetError for what no analysis can make a plan of."""
        if self.budget is None and self.ranks is None:
            raise BudgetError("budget=None needs ranks=", way_out="give a budget such as 0.1")
        if isinstance(self.budget, Budget):
            self.budget.check_of_plan()
        self.check_errors_stay(isinstance(self.budget, Budget) and self.budget.error is not None)
        if self.metric in OF_WEIGHTS:
            self.limits(None)
        if callable(self.loss_fn):
            self.limits(THE_CALLERS)

    def limits(self, unit: str | None) -> Budget | None:
        """The budget, "auto" by what the loss is counted in (None: none is predicted).

        Raises:
            BudgetError: it is "auto", and there is no loss of a known unit to predict.
        """
        if not isinstance(self.budget, str):
            return self.budget
        if unit is None:
            raise BudgetError(
                f"budget={AUTO!r} limits the predicted rise of the loss, and weights alone predict "
                "none",
                way_out='calibration= (data, or "self"), or a share such as budget=0.5',
            )
        if unit not in AUTO_LOSSES:
            raise BudgetError(
                f"budget={AUTO!r} cannot know what is much in a loss_fn",
                way_out="budget=tensorize.Budget(loss=…), the largest rise that you accept",
            )
        return Budget(loss=AUTO_LOSSES[unit])

    def check_errors_stay(self, limited: bool) -> None:
        """Raises BudgetError where single errors are limited, and a refinement would move them."""
        if limited and self.refine in (REFIT, POLISH):
            raise BudgetError(
                f"refine={self.refine!r} moves errors between weights, and the budget limits each",
                way_out="refine=None, or limit the loss instead of the error",
            )

    def check_data(self) -> None:
        """Raises AnalysisError for a metric or a loss that lacks the calibration data."""
        alone = self.metric in (None, "frobenius")
        if self.metrics is not None and (self.calibration is None or self.metric in OF_WEIGHTS):
            raise AnalysisError(
                "metrics= are predicted from the loss, which needs calibration data",
                way_out="pass calibration=, and no metric= but 'loss'",
            )
        if self.calibration is None and not (alone and self.loss_fn is None):
            name = "loss_fn" if alone else f"metric={self.metric!r}"
            raise AnalysisError(f"{name} needs calibration data", way_out="pass calibration=")
