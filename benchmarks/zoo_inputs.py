"""Inputs for the models of the zoo, made from what forward takes and from the configuration."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

BATCH, TOKENS = 2, 12
_MISSING = object()


def find(config: PreTrainedConfig, *names: str, default: Any = None) -> Any:
    """The first of these attributes that a configuration or one of its parts has."""
    for name in names:
        value = _find(config, name)
        if value is not _MISSING and value is not None:
            return value
    return default


def _find(config: PreTrainedConfig, name: str) -> Any:
    try:
        value = getattr(config, name, None)
    except Exception:
        value = None
    if value is not None:
        return value
    for part in vars(config).values():
        if isinstance(part, PreTrainedConfig):
            value = _find(part, name)
            if value is not _MISSING and value is not None:
                return value
    return _MISSING


def pair(value: Any) -> tuple[int, int]:
    """Height and width from an int, a pair or a dictionary."""
    if isinstance(value, dict):
        return value["height"], value["width"]
    if isinstance(value, list | tuple):
        return (value[0], value[-1])
    return value, value


def _ids(config: PreTrainedConfig, tokens: int = TOKENS) -> Tensor:
    top = min(find(config, "vocab_size", default=128), 100)
    return torch.randint(min(8, top // 2), top, (BATCH, tokens))


GRID = 4


def _grid(config: PreTrainedConfig) -> Tensor:
    return torch.tensor([[1, GRID, GRID]] * BATCH)


def _patches(config: PreTrainedConfig) -> Tensor:
    size = find(config, "patch_size", default=8)
    size = size if isinstance(size, int) else size[-1]
    channels = find(config, "in_channels", "num_channels", "in_chans", default=3)
    time = find(config, "temporal_patch_size", default=1)
    return torch.randn(BATCH * GRID * GRID, channels * time * size * size)


def _image(config: PreTrainedConfig) -> Tensor:
    height, width = pair(find(config, "image_size", "img_size", default=64))
    channels = find(config, "num_channels", "in_channels", "in_chans", default=3)
    return torch.randn(BATCH, channels if isinstance(channels, int) else 3, height, width)


def _video(config: PreTrainedConfig) -> Tensor:
    frames = find(config, "num_frames", "frames_per_clip", default=2)
    height, width = pair(find(config, "image_size", "crop_size", default=64))
    return torch.randn(BATCH, frames, find(config, "num_channels", default=3), height, width)


def _wave(config: PreTrainedConfig) -> Tensor:
    if find(config, "audio_channels") is not None:
        return torch.randn(BATCH, find(config, "audio_channels"), 3840)
    return torch.randn(BATCH, 3840)


def _mel_bins(config: PreTrainedConfig) -> int:
    return find(
        config, "num_mel_bins", "input_feat_per_channel", "feature_size", "input_feat_size",
        "input_dim", "n_mels", "feature_projection_input_dim", default=80,
    )


FRAMES = 64


def _ones(config: PreTrainedConfig) -> Tensor:
    return torch.ones(BATCH, FRAMES, dtype=torch.long)


Maker = Callable[[PreTrainedConfig], Any]

MAKERS: dict[str, tuple[Maker, ...]] = {
    "input_ids": (_ids,),
    "decoder_input_ids": (lambda c: _ids(c, 7),),
    "pixel_values": (_image, _video),
    "pixel_values_videos": (_video,),
    "input_values": (_wave,),
    "input_features": (
        lambda c: torch.randn(BATCH, _mel_bins(c), FRAMES),
        lambda c: torch.randn(BATCH, FRAMES, _mel_bins(c)),
    ),
    "input_features_mask": (_ones,),
    "bbox": (lambda c: torch.randint(0, 20, (BATCH, TOKENS, 4)).sort(-1).values,),
}


def _with_grid(grid: str, accepted: Mapping[str, Any]) -> dict[str, tuple[Maker, ...]]:
    """Makers for models that take an image as a list of patches and a grid."""

    def squares(config: PreTrainedConfig) -> Tensor:
        size = find(config, "patch_size", default=8)
        return _patches(config).reshape(BATCH * GRID * GRID, -1, size, size)

    makers = {**MAKERS, grid: (_grid,)}
    makers["pixel_values"] = (
        _patches,
        squares,
        lambda c: squares(c).unsqueeze(0),
        lambda c: _patches(c).reshape(BATCH, GRID * GRID, -1),
    )
    del makers["pixel_values_videos"]
    if "pixel_values" not in accepted:
        makers["hidden_states"] = (_patches,)
    return makers


def inputs(kind: str, model: nn.Module) -> Iterator[dict[str, Any]]:
    """Inputs to try, the fullest first."""
    config = model.config
    if kind in GIVEN:
        torch.manual_seed(1)
        yield GIVEN[kind](config)
        return
    accepted = inspect.signature(model.forward).parameters
    grid = next((n for n in ("grid_thw", "image_grid_thw") if n in accepted), None)
    makers = MAKERS if grid is None else _with_grid(grid, accepted)
    known = [name for name in makers if name in accepted]
    required = [
        p.name
        for p in accepted.values()
        if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    if not set(required) <= set(makers):
        return
    main = model.main_input_name
    mains = [main] if isinstance(main, str) else list(main)
    tried: list[list[str]] = []
    without_video = [n for n in known if n != "pixel_values_videos"]
    for names in (known, without_video, [*mains, *required], ["input_ids", *required]):
        chosen = sorted({n for n in names if n in makers and n in accepted})
        if not chosen or chosen in tried:
            continue
        tried.append(chosen)
        for k in range(max(len(makers[name]) for name in chosen)):
            torch.manual_seed(1)
            yield {name: makers[name][min(k, len(makers[name]) - 1)](config) for name in chosen}


GIVEN: dict[str, Callable[[PreTrainedConfig], dict[str, Any]]] = {}


_MISMATCH = re.compile(r"tokens: (\d+),? features:? (\d+)")


def repaired(
    batch: dict[str, Any], error: Exception, config: PreTrainedConfig
) -> dict[str, Any] | None:
    """The batch with as many placeholder tokens as the error message asks for, or None."""
    text = str(error)
    found = _MISMATCH.search(text)
    if found is None or "input_ids" not in batch:
        return None
    kind = next((k for k in ("Image", "Video", "Audio", "Multimodal") if k in text), "Image").lower()
    token = find(config, f"{kind}_token_id", f"{kind}_token_index", "image_token_id", "image_token_index", "audio_token_id")
    if token is None:
        return None
    tokens, features = int(found.group(1)), int(found.group(2))
    if tokens == features:  # the message counts entries, not vectors
        features //= find(config, "hidden_size", default=1)
    if features % BATCH or features > 4000:
        return None
    count = features // BATCH
    ids = _ids(config, TOKENS + count)
    ids[:, 2 : 2 + count] = token
    return {**batch, "input_ids": ids}
