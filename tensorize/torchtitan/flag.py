# pyright: reportMissingImports=false
"""One flag of torchtitan's command line that compresses any of its Llamas.

--override.imports 'tensorize.torchtitan.flag.low_rank={"keep": 0.25}'
"""

from __future__ import annotations

from torchtitan.config.override import override
from torchtitan.models.common.linear import Linear

from tensorize.torchtitan.convert import KEEP, WEIGHTS, factored
from tensorize.torchtitan.layer import LowRank


@override(target=Linear.Config, fqns=[f"*{name}" for name in WEIGHTS], description="low rank")
def low_rank(config: Linear.Config, keep: float = KEEP) -> LowRank.Config:
    """A layer of low rank in place of a dense one of attention or MLP."""
    return factored(config, keep)
