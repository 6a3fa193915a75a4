# pyright: reportMissingImports=false
"""A linear layer of low rank as torchtitan declares modules, and how tensor parallelism splits it.

A weight that torchtitan splits by rows (queries, keys, values, gate and up) becomes a first factor
that every rank has whole and a second one that is split by rows: what the ranks send is what the
dense layer sent. One that it splits by columns (output and down) becomes a first factor that is
split by columns, whose products are summed, and a second one that every rank has whole: r numbers
are sent for a token in place of the layer's outputs.

The trainer sets a layer's sharding after converters have run, as of a dense one. So the two layers'
own follow from it when the layer is built, and no sooner.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import spmd_types as spmd
from torch import Tensor
from torchtitan.config.configurable import Configurable
from torchtitan.models.common.decoder_sharding import (
    dense_activation_placement,
    dense_param_placement,
)
from torchtitan.models.common.linear import Linear
from torchtitan.protocols.module import Module
from torchtitan.protocols.sharding import ShardingConfig

from tensorize.base.errors import CaptureError

ROWS, COLUMNS = (dense_param_placement(tp=spmd.S(axis)) for axis in (0, 1))


class Factor(Linear):
    """One of the two layers: no plain linear layer, so that it is not compressed again."""

    @dataclass(kw_only=True, slots=True)
    class Config(Linear.Config):
        pass


class LowRank(Module):
    """y = second(first(x))."""

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        """The two layers; ``sharding_config`` is what the dense one would have."""

        first: Linear.Config
        second: Linear.Config

        def build(self, **kwargs: Any) -> LowRank:
            first, second = _split(self.sharding_config)
            layers = {
                "first": replace(self.first, sharding_config=first),
                "second": replace(self.second, sharding_config=second),
            }
            return Configurable.Config.build(replace(self, **layers), **kwargs)

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.first = config.first.build()
        self.second = config.second.build()

    def forward(self, input: Tensor) -> Tensor:
        return self.second(self.first(input))


def _split(dense: ShardingConfig | None) -> tuple[ShardingConfig | None, ShardingConfig | None]:
    """How the two factors are split where the dense weight is split so."""
    if dense is None:
        return None, None
    weight = dense.state_shardings["weight"]
    if weight == ROWS:
        return ShardingConfig(state_shardings={"weight": dense_param_placement(tp=spmd.R)}), dense
    if weight != COLUMNS:
        raise CaptureError(
            f"a weight that is placed as {weight} is not known",
            way_out="tensor_parallel_degree=1, or weights= without it",
        )
    # Tokens that are apart (sequence parallelism) each add to the second factor's gradient.
    together = dense.out_dst_shardings == dense_activation_placement(tp=spmd.I)
    whole = dense_param_placement(tp=spmd.I if together else spmd.R)
    first = replace(dense, state_shardings={"weight": weight})
    return first, ShardingConfig(state_shardings={"weight": whole, "bias": whole})
