# pyright: reportMissingImports=false
"""vLLM's view of a folder of ours: a checkpoint of a quantization method of its own.

``config.json`` names the method and says which weights are factors. The configuration made of it
chooses how each of vLLM's layers is run, and knows which weight of the checkpoint goes where.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from tensorize.base.errors import CheckpointError
from tensorize.formats.registry import format_of
from tensorize.serve.experts import STACKS, UP
from tensorize.serve.service import check, services, told
from tensorize.serve.vllm_experts import FactoredExperts
from tensorize.serve.vllm_linear import FactoredLinear, Part
from tensorize.serve.vllm_table import FactoredTable
from tensorize.serve.waiting import Waiting
from tensorize.store.contents import SiteRecord
from tensorize.store.manifest import FORMAT_VERSION
from tensorize.store.transformers_config import METHOD, factors_from_dict
from tensorize.weight.install import turned_spec

log = init_logger("vllm.tensorize")

_CONV1D = {"gpt2": ("c_attn", "c_proj", "c_fc")}
"""Models of transformers that have layers which keep their weights as (in, out), and these."""

_MOVED = {"mixtral": (".mlp.", ".block_sparse_moe.")}
"""Models of transformers whose parts have other names in vLLM, and these."""

_HEADS = ("lm_head", "embed_out", "output")
"""What heads are called."""


class TensorizeConfig(QuantizationConfig):
    """What stands under ``quantization_config`` in the ``config.json`` of a compressed model.

    ``weights`` is the file that holds them, where ``tensorize.save`` wrote it. ``claimed`` are the
    sites that a layer of this process runs, once for each layer; ``waiting`` their factors.
    """

    def __init__(
        self, sites: Sequence[SiteRecord], aliases: Mapping[str, str], weights: str | None
    ) -> None:
        super().__init__()
        self.sites, self.aliases, self.weights = tuple(sites), dict(aliases), weights
        self.turned: tuple[str, ...] = ()
        self.moved: tuple[str, str] = ("", "")
        self.claimed: list[SiteRecord] = []
        self.waiting: Waiting | None = None
        self._at = {name: site for site in sites for name in site.names}

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
        version = config.get("format_version")
        if type(version) is not int or version > FORMAT_VERSION:
            raise CheckpointError(
                f"config.json has format version {version} of tensorize, and this one reads up to "
                f"{FORMAT_VERSION}",
                way_out="upgrade tensorize",
            )
        aliases = config.get("aliases") or {}
        sites, aliases = factors_from_dict(config["sites"], aliases, config.get("sha256"))
        found = services(sites)
        check(found)
        for line in told(found):
            log.info("tensorize: %s", line)
        return cls(sites, aliases, config.get("weights"))

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        kind = getattr(hf_config, "model_type", "")
        self.turned, self.moved = _CONV1D.get(kind, ()), _MOVED.get(kind, ("", ""))
        self._at = {self.name_of(name): site for name, site in self._at.items()}

    def key_of(self, key: str) -> str:
        """What transformers calls what has a name in a checkpoint, which may be an older one."""
        own, vllms = self.moved
        return key.replace(vllms, own) if own else key

    def name_of(self, key: str) -> str:
        """What vLLM calls it."""
        own, vllms = self.moved
        return key.replace(own, vllms) if own else key

    def given(self, key: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """What vLLM's own loaders are to see of a tensor: of a stack of experts, one after another
        where they know no stacks."""
        name = self.name_of(key)
        path, _, leaf = name.rpartition(".")
        if not self.moved[0] or not path.endswith(".experts") or leaf not in STACKS:
            yield name, tensor
            return
        parts = ("w1", "w3") if leaf == UP else ("w2",)
        for expert, weight in enumerate(tensor):
            for part, own in zip(parts, weight.chunk(len(parts)), strict=True):
                yield f"{path}.{expert}.{part}.weight", own

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        rename = hf_to_vllm_mapper.get_rename_mapper().map_name
        self._at = {rename(name) or name: site for name, site in self._at.items()}

    # ------------------------------------------------------------------------- vLLM's layers

    def get_quant_method(self, layer: Any, prefix: str) -> QuantizeMethodBase | None:
        prefix = prefix.removeprefix("draft_model.").lstrip(".")  # GPT-2's head is ".lm_head"
        if isinstance(layer, VocabParallelEmbedding):  # heads are such ones too
            site = self._table(layer, prefix)
            return None if site is None else FactoredTable(self._claim(site), self)
        if isinstance(layer, RoutedExperts):
            return self._experts(layer, prefix)
        if not isinstance(layer, LinearBase):
            return None
        parts = self._parts(prefix)
        if all(part.site is None for part in parts):
            return UnquantizedLinearMethod()
        return FactoredLinear(parts, self)

    def _experts(self, layer: Any, prefix: str) -> FactoredExperts | None:
        """None where no stack of a layer is in factors."""
        found = {stack: self._at.get(f"{prefix}.{stack}") for stack in STACKS}
        if not any(found.values()):
            return None
        sites = {stack: site and self._claim(site) for stack, site in found.items()}
        return FactoredExperts(layer.moe_config, sites, self)

    def _parts(self, prefix: str) -> list[Part]:
        """The weights of the checkpoint that are one of vLLM's linear layers."""
        above, _, leaf = prefix.rpartition(".")
        parts = []
        for own in self.packed_modules_mapping.get(leaf, [leaf]):
            name = f"{above}.{own}.weight" if above else f"{own}.weight"
            site = self._at.get(name)
            parts.append(Part(name, None if site is None else self._claim(self._as_held(site))))
        return parts

    def _as_held(self, site: SiteRecord) -> SiteRecord:
        """The site whose spec is that of the tensors."""
        return replace(site, spec=turned_spec(site.spec)) if self._holds_turned(site) else site

    def _holds_turned(self, site: SiteRecord) -> bool:
        """Whether a layer that kept its weight as (in, out) holds the factors of the transpose."""
        return self.is_turned(site) and format_of(site.spec).pair

    def is_turned(self, site: SiteRecord) -> bool:
        """Whether a layer's weight is stored as (in, out)."""
        return _layer(site.names[0]) in self.turned

    def _table(self, layer: Any, prefix: str) -> SiteRecord | None:
        if prefix:
            return self._at.get(f"{prefix}.weight")
        # Llama's and others' embeddings are not told their names.
        shape = layer.org_vocab_size, layer.embedding_dim
        found = {
            site.names: site
            for name, site in self._at.items()
            if site.shape == shape and _layer(name) not in _HEADS
        }
        if len(found) > 1:
            raise CheckpointError(
                f"{len(found)} weights have the shape {shape}, and vLLM does not say which of them "
                "is the embedding",
                site=min(found)[0],
                way_out="compress the model again with exclude= of all but one",
            )
        return next(iter(found.values()), None)

    def _claim(self, site: SiteRecord) -> SiteRecord:
        self.claimed.append(site)
        return site

    # -------------------------------------------------------------------------- its checkpoint

    def left_over(self) -> list[tuple[str, SiteRecord]]:
        """The sites that no layer of this process runs, by their names in vLLM."""
        taken = {site.names for site in self.claimed}
        names = {site.names: name for name, site in reversed(self._at.items())}
        left = [(name, self._at[name]) for key, name in names.items() if key not in taken]
        return [(name, self._as_held(site)) for name, site in left]

    def whole(self, site: SiteRecord) -> Tensor:
        """A weight that was left over, in the form that the dense model has."""
        assert self.waiting is not None
        held, _ = self.waiting.take(site)
        own = format_of(site.spec)
        matrix = own.reconstruct(site.spec, held)
        return (matrix.t() if self._holds_turned(site) else matrix).reshape(site.shape)


def _layer(name: str) -> str:
    """What the layer of a weight is called."""
    return name.rpartition(".")[0].rpartition(".")[2]
