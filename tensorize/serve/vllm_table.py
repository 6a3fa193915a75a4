# pyright: reportMissingImports=false
"""vLLM's tables of words, as an embedding, a head, or both, run through factors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
)

from tensorize.base.errors import CheckpointError
from tensorize.serve.folder import Folder
from tensorize.serve.matrices import Matrix, weight_of
from tensorize.serve.vllm_linear import Product
from tensorize.store.contents import SiteRecord


class Rows(nn.Module):
    """A matrix of which rows are looked up, and which can be multiplied with as well."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(rows, requires_grad=False)
        self.bias = None
        self.method = UnquantizedEmbeddingMethod()
        self.method.process_weights_after_loading(self)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.method.apply(self, x, bias)

    def at(self, ids: Tensor) -> Tensor:
        return self.method.embedding(self, ids)


class FactoredTable(QuantizeMethodBase):
    """A table W = U V of words in low rank: each rank has some rows of U, and all of V.

    ``table`` of the layer holds them; a tied head has that of the embedding.
    """

    def __init__(self, site: SiteRecord, folder: Folder) -> None:
        self.site, self.folder, self.tied = site, folder, False

    def create_weights(
        self, layer: Any, *sizes: Any, params_dtype: torch.dtype, **extra: Any
    ) -> None:
        self.dtype = params_dtype
        layer.weight = nn.Parameter(torch.empty(0, dtype=params_dtype), requires_grad=False)
        layer.table = nn.Module()

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        method = embed_tokens.quant_method
        if not isinstance(method, FactoredTable) or method.site.names != self.site.names:
            raise CheckpointError(
                "the configuration ties the head to the embedding, and they are apart in the "
                "checkpoint",
                site=self.site.names[0],
                way_out="set tie_word_embeddings to false in config.json",
            )
        self.tied, layer.table = True, embed_tokens.table
        self.folder.claimed.remove(self.site)
        return layer

    def process_weights_after_loading(self, layer: Any) -> None:
        if self.tied:
            return
        held, source = self.folder.take(self.site)
        weight = weight_of(self.site.spec, held, source, self.dtype)
        places, device = layer.shard_indices, layer.weight.device
        words = slice(places.org_vocab_start_index, places.org_vocab_end_index)
        rows = weight.last.entries[words].to(device)
        left = F.pad(rows, (0, 0, 0, layer.num_embeddings_per_partition - len(rows))).contiguous()
        head = isinstance(layer, ParallelLMHead)
        layer.table.left = Product(Matrix(left), device) if head else Rows(left)
        layer.table.right = None if weight.first is None else Product(weight.first, device)
        layer.table.back = (
            None
            if weight.first is None or head
            else Product(Matrix(weight.first.entries.t()), device)
        )

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        table: Any = layer.table
        return table.left(x if table.right is None else table.right(x), bias)

    def embedding(self, layer: Any, ids: Tensor) -> Tensor:
        table: Any = layer.table
        narrow = table.left.at(ids)
        return narrow if table.back is None else table.back(narrow)
