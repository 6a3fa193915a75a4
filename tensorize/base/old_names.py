"""Where things were before files moved into folders: pickles of that time name these places.

A model, a plan or a report that was pickled then loads as it did. Files that are gone stand in
``sys.modules`` from the start, so that importing one sets no attribute of the package, where a
function may have the same name; folders that took a file's name hand on what it held.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

_HELD = {
    "analysis": {"api.analysis": "Analysis"},
    "budget": {"ir.budget": "Budget"},
    "codegen.kernel": {"codegen.device.kernel": "Kernel"},
    "codegen.triton_module": {"codegen.triton.module": "Argument Source"},
    "codegen.triton_ops": {"codegen.device.operations": "TritonContraction"},
    "codegen.triton_work": {"codegen.triton.roles": "Tiles"},
    "errors": {
        "base.errors": "AnalysisError BudgetError CaptureError CheckpointError TensorizeError",
    },
    "evaluation": {
        "evaluation.evaluation": "Evaluation",
        "evaluation.results": "Figures Spectrum WeightFigures",
    },
    "graphs": {"graphview.graphs": "Graphs"},
    "healing": {"training.healing": "Healing"},
    "ir": {
        "ir.spec": "TTSpec",
        "ir.machine": "Machine",
        "ir.orders": "ContractionPiece ContractionPlan",
        "ir.sites": "Batch Site Use",
        "ir.plan": "Plan Prediction RankPlan Totals",
    },
    "measures": {"evaluation.quality": "ClassFigures Quality Worst"},
    "ops": {"weight.contractions": "Asked _again"},
    "passes.curves": {"passes.curves.curve": "SharedFactor Spectrum"},
    "passes.pipeline": {"passes.stages": "Program=Analysed"},
    "passes.metric": {"algebra.metric": "Metric"},
    "passes.predict": {"passes.predict.predictor": "Predictor Trial"},
    "passes.trains": {"formats.format": "TensorTrain"},
    "progress": {"base.progress": "no_progress"},
    "report": {
        "reports.data": "CurvePoint ReportTotals RunsBy SiteReport Stage",
        "reports.curve": "Curve",
        "reports.report": "Report",
    },
    "speed": {"evaluation.speed": "Speeds Timed"},
    "uses": {"capture.matmul": "Convolution Frame Matmul"},
    "weight": {
        "weight.low_rank": "LowRankLinear SharedProduct",
        "weight.cores": "Cores FactoredLinear _blank",
        "weight.whole_model": "limit_saved",
        "api.forms": "aligned pivoted plain",
    },
}
"""What a file held that is in pickles, by the file that holds it now; all below ``tensorize``.
``old=new`` where the name is another."""

_THERE = {"evaluation", "ir", "weight", "passes.curves", "passes.pipeline", "passes.predict"}


def hand_on(room: str) -> Callable[[str], Any]:
    """``__getattr__`` for a module of this name: what it held before, from where it is now."""
    held = _HELD[room.removeprefix("tensorize.")]
    homes = {}
    for home, names in held.items():
        for name in names.split():
            old, _, new = name.partition("=")
            homes[old] = home, new or old

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {room!r} has no attribute {name!r}")
        home, now = homes[name]
        return getattr(import_module(f"tensorize.{home}"), now)

    return find


class _Gone(ModuleType):
    """A file that is gone."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        vars(self)["__getattr__"] = hand_on(name)


def stand_in() -> None:
    """Let pickles find the files that are gone."""
    for old in _HELD.keys() - _THERE:
        name = f"tensorize.{old}"
        sys.modules[name] = _Gone(name)
