"""Training on many devices."""

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
    "Strategy",
    "StrategyPlan",
    "Timeline",
    "Workload",
    "plan",
]
