# pyright: reportMissingImports=false
"""vLLM's view of a folder of ours: a checkpoint of a quantization method of its own."""

from __future__ import annotations

from typing import Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from tensorize.serve.folder import Folder, Table
from tensorize.serve.vllm_experts import FactoredExperts
from tensorize.serve.vllm_linear import FactoredLinear
from tensorize.serve.vllm_table import FactoredTable
from tensorize.store.transformers_config import METHOD

log = init_logger("vllm.tensorize")

_MOVED = {"mixtral": (".mlp.", ".block_sparse_moe.")}
"""Models of transformers whose parts have other names in vLLM, and these."""


def _say(line: str) -> None:
    """A function by name, as vLLM sends the configuration to its other processes."""
    log.info("tensorize: %s", line)


class TensorizeConfig(QuantizationConfig):
    """Chooses how each of vLLM's layers is run."""

    def __init__(self, folder: Folder) -> None:
        super().__init__()
        self.folder = folder

    @classmethod
    def get_name(cls) -> Any:
        return METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> TensorizeConfig:
        return cls(Folder(config, "vllm", _say))

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        kind = getattr(hf_config, "model_type", "")
        self.folder.of_model(kind, _MOVED.get(kind, ("", "")))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self.folder.rename(hf_to_vllm_mapper.get_rename_mapper().map_name)

    def get_quant_method(self, layer: Any, prefix: str) -> QuantizeMethodBase | None:
        prefix = prefix.removeprefix("draft_model.").lstrip(".")  # GPT-2's head is ".lm_head"
        folder = self.folder
        if isinstance(layer, VocabParallelEmbedding):  # heads are such ones too
            site = folder.table(Table(prefix, (layer.org_vocab_size, layer.embedding_dim)))
            return None if site is None else FactoredTable(folder.claim(site), folder)
        if isinstance(layer, RoutedExperts):
            sites = folder.experts(prefix)
            return FactoredExperts(layer.moe_config, sites, folder) if sites else None
        if not isinstance(layer, LinearBase):
            return None
        if not folder.has_factors(prefix, self.packed_modules_mapping):
            return UnquantizedLinearMethod()
        return FactoredLinear(folder.parts(prefix, self.packed_modules_mapping), folder)
