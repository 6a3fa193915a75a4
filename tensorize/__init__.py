"""tensorize: a compiler that makes dense PyTorch models small and fast.

model = tensorize.compile(model, budget=0.1)

Names are imported when they are asked for, so that a process that needs few of them loads little.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tensorize.base import hooks, old_names
from tensorize.version import __version__ as __version__

if TYPE_CHECKING:  # what type checkers read; Python reads the table below
    from tensorize.api.analysis import Analysis as Analysis
    from tensorize.api.analyze import analyze as analyze
    from tensorize.api.apply import apply as apply
    from tensorize.api.compile import compile as compile
    from tensorize.api.draft import draft as draft
    from tensorize.api.io import load as load
    from tensorize.api.io import save as save
    from tensorize.api.look import densify as densify
    from tensorize.api.look import graphs as graphs
    from tensorize.api.stream import compile_checkpoint as compile_checkpoint
    from tensorize.api.structure import load_dense as load_dense
    from tensorize.api.structure import restructure as restructure
    from tensorize.base.errors import AnalysisError as AnalysisError
    from tensorize.base.errors import BudgetError as BudgetError
    from tensorize.base.errors import CaptureError as CaptureError
    from tensorize.base.errors import CheckpointError as CheckpointError
    from tensorize.base.errors import FaultError as FaultError
    from tensorize.base.errors import TensorizeError as TensorizeError
    from tensorize.checking.injection import inject as inject
    from tensorize.checking.verbs import guard as guard
    from tensorize.checking.verbs import guard_report as guard_report
    from tensorize.checking.verbs import guarded as guarded
    from tensorize.checking.verbs import scrub as scrub
    from tensorize.codegen.device.kernel import Kernel as Kernel
    from tensorize.evaluation.evaluate import evaluate as evaluate
    from tensorize.evaluation.evaluation import Evaluation as Evaluation
    from tensorize.ir.budget import Budget as Budget
    from tensorize.ir.orders import ContractionPlan as ContractionPlan
    from tensorize.ir.plan import Plan as Plan
    from tensorize.ir.plan import Prediction as Prediction
    from tensorize.ir.sites import Site as Site
    from tensorize.ir.spec import TTSpec as TTSpec
    from tensorize.passes.orders.by_flops import plan_contraction as plan_contraction
    from tensorize.reports.attach import report as report
    from tensorize.reports.report import Report as Report
    from tensorize.running.emitted import kernels as kernels
    from tensorize.running.tuning import tune_kernels as tune_kernels
    from tensorize.training.distillation import distillation_loss as distillation_loss
    from tensorize.training.from_scratch import initialize as initialize
    from tensorize.training.healing import Healing as Healing
    from tensorize.training.healing import heal as heal
    from tensorize.vectors.separate import separate as separate

_HELD = {
    "api.analysis": "Analysis",
    "api.analyze": "analyze",
    "api.apply": "apply",
    "api.compile": "compile",
    "api.draft": "draft",
    "api.io": "load save",
    "api.look": "densify graphs",
    "api.stream": "compile_checkpoint",
    "api.structure": "load_dense restructure",
    "base.errors": "AnalysisError BudgetError CaptureError CheckpointError "
    "FaultError TensorizeError",
    "checking.verbs": "guard guard_report guarded scrub",
    "checking.injection": "inject",
    "codegen.device.kernel": "Kernel",
    "evaluation.evaluate": "evaluate",
    "evaluation.evaluation": "Evaluation",
    "ir.budget": "Budget",
    "ir.orders": "ContractionPlan",
    "ir.plan": "Plan Prediction",
    "ir.sites": "Site",
    "ir.spec": "TTSpec",
    "passes.orders.by_flops": "plan_contraction",
    "reports.attach": "report",
    "reports.report": "Report",
    "running.emitted": "kernels",
    "running.tuning": "tune_kernels",
    "training.distillation": "distillation_loss",
    "training.from_scratch": "initialize",
    "training.healing": "Healing heal",
    "vectors.separate": "separate",
}
_HOMES = {name: f"tensorize.{home}" for home, names in _HELD.items() for name in names.split()}

__all__ = sorted((*_HOMES, "__version__"))  # pyright: ignore[reportUnsupportedDunderAll]

_ROOMS = ("distributed", "training", "weight")
"""Folders whose names users call through the front door."""

old_names.stand_in()

# Other libraries learn of factorized models as soon as they are imported themselves.
hooks.when_imported("transformers.quantizers.auto", "tensorize.hub.pretrained")
hooks.when_imported("peft.tuners.lora.model", "tensorize.hub.lora")


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        if name in _ROOMS:
            return import_module(f"tensorize.{name}")
        raise AttributeError(f"module 'tensorize' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, *_ROOMS])
