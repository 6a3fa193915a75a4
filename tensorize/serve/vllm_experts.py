# pyright: reportMissingImports=false
"""vLLM's layers of experts, run through factors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe.activation import MoEActivation, apply_moe_activation
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.utils import set_weight_attrs

from tensorize.serve.experts import DOWN, UP, Stack, mixed
from tensorize.serve.folder import Folder
from tensorize.serve.layout import columns_of_rank, rows_of_rank
from tensorize.serve.service import refused_by_name
from tensorize.store.contents import SiteRecord


class FactoredExperts(FusedMoEMethodBase):
    """Experts of vLLM of which one stack, or both, is factors.

    ``sites``: those of ``UP`` and ``DOWN``, None where a stack is dense. vLLM loads that itself;
    the factors are taken from what waits once all is loaded.
    """

    def __init__(self, moe: Any, sites: dict[str, SiteRecord | None], folder: Folder) -> None:
        super().__init__(moe)
        self.sites, self.folder = sites, folder

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        self._check(layer)
        self.dtype, self.width = params_dtype, intermediate_size_per_partition
        shapes = {
            UP: ("w13_weight", (num_experts, 2 * self.width, hidden_size)),
            DOWN: ("w2_weight", (num_experts, hidden_size, self.width)),
        }
        for stack, (name, shape) in shapes.items():
            empty = torch.empty(shape if self.sites[stack] is None else 0, dtype=params_dtype)
            setattr(layer, name, nn.Parameter(empty, requires_grad=False))
            set_weight_attrs(getattr(layer, name), extra)

    def _check(self, layer: Any) -> None:
        """Raises CheckpointError for a layer that this does not run."""
        site = next(site for site in self.sites.values() if site is not None)
        reasons = {
            "its experts have biases": self.moe.has_bias,
            "its experts have no gates": not self.moe.is_act_and_mul,
            "its experts are divided among processes whole": layer.use_ep,
        }
        for reason, holds in reasons.items():
            if holds:
                raise refused_by_name(reason, site.names[:1])

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        return None

    def process_weights_after_loading(self, layer: Any) -> None:
        parallel = self.moe.moe_parallel_config
        rank, world, width = parallel.tp_rank, parallel.tp_size, self.width
        halves = rows_of_rank([width * world] * 2, [width] * 2, rank, world)
        up = self._taken(UP)
        self.up = Stack(layer.w13_weight) if up is None else up.on_rank(halves, slice(None))
        own = columns_of_rank(width * world, width, rank)
        down = self._taken(DOWN)
        self.down = Stack(layer.w2_weight) if down is None else down.on_rank([slice(None)], own)

    def _taken(self, stack: str) -> Stack | None:
        site = self.sites[stack]
        if site is None:
            return None
        held, _ = self.folder.take(site)
        return Stack.of(site.spec, held, self.dtype)

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        if layer.apply_router_weight_on_input:  # of the one expert that is chosen
            x, topk_weights = x * topk_weights.to(x.dtype), torch.ones_like(topk_weights)
        up, down = self.up.tensors, self.down.tensors
        return _mixed(x, topk_weights, topk_ids, up, down, layer.activation.value)


@torch.library.custom_op("tensorize::vllm_experts", mutates_args=())
def _mixed(
    x: Tensor, shares: Tensor, chosen: Tensor, up: list[Tensor], down: list[Tensor], activation: str
) -> Tensor:
    """An operation of its own, as a graph cannot hold which experts are chosen."""

    def activate(made: Tensor) -> Tensor:
        narrow = made.new_empty(len(made), made.shape[1] // 2)
        apply_moe_activation(MoEActivation(activation), narrow, made)
        return narrow

    return mixed(x, shares, chosen, Stack(*up), Stack(*down), activate)


@_mixed.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)
