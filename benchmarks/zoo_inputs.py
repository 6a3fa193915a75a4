"""Inputs for the models of the zoo, made from what forward takes and from the configuration."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from benchmarks.zoo_given import GIVEN
from benchmarks.zoo_tensors import (
    BATCH,
    FRAMES,
    GRID,
    TOKENS,
    find,
    grid,
    ids,
    ids_with,
    image,
    mel_bins,
    normal,
    ones,
    patches,
    tiles,
    video,
    wave,
)

Maker = Callable[[PreTrainedConfig], Any]


def _rows_of_patches(config: PreTrainedConfig) -> torch.Tensor:
    return patches(config).reshape(BATCH, GRID * GRID, -1)


def _squares(config: PreTrainedConfig) -> torch.Tensor:
    side = find(config, "patch_size", default=8)
    return patches(config).reshape(BATCH * GRID * GRID, -1, side, side)


# What an argument may hold, by its name: the forms to try, one after the other.
MAKERS: Mapping[str, tuple[Maker, ...]] = {
    "input_ids": (ids,),
    "decoder_input_ids": (lambda c: ids(c, 7),),
    "pixel_values": (image, video, tiles, _rows_of_patches),
    "pixel_values_videos": (video,),
    "high_res_pixel_values": (lambda c: image(c.high_res_vision_config),),
    "image_sizes": (lambda c: torch.tensor([image(c).shape[-2:]] * BATCH),),
    "image_merge_sizes": (lambda c: ones(),),
    "merge_sizes": (lambda c: ones(),),
    "input_values": (wave,),
    "input_features": (
        lambda c: normal(mel_bins(c), FRAMES),
        lambda c: normal(FRAMES, mel_bins(c)),
    ),
    "input_features_mask": (lambda c: ones(FRAMES),),
    "feature_attention_mask": (lambda c: ones(FRAMES),),
    "bbox": (lambda c: torch.randint(0, 20, (BATCH, TOKENS, 4)).sort(-1).values,),
}
_OF_A_GRID: Mapping[str, tuple[Maker, ...]] = {
    "grid_thw": (grid,),
    "image_grid_thw": (grid,),
    "pixel_values": (
        patches,
        _squares,
        lambda c: _squares(c).unsqueeze(0),
        _rows_of_patches,
    ),
}
_OF_SIGLIP: Mapping[str, tuple[Maker, ...]] = {
    "pixel_values": (_rows_of_patches,),
    "pixel_attention_mask": (lambda c: ones(GRID * GRID),),
    "spatial_shapes": (lambda c: torch.tensor([[GRID, GRID]] * BATCH),),
}
_IMAGES = [
    "pixel_values",
    "high_res_pixel_values",
    "image_sizes",
    "image_grid_thw",
    "image_merge_sizes",
]
_SOUNDS = ["input_values", "input_features", "input_features_mask", "feature_attention_mask"]


def inputs(kind: str, model: PreTrainedModel) -> Iterator[dict[str, Any]]:
    """Inputs to try, the fullest first."""
    config = model.config
    if kind in GIVEN:
        torch.manual_seed(1)
        yield GIVEN[kind](config)
        return
    accepted = inspect.signature(model.forward).parameters
    makers = _makers(accepted)
    required = [
        p.name
        for p in accepted.values()
        if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    if not set(required) <= set(makers):
        return
    main = model.main_input_name
    mains = [main] if isinstance(main, str) else list(main)
    text = [name for name in makers if "input_ids" in name]
    tried: list[list[str]] = []
    for names in (
        makers,
        [name for name in makers if name != "pixel_values_videos"],
        [*text, *_IMAGES],
        [*text, "pixel_values"],
        [*text, *_SOUNDS],
        [*mains, *required],
        ["input_ids", *required],
    ):
        chosen = sorted({name for name in names if name in makers})
        if not chosen or chosen in tried:
            continue
        tried.append(chosen)
        for k in range(max(len(makers[name]) for name in chosen)):
            torch.manual_seed(1)
            picked = {name: makers[name][min(k, len(makers[name]) - 1)] for name in chosen}
            try:
                batch = {name: make(config) for name, make in picked.items()}
            except (TypeError, RuntimeError):  # made for another kind of configuration
                continue
            yield batch


def _makers(accepted: Mapping[str, Any]) -> dict[str, tuple[Maker, ...]]:
    """How to make each argument that a forward takes and that is known here."""
    makers = dict(MAKERS)
    if "spatial_shapes" in accepted:
        makers |= _OF_SIGLIP
    elif "grid_thw" in accepted or "image_grid_thw" in accepted:
        makers |= _OF_A_GRID
        del makers["pixel_values_videos"]
        if "pixel_values" not in accepted:
            makers["hidden_states"] = (patches,)
    return {name: forms for name, forms in makers.items() if name in accepted}


_MISMATCH = re.compile(r"tokens: (\d+),? features:? (\d+)")


def mended(
    batch: dict[str, Any], error: Exception, config: PreTrainedConfig
) -> dict[str, Any] | None:
    """The batch with what the error message asks for, or None.

    That is as many placeholder tokens as there are features, or the kinds of the tokens.
    """
    text = str(error)
    if "input_ids" not in batch:
        return None
    kind = next((k for k in ("Video", "Audio") if k in text), "Image").lower()
    names = [f"{k}_token_{end}" for k in (kind, "image", "audio") for end in ("id", "index")]
    token = find(config, *names)
    if token is None:
        return None
    if "`mm_token_type_ids` is missing" in text:
        return {**batch, "mm_token_type_ids": (batch["input_ids"] == token).int()}
    found = _MISMATCH.search(text)
    if found is None:
        return None
    tokens, features = int(found.group(1)), int(found.group(2))
    if tokens == features:  # the message counts entries, not vectors
        features //= find(config, "hidden_size", default=1)
    if features % BATCH or features > 4000:
        return None
    return {**batch, "input_ids": ids_with(config, token, features // BATCH)}
