# pyright: reportMissingImports=false
"""What SGLang calls in each of its processes, by the entry point ``sglang.srt.plugins``.

To SGLang a folder of ours is a checkpoint of a quantization method of its own. Its linear layers
run through factors; tables of words are made whole.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from sglang.srt.distributed.utils import get_group_rank_size
from sglang.srt.layers import quantization
from sglang.srt.layers.linear import LinearBase, QKVParallelLinear
from sglang.srt.layers.quantization.base_config import LinearMethodBase, QuantizationConfig
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.model_loader.loader import DefaultModelLoader
from torch import Tensor, nn
from torch.nn import functional as F

from tensorize.base.errors import CheckpointError, TensorizeError
from tensorize.serve.folder import Folder, hook
from tensorize.serve.layout import MergedLinear, sections
from tensorize.serve.matrices import Matrix
from tensorize.store.manifest import SAVE_AGAIN
from tensorize.store.transformers_config import METHOD

TESTED = "0.5.23"
"""The version of SGLang whose sources this was written from, and that ran it."""

log = logging.getLogger("sglang.tensorize")


def _say(line: str) -> None:
    log.info("tensorize: %s", line)


def register() -> None:
    """Let SGLang know compressed models. Others are loaded as ever."""
    for known in (quantization.QUANTIZATION_METHODS, quantization.CPU_QUANTIZATION_METHODS):
        known[METHOD] = TensorizeConfig
    hook(DefaultModelLoader, "_get_all_weights", _weights)


class Product(nn.Module):
    """x Wᵀ + b."""

    def __init__(self, matrix: Matrix, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(matrix.entries.to(device).contiguous(), requires_grad=False)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, self.weight, bias)


class FactoredLinear(MergedLinear, LinearMethodBase):
    """A linear layer of SGLang, merged or not, some or all of whose weights are factors."""

    product = Product

    def process_weights_after_loading(self, layer: Any) -> None:
        of_attention = isinstance(layer, QKVParallelLinear)
        rank, world = get_group_rank_size(getattr(layer, "tp_group", None))
        if of_attention and get_group_rank_size(layer.kv_tp_group) != (rank, world):
            raise TensorizeError(
                "keys and values are divided among other ranks than queries",
                way_out="serve it without data-parallel attention",
            )
        self.place(layer, sections(layer, self.sizes, of_attention=of_attention), rank, world)


class TensorizeConfig(QuantizationConfig):
    """Chooses how each of SGLang's layers is run."""

    def __init__(self, folder: Folder) -> None:
        super().__init__()
        self.folder = folder

    def get_name(self) -> str:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def get_scaled_act_names(self) -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> TensorizeConfig:
        folder = Folder(config, "sglang", _say)
        folder.of_model(getattr(config.get("hf_config"), "model_type", ""))
        found = cls(folder)
        found.update_packed_modules_mapping(config.get("packed_modules_mapping") or {})
        return found

    def apply_weight_name_mapper(self, hf_to_sglang_mapper: Any) -> None:
        self.folder.rename(hf_to_sglang_mapper._map_name)

    def is_linear_unquantized(self, prefix: str) -> bool:
        return not self.folder.has_factors(prefix, self._packed)

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        if not isinstance(layer, LinearBase):
            return None
        if self.is_linear_unquantized(prefix):
            return UnquantizedLinearMethod()
        return FactoredLinear(self.folder.parts(prefix, self._packed), self.folder)

    @property
    def _packed(self) -> dict[str, list[str]]:
        usual = {
            "qkv_proj": ["q_proj", "k_proj", "v_proj"],
            "gate_up_proj": ["gate_proj", "up_proj"],
        }
        return usual | self.packed_modules_mapping


def _weights(
    given: Any, loader: Any, model_config: Any, model: nn.Module
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a checkpoint of ours that SGLang's own loaders are to see.

    Raises:
        CheckpointError: the model has no place for a weight, or the checkpoint lacks a tensor.
        TensorizeError: this SGLang loads checkpoints in another way.
    """
    reads = inspect.signature(inspect.unwrap(DefaultModelLoader._get_all_weights)).parameters
    config = getattr(model, "quant_config", None)
    if [*reads] != ["self", "model_config", "model"] or not isinstance(config, TensorizeConfig):
        raise TensorizeError(
            f"SGLang loads its {type(model).__name__} in another way than tensorize knows",
            way_out=f"install SGLang {TESTED}",
        )
    folder = config.folder
    folder.let_it_read_our_file(model)
    _require_all(model)
    tensors = given(loader, model_config, model)
    return folder.seen(tensors, model, Path(model_config.model_path))


def _require_all(model: Any) -> None:
    """Let its ``load_weights`` raise CheckpointError where it leaves a parameter as it was: SGLang
    looks for none that did not come."""
    own = model.load_weights
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data.fill_(float("nan"))

    @functools.wraps(own)
    def load_weights(weights: Any) -> Any:
        found = own(weights)
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point() and bool(parameter.isnan().any()):
                raise CheckpointError(
                    "nothing in the checkpoint fills it", site=name, way_out=SAVE_AGAIN
                )
        return found

    model.load_weights = load_weights
