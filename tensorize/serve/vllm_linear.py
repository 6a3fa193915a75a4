# pyright: reportMissingImports=false
"""vLLM's linear layers, run through factors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.kernels.linear import init_int8_linear_kernel
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    QKVParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.utils import set_weight_attrs

from tensorize.base.errors import CheckpointError
from tensorize.formats.registry import format_of
from tensorize.serve.layout import Piece, columns_of_rank, laid_out, rows_of_rank
from tensorize.serve.matrices import Matrix, Weight, weight_of
from tensorize.store.contents import SiteRecord
from tensorize.store.manifest import SAVE_AGAIN


@dataclass(frozen=True)
class Part:
    """One weight of the checkpoint in one of vLLM's layers; ``site`` is None where it is dense."""

    name: str
    site: SiteRecord | None


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


class FactoredLinear(LinearMethodBase):
    """A linear layer of vLLM, merged or not, some or all of whose weights are factors.

    What is dense beside factors is loaded into ``weight`` by the order of the parts; the factors
    are taken from what waits once all is loaded.
    """

    def __init__(self, parts: list[Part], config: Any) -> None:
        self.parts, self.config = parts, config
        self.pieces: tuple[Piece, ...] = ()

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        self.dtype, self.columns = params_dtype, (input_size, input_size_per_partition)
        self.sizes = output_partition_sizes
        self.dense: dict[str, Tensor] = {}
        layer.weight = nn.Parameter(torch.empty(0, dtype=params_dtype), requires_grad=False)
        set_weight_attrs(layer.weight, {"weight_loader": self._keep})

    def _keep(self, param: Tensor, loaded: Tensor, shard: Any = None) -> None:
        """Keep a dense part, of one of the shards that vLLM's loaders name."""
        place = "qkv".index(shard) if isinstance(shard, str) else shard or 0
        self.dense[self.parts[place].name] = loaded

    def process_weights_after_loading(self, layer: Any) -> None:
        weights = [self._weight(part) for part in self.parts]
        totals, sizes = self._sections(layer), self.sizes
        columns = columns_of_rank(*self.columns, layer.tp_rank)
        rank, world = layer.tp_rank, layer.tp_size
        each = (
            [(totals, sizes)]
            if len(weights) == 1  # which may have several sections
            else [([total], [size]) for total, size in zip(totals, sizes, strict=True)]
        )
        own = [
            weight.on_rank(rows_of_rank(*section, rank, world), columns)
            for weight, section in zip(weights, each, strict=True)
        ]
        layout = laid_out(own)
        device = layer.weight.device
        layer.across = nn.ModuleList(Product(matrix, device) for matrix in layout.products)
        lasts = [piece.last for piece in layout.pieces]
        layer.lasts = nn.ModuleList(
            nn.Identity() if last is None else Product(last, device) for last in lasts
        )
        # A call of one row is short: modules are not looked up, nor called as such, in it.
        self._across = [product.forward for product in layer.across]
        self._lasts = [last.forward for last in layer.lasts]
        widths = [len(matrix.entries) for matrix in layout.products]
        whole = [slice(0, width) for width in widths]
        self._columns = [
            None if piece.columns == whole[piece.product] else piece.columns
            for piece in layout.pieces
        ]
        self.pieces, self.dense = layout.pieces, {}

    def _weight(self, part: Part) -> Weight:
        if part.site is not None:
            held, source = self.config.waiting.take(part.site)
            spec = part.site.spec
            turn = self.config.is_turned(part.site) and not format_of(spec).pair
            # In float32 a model is asked for what its weights say: inputs are not rounded.
            fast = self.dtype != torch.float32
            return weight_of(spec, held, source, self.dtype, transposed=turn, integers=fast)
        if part.name not in self.dense:
            raise CheckpointError(
                "the checkpoint does not hold it", site=part.name, way_out=SAVE_AGAIN
            )
        return Weight(Matrix(self.dense[part.name].to(self.dtype)), None, part.name)

    def _sections(self, layer: Any) -> list[int]:
        """The rows that the weights of a layer have on all ranks together, without repetitions."""
        if isinstance(layer, QKVParallelLinear):
            heads, groups = layer.total_num_heads, layer.total_num_kv_heads
            return [
                heads * layer.head_size,
                groups * layer.head_size,
                groups * layer.v_head_size,
            ]
        if len(self.sizes) > 1:
            return list(layer.output_sizes)
        return [layer.output_size]

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if len(self.pieces) == 1 and self.pieces[0].last is not None:
            return self._lasts[0](self._across[0](x), bias)
        across = [product(x) for product in self._across]
        outputs = []
        for piece, columns, last in zip(self.pieces, self._columns, self._lasts, strict=True):
            found = across[piece.product]
            outputs.append(last(found if columns is None else found[..., columns].contiguous()))
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        return y if bias is None else y + bias
