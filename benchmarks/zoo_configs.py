"""Small configurations of every architecture in transformers.

A configuration is made small by rules over the names and values of its fields: widths become 64,
heads 4, layers one of each kind, and so on, in its parts too. What no rule can know (two fields
that have to agree, what the standard configuration lacks) is in ``zoo_overrides.json``, by model
type: the fields to set, where a mapping changes fields of a part. An object with a ``model_type``
is a configuration of its own: a detector's ResNet, where the standard one comes from timm. The
memories of trackers are so wide that the object is in sight: masks of hidden ones are constant.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

WIDTH, HEADS, HEAD_WIDTH, INNER, VOCABULARY, IMAGE, PATCH = 64, 4, 16, 96, 160, 32, 8


def _read(data: dict[str, Any]) -> Any:
    """A mapping, with numbers for keys that are such, or the configuration that it describes."""
    if "model_type" in data:
        return CONFIG_MAPPING[data.pop("model_type")](**data)
    return {int(key) if key.isdigit() else key: value for key, value in data.items()}


OVERRIDES: Mapping[str, dict[str, Any]] = json.loads(
    Path(__file__).with_name("zoo_overrides.json").read_text(), object_hook=_read
)


def _names(patterns: str) -> re.Pattern[str]:
    return re.compile("|".join(patterns.split()))


# The largest value that a field may keep, by the first pattern that matches its whole name.
_LIMITS: tuple[tuple[int, re.Pattern[str]], ...] = tuple(
    (limit, _names(patterns))
    for limit, patterns in (
        (VOCABULARY, r".*vocab_size.* .*vocabulary.* head_out_channels num_(bpe|wordpiece)_labels"),
        (8, r"mamba_n_heads mamba_num_heads rotary_dim rel_extent"),
        (32, r"max_source_positions base_channels axial_pos_embds_dim"),
        (2, r".*num_key_value_heads num_kv_heads"),
        (HEADS, r".*num_heads .*n_heads n_head .*_heads"),
        (IMAGE, r"max_img_size"),
        (8, r"num_filters num_residual_layers"),
        (
            WIDTH,
            r"upsample_initial_channel upsample_groups hidden_size_global lru_width embed_size",
        ),
        (16, r"hidden_size_per_layer_input"),
        (HEAD_WIDTH, r"d_kv .*head_dim .*head_size dim_head .*d_head"),
        (2, r".*experts_per_tok moe_top_?k top_k moe_k"),
        (4, r".*num_experts .*routed_experts .*local_experts"),
        (1, r".*shared_experts n_group topk_group"),
        (32, r"moe_.*intermediate_size .*expert.*(size|dim)"),
        (INNER, r".*intermediate_size .*ffn_dim .*d_ff .*n_inner d_inner .*ffn_hidden_size"),
        (INNER, r".*mlp_dim .*dim_ff .*dim_feedforward"),
        (32, r".*(kv|q|o)_lora_rank"),
        (2, r"(num_)?layers? n_layer .*_layers? .*depth .*num_blocks (num_)?(text_)?blocks"),
        (256, r".*max_position_embeddings .*n_positions .*max_(source|target)_positions"),
        (256, r".*n_ctx .*max_seq_len"),
        (IMAGE, r".*image_size img_size crop_size resolution"),
        (PATCH, r"patch_size .*_patch_size"),
        (8, r"num_queries num_query_tokens .*num_latents"),
        (4, r"num_frames num_codebooks num_quantizers"),
        (64, r"num_position_embeddings posemb_grid_size"),
        (64, r"codebook_size num_embeddings num_codevectors_per_group"),
        (8, r"sliding_window (mamba_|attention_)?chunk_size .*_window .*state_size .*d_state"),
        (WIDTH, r".*hidden_size .*_hidden_size.* .*d_model .*n_embd .*embedding_size"),
        (WIDTH, r".*projection_size .*width .*_units .*hidden .*dim .*channels .*_filters"),
        (WIDTH, r".*_planes .*projector_.*size"),
    )
)
_TOKEN = _names(
    r".*token_id .*token_index .*_token (pad|bos|eos|unk|mask)_index (boi|eoi|boa|eoa).*"
)
_KEPT = _names(
    r".*in_chans.* .*num_channels.* .*num_labels.* .*ratio.* .*rate.* .*stride.* .*kernel.*"
    r" .*dilation.* .*input_channels.* .*layer_idx.* .*num_encoder_blocks.* .*num_stages.*"
    r" .*model_in_dim.* .*n_window.*"
)
_DEPTHS = _names(
    r"depths? num_layers layers (stage_)?num_blocks layer_depths n_attn_blocks num_block_repeats"
    r" block_sizes"
)
_WIDTHS = _names(r".*sizes .*dims? .*channels .*hidden_size .*embed_dim .*out_features .*widths")
_STAGES = ("depths", "stage_configs", "block_configs", "stage_blocks")


def small_config(kind: str, keep_lists: bool = False) -> PreTrainedConfig:
    """The small configuration of a model type; ``keep_lists``: widths given as lists stay."""
    config = CONFIG_MAPPING[kind]()
    return _Shrinking(keep_lists, {}).shrink(config, OVERRIDES.get(config.model_type, {}))


def fields(config: PreTrainedConfig) -> dict[str, Any]:
    """Every declared field and its value."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        try:
            found[field.name] = getattr(config, field.name)
        except Exception:  # it differs between layers
            continue
    return found


