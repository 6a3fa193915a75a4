"""Tensors of the kinds that models take, in small sizes read from a configuration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

BATCH, TOKENS, FRAMES = 2, 12, 64
GRID = 4  # patches along each side of an image


def find(config: PreTrainedConfig, *names: str, default: Any = None) -> Any:
    """The first of these attributes that a configuration or one of its parts has."""
    for name in names:
        if (value := _find(config, name)) is not None:
            return value
    return default


def _find(config: PreTrainedConfig, name: str) -> Any:
    try:
        value = getattr(config, name, None)
    except Exception:  # it differs between layers
        value = None
    if value is not None:
        return value
    parts = (part for part in vars(config).values() if isinstance(part, PreTrainedConfig))
    return next((v for part in parts if (v := _find(part, name)) is not None), None)


def normal(*shape: int) -> Tensor:
    return torch.randn(BATCH, *shape)


def numbers(top: int, *shape: int) -> Tensor:
    return torch.randint(0, top, (BATCH, *shape))


def ones(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
    return torch.ones(BATCH, *shape, dtype=dtype)


def ids(config: PreTrainedConfig, tokens: int = TOKENS) -> Tensor:
    """Token numbers, none of them a special one where the vocabulary allows."""
    top = min(find(config, "vocab_size", default=128), 100)
    return torch.randint(min(8, top // 2), top, (BATCH, tokens))


def ids_with(config: PreTrainedConfig, token: int, count: int) -> Tensor:
    """Token numbers, ``count`` of them the placeholder ``token``."""
    found = ids(config, TOKENS + count)
    found[:, 2 : 2 + count] = token
    return found


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, dict):
        return value["height"], value["width"]
    return (value[0], value[-1]) if isinstance(value, list | tuple) else (value, value)


def image(config: PreTrainedConfig) -> Tensor:
    sides = _pair(find(config, "image_size", "img_size", "input_size", default=64))
    channels = find(config, "num_channels", "in_channels", "in_chans", default=3)
    return normal(channels if isinstance(channels, int) else 3, *sides)


def tiles(config: PreTrainedConfig) -> Tensor:
    """An image whole and cut in two."""
    return torch.stack([image(config) for _ in range(3)], 1)


def video(config: PreTrainedConfig) -> Tensor:
    frames = find(config, "num_frames", "frames_per_clip", default=2)
    sides = _pair(find(config, "image_size", "crop_size", default=64))
    return normal(frames, find(config, "num_channels", default=3), *sides)


def patches(config: PreTrainedConfig) -> Tensor:
    """The patches of all images in one list, (patches, entries)."""
    side = _pair(find(config, "patch_size", default=8))[-1]
    channels = find(config, "in_channels", "num_channels", "in_chans", default=3)
    times = find(config, "temporal_patch_size", "patch_temporal", default=1)
    return torch.randn(BATCH * GRID * GRID, channels * times * side * side)


def grid(config: PreTrainedConfig) -> Tensor:
    """Times, rows and columns of every image in ``patches``."""
    return torch.tensor([[1, GRID, GRID]] * BATCH)


def wave(config: PreTrainedConfig) -> Tensor:
    channels = find(config, "audio_channels")
    if channels is None and find(config, "downsampling_ratios") is None:
        return normal(3840)
    return normal(channels or 1, 3840)


def mel_bins(config: PreTrainedConfig) -> int:
    names = "num_mel_bins input_feat_per_channel feature_size input_feat_size input_dim n_mels"
    return find(config, *names.split(), "feature_projection_input_dim", default=80)
