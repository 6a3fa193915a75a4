"""What ``tensorize.save(coded=)`` may be, and what codes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from tensorize.api.analysis import Analysis
from tensorize.base.errors import AnalysisError, BudgetError
from tensorize.base.tensors import unwrapped
from tensorize.cache import analyses as disk
from tensorize.coding.tensors import Coding, encode
from tensorize.ir.budget import Budget
from tensorize.ir.plan import Plan
from tensorize.passes.filling.coder import Filled, allowed, coded, summary, within_bytes
from tensorize.passes.filling.fill import Filling
from tensorize.passes.filling.weights import weights_of
from tensorize.passes.stages import Analysed
from tensorize.reports.attach import report
from tensorize.store.coded import CodedGroup, CodedTensors, Coder, lossless, within
from tensorize.store.contents import dtype_name, slots_of

LOSSLESS = "lossless"

_SAID = 24
"""Bytes that a file says of every tensor and every stream, about."""


def coder_for(
    model: nn.Module, asked: str | Budget | None, analysis: Analysis | None
) -> Coder | None:
    """What codes a model's tensors as a caller asks for it; None: nothing does.

    Raises:
        BudgetError: it is nothing that a file can be.
        AnalysisError: nothing says how errors of the model's weights count.
    """
    if asked is None:
        return None
    if asked == LOSSLESS:
        return lossless
    limit = _only_limit(asked)
    if limit == "entry_error":
        assert isinstance(asked, Budget)
        assert asked.entry_error is not None
        return within(asked.entry_error)
    assert isinstance(asked, Budget)
    model = unwrapped(model)
    plan = report(model).plan
    program = _program(plan, analysis)
    return _InMetric(model, program, plan, asked)


def _only_limit(asked: Any) -> str:
    """The one limit of a budget of a file."""
    given = (
        [f.name for f in fields(Budget) if getattr(asked, f.name, None) is not None]
        if isinstance(asked, Budget)
        else []
    )
    if len(given) == 1 and given[0] in ("file", "loss", "entry_error"):
        return given[0]
    raise BudgetError(
        f"coded={asked!r} is nothing that a file can be",
        way_out='coded="lossless", or one limit: coded=tensorize.Budget(file=0.15), '
        "tensorize.Budget(loss=0.01) or tensorize.Budget(entry_error=1e-4)",
    )


def _program(plan: Plan, analysis: Analysis | None) -> Analysed:
    """What is known of how errors of a model's weights count."""
    if analysis is not None:
        if analysis.fingerprint != plan.fingerprint:
            raise AnalysisError(
                "the analysis is of another model than the plan that this one was made by",
                way_out="pass the analysis whose plan was applied",
            )
        return analysis.program
    found = None if plan.cache is None else disk.read(plan.cache)
    if found is None:
        raise AnalysisError(
            "nothing says how errors of this model's weights count: its analysis is not at hand",
            way_out="pass analysis=tensorize.analyze(dense_model, calibration=...), the one that "
            "it was made by, or compile with cache_dir=, where it is kept; "
            "coded=tensorize.Budget(entry_error=...) needs none",
        )
    return found


class _InMetric:
    """Codes the weights in their metrics, and all else without loss."""

    def __init__(self, model: nn.Module, program: Analysed, plan: Plan, asked: Budget) -> None:
        self._asked, self._plan = asked, plan
        self._filling = Filling(list(weights_of(model, program.spectra)))
        keys: dict[int, str] = {}
        for slot in slots_of(model):
            keys.setdefault(id(slot.tensor), slot.key)
        self._keys: Mapping[int, str] = keys
        self._predictor = program.predictor
        if asked.loss is not None and self._predictor is None:
            raise AnalysisError(
                "this analysis cannot predict a loss, as it saw no data",
                way_out="analyze(model, calibration=...), or coded=tensorize.Budget(file=...)",
            )

    @torch.no_grad()
    def __call__(self, stored: Mapping[str, Tensor]) -> CodedTensors:
        metric = {
            self._keys[id(tensor)] for each in self._filling.weights for tensor in each.tensors
        }
        others = {key: encode(tensor) for key, tensor in stored.items() if key not in metric}
        if self._asked.loss is not None:
            assert self._predictor is not None
            limit = allowed(self._predictor, self._asked.loss)
            made = coded(self._filling, self._filling.within_distortion(limit))
        else:
            given = Budget(bytes=self._asked.file).limits(self._plan.dense)["bytes"]
            made = within_bytes(
                self._filling,
                int(given),
                lambda made: self._all(others, made).size - made.bytes,
                sum(len(data) for _, data in others.values()) + _SAID * (len(stored) + 24),
            )
        return self._all(others, made)

    def _all(self, others: Mapping[str, tuple[Coding, bytes]], made: Filled) -> CodedTensors:
        together = []
        for tensors, group, data in made.groups:
            names = tuple(self._keys[id(tensor)] for tensor in tensors)
            dtypes = tuple(dtype_name(tensor.dtype) for tensor in tensors)
            shapes = tuple(tuple(tensor.shape) for tensor in tensors)
            together.append((CodedGroup(names, dtypes, shapes, group), data))
        known = {"asked": str(self._asked), **summary(made, self._predictor)}
        errors = {self._keys[tensor]: error for tensor, error in made.errors.items()}
        return CodedTensors(others, together, known, errors)
