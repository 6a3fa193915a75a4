"""Training on many devices."""

from tensorize.distributed.strategy import CLUSTERS, Cluster, Estimate, Strategy, StrategyPlan, plan
from tensorize.distributed.strategy import Workload as Workload

__all__ = ["CLUSTERS", "Cluster", "Estimate", "Strategy", "StrategyPlan", "Workload", "plan"]
