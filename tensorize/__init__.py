"""tensorize: a compiler that makes dense PyTorch models small and fast.

model = tensorize.compile(model, budget=0.1)
"""

from tensorize.analysis import Analysis
from tensorize.api import (
    analyze,
    apply,
    compile,
    compile_checkpoint,
    densify,
    graphs,
    load,
    save,
)
from tensorize.budget import Budget
from tensorize.distillation import distillation_loss
from tensorize.emitted import kernels
from tensorize.errors import (
    AnalysisError,
    BudgetError,
    CaptureError,
    CheckpointError,
    TensorizeError,
)
from tensorize.evaluation import Evaluation, evaluate
from tensorize.healing import Healing, heal
from tensorize.ir import ContractionPlan, Plan, Prediction, Site, TTSpec
from tensorize.passes.order import plan_contraction
from tensorize.report import Report, report
from tensorize.runtime import Kernel
from tensorize.training import initialize
from tensorize.tuning import tune_kernels
from tensorize.version import __version__

__all__ = [
    "Analysis",
    "AnalysisError",
    "Budget",
    "BudgetError",
    "CaptureError",
    "CheckpointError",
    "ContractionPlan",
    "Evaluation",
    "Healing",
    "Kernel",
    "Plan",
    "Prediction",
    "Report",
    "Site",
    "TTSpec",
    "TensorizeError",
    "__version__",
    "analyze",
    "apply",
    "compile",
    "compile_checkpoint",
    "densify",
    "distillation_loss",
    "evaluate",
    "graphs",
    "heal",
    "initialize",
    "kernels",
    "load",
    "plan_contraction",
    "report",
    "save",
    "tune_kernels",
]
