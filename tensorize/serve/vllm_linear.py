# pyright: reportMissingImports=false
"""vLLM's linear layers, run through factors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.kernels.linear import init_int8_linear_kernel
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    QKVParallelLinear,
    UnquantizedLinearMethod,
)

from tensorize.serve.layout import MergedLinear, sections
from tensorize.serve.matrices import Matrix


class Product(nn.Module):
    """x Wᵀ + b by the matmul that vLLM chooses for the matrix on this machine.

    Of codes it is one of integers: vLLM rounds each row of x to eight bits, as we do.
    """

    def __init__(self, matrix: Matrix, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(matrix.entries.to(device).contiguous(), requires_grad=False)
        self.bias = None
        if matrix.scale is None:
            method = UnquantizedLinearMethod()
            method.process_weights_after_loading(self)
            self._multiply = method.apply
            return
        scale = matrix.scale.to(device, torch.float32).contiguous()
        self.weight_scale = nn.Parameter(scale, requires_grad=False)
        self.input_scale = self.input_zero_point = self.azp_adj = None
        self.logical_widths = [len(matrix.entries)]
        kernel = init_int8_linear_kernel(
            is_channelwise=True,
            is_static_input_scheme=False,
            input_symmetric=True,
            module_name="tensorize",
        )
        kernel.process_weights_after_loading(self)
        self._multiply = kernel.apply_weights

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return self._multiply(self, x, bias)


class FactoredLinear(MergedLinear, LinearMethodBase):
    """A linear layer of vLLM, merged or not, some or all of whose weights are factors."""

    product = Product
    integers = True

    def process_weights_after_loading(self, layer: Any) -> None:
        totals = sections(layer, self.sizes, of_attention=isinstance(layer, QKVParallelLinear))
        self.place(layer, totals, layer.tp_rank, layer.tp_size)