@dataclasses.dataclass(frozen=True)
class _Shrinking:
    """One configuration with its parts; ``tokens``: the new number of every special token."""

    keep_lists: bool
    tokens: dict[int, int]

    def shrink(self, config: PreTrainedConfig, overrides: Mapping[str, Any]) -> PreTrainedConfig:
        cls, values = type(config), fields(config)
        try:
            standard = fields(cls())
        except Exception:  # some cannot be made without arguments
            standard = {}
        small: dict[str, Any] = {}
        for name, value in values.items():
            if name in overrides or name.startswith("_"):
                continue
            if isinstance(value, PreTrainedConfig):
                small[name] = self.shrink(value, OVERRIDES.get(value.model_type, {}))
            elif (new := self._value(name, value)) != value:
                small[name] = new
            elif name in standard and standard[name] != value:
                small[name] = value
        small |= _backbone(values, standard)
        small |= _image(values, small)
        small |= _widths_by_heads(values)
        small |= _one_layer_of_each_kind(values, small)
        small |= _attention(config, values, small)
        for name, value in overrides.items():
            part = values.get(name)
            if isinstance(value, Mapping) and isinstance(part, PreTrainedConfig):
                value = self.shrink(part, {**OVERRIDES.get(part.model_type, {}), **value})
            small[name] = tuple(value) if isinstance(part, tuple) else value
        return cls(**small)

    def _value(self, name: str, value: Any) -> Any:
        if isinstance(value, bool):
            return value
        if isinstance(value, int):
            return self._token(value) if _TOKEN.fullmatch(name) else min(value, _limit(name, value))
        if not isinstance(value, list | tuple) or not all(type(v) is int for v in value):
            return value
        if _TOKEN.fullmatch(name):
            return type(value)(self._token(v) for v in value)
        if _KEPT.fullmatch(name):
            return value
        if _DEPTHS.fullmatch(name):
            return type(value)(min(v, 2) for v in value)
        if name.endswith("image_size") or name == "patch_size":
            return type(value)(min(v, _limit(name, v)) for v in value)
        if _WIDTHS.fullmatch(name) and not self.keep_lists:
            return type(value)(_narrow(v) for v in value)
        return value

    def _token(self, number: int) -> int:
        if number < 100:
            return number
        return self.tokens.setdefault(number, VOCABULARY - 1 - len(self.tokens))


def _limit(name: str, value: int) -> int:
    if _KEPT.fullmatch(name):
        return value
    return next((limit for limit, names in _LIMITS if names.fullmatch(name)), value)


def _narrow(width: int) -> int:
    """A width that depends on the old one only, so that what was equal stays equal."""
    return width if width <= 16 else max(16, 8 * round((16 * width) ** 0.5 / 8))


