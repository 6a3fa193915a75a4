"""Training across machines: models in parts and checkpoints for any mesh, by PyTorch's engine."""

from tensorize.distributed.checkpoints import Saving, load, save
from tensorize.distributed.parallelize import parallelize
from tensorize.distributed.pipeline import schedule
from tensorize.distributed.strategy import (
    CLUSTERS,
    Cluster,
    Estimate,
    Strategy,
    StrategyPlan,
    Timeline,
    Workload,
    plan,
)

__all__ = [
    "CLUSTERS",
    "Cluster",
    "Estimate",
    "Saving",
    "Strategy",
    "StrategyPlan",
    "Timeline",
    "Workload",
    "load",
    "parallelize",
    "plan",
    "save",
    "schedule",
]
