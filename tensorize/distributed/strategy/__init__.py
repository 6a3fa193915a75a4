"""Which strategy trains a model fastest on so many devices: a model of its step, and a search."""

from tensorize.distributed.strategy.cluster import CLUSTERS, Cluster
from tensorize.distributed.strategy.estimate import Estimate
from tensorize.distributed.strategy.plan import StrategyPlan, plan
from tensorize.distributed.strategy.simulate import Timeline
from tensorize.distributed.strategy.strategy import Strategy
from tensorize.distributed.strategy.workload import Workload

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