def _backbone(values: Mapping[str, Any], standard: Mapping[str, Any]) -> dict[str, Any]:
    """As many outputs of a backbone as before, from as few layers as that takes."""
    indices = values.get("_out_indices")
    if not indices or indices == standard.get("_out_indices"):
        return {}
    if any(name in values for name in _STAGES) or "num_hidden_layers" not in values:
        return {"out_indices": list(indices)}
    count = max(2, len(indices))
    first = count - len(indices) + 1
    return {"num_hidden_layers": count, "out_indices": list(range(first, count + 1))}


def _image(values: Mapping[str, Any], small: Mapping[str, Any]) -> dict[str, Any]:
    """Patches so small come from a pyramid of stages, which needs a larger image."""
    patch = values.get("patch_size")
    if isinstance(patch, int) and patch < PATCH and isinstance(small.get("image_size"), int):
        return {"image_size": 2 * IMAGE}
    return {}


def _widths_by_heads(values: Mapping[str, Any]) -> dict[str, Any]:
    """Where each stage has its heads: 8 entries a head."""
    heads = values.get("num_attention_heads", values.get("num_heads"))
    if not isinstance(heads, list | tuple):
        return {}
    if isinstance(values.get("embed_dim"), int):
        return {"embed_dim": 8 * heads[0]}
    found: dict[str, Any] = {}
    for name in ("hidden_sizes", "embed_dim", "embed_dims"):
        widths = values.get(name)
        if isinstance(widths, list | tuple) and len(widths) == len(heads):
            found[name] = type(widths)(8 * h for h in heads)
    return found


def _one_layer_of_each_kind(values: Mapping[str, Any], small: Mapping[str, Any]) -> dict[str, Any]:
    """Lists with one entry a layer, cut to one layer of each kind (two at least)."""
    count = values.get("num_hidden_layers", 0)
    if "num_hidden_layers" not in small or count <= 2:
        return {}
    lists: dict[str, Any] = {
        name: value
        for name, value in values.items()
        if isinstance(value, list | tuple) and len(value) == count
    }
    if not lists:
        return {}
    layers = list(zip(*lists.values(), strict=True))
    kinds = list({repr(layer): layer for layer in reversed(layers)}.values())[::-1]
    kinds.sort(key=layers.index)
    if not all(isinstance(entry, str) for layer in kinds for entry in layer):
        kinds = kinds[:2]  # numbers: they may all differ
    chosen = kinds if len(kinds) > 1 else kinds * 2
    cut = zip(*chosen, strict=True)
    new = {name: type(lists[name])(column) for name, column in zip(lists, cut, strict=True)}
    return {**new, "num_hidden_layers": len(chosen)}


def _attention(
    config: PreTrainedConfig, values: Mapping[str, Any], small: Mapping[str, Any]
) -> dict[str, Any]:
    """Grouped heads stay grouped, others stay as many; sections of a rotary embedding add up."""
    found: dict[str, Any] = {}
    for prefix in ("", "encoder_", "decoder_", "cross_"):
        heads = values.get(f"{prefix}num_attention_heads")
        groups = values.get(f"{prefix}num_key_value_heads")
        if isinstance(heads, int) and isinstance(groups, int) and groups >= heads:
            found[f"{prefix}num_key_value_heads"] = small.get(f"{prefix}num_attention_heads", heads)
    if "head_dim" in values and values["head_dim"] is None and "hidden_size" in small:
        found["head_dim"] = HEAD_WIDTH
    if values.get("num_key_value_heads", 0) is None and "num_attention_heads" in small:
        found["num_key_value_heads"] = small["num_attention_heads"]
    rope = values.get("rope_parameters")
    sectioned = "mrope_section" in getattr(config, "ignore_keys_at_rope_validation", ())
    if isinstance(rope, dict) and sectioned:
        half = int(HEAD_WIDTH // 2 * rope.get("partial_rotary_factor", 1.0))
        third = (half + 1) // 3
        found["rope_parameters"] = {**rope, "mrope_section": [half - 2 * third, third, third]}
    return found
