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
    time = find(config, "temporal_patch_size", "patch_temporal", default=1)
    return torch.randn(BATCH * GRID * GRID, channels * time * size * size)


def _image(config: PreTrainedConfig) -> Tensor:
    height, width = pair(find(config, "image_size", "img_size", "input_size", default=64))
    channels = find(config, "num_channels", "in_channels", "in_chans", default=3)
    return torch.randn(BATCH, channels if isinstance(channels, int) else 3, height, width)


def _video(config: PreTrainedConfig) -> Tensor:
    frames = find(config, "num_frames", "frames_per_clip", default=2)
    height, width = pair(find(config, "image_size", "crop_size", default=64))
    return torch.randn(BATCH, frames, find(config, "num_channels", default=3), height, width)


def _tiles(config: PreTrainedConfig) -> Tensor:
    """An image whole and cut in two."""
    return torch.stack([_image(config) for _ in range(3)], 1)


def _image_patches(config: PreTrainedConfig) -> Tensor:
    return _patches(config).reshape(BATCH, GRID * GRID, -1)


def _wave(config: PreTrainedConfig) -> Tensor:
    if find(config, "audio_channels", "downsampling_ratios") is not None:
        return torch.randn(BATCH, find(config, "audio_channels", default=1), 3840)
    return torch.randn(BATCH, 3840)


def _mel_bins(config: PreTrainedConfig) -> int:
    return find(
        config,
        "num_mel_bins",
        "input_feat_per_channel",
        "feature_size",
        "input_feat_size",
        "input_dim",
        "n_mels",
        "feature_projection_input_dim",
        default=80,
    )


FRAMES = 64


def _ones(config: PreTrainedConfig) -> Tensor:
    return torch.ones(BATCH, FRAMES, dtype=torch.long)


Maker = Callable[[PreTrainedConfig], Any]

MAKERS: dict[str, tuple[Maker, ...]] = {
    "input_ids": (_ids,),
    "decoder_input_ids": (lambda c: _ids(c, 7),),
    "pixel_values": (_image, _video, _tiles, _image_patches),
    "image_sizes": (lambda c: torch.tensor([_image(c).shape[-2:]] * BATCH),),
    "image_merge_sizes": (lambda c: torch.ones(BATCH, dtype=torch.long),),
    "high_res_pixel_values": (lambda c: _image(c.high_res_vision_config),),
    "feature_attention_mask": (_ones,),
    "pixel_values_videos": (_video,),
    "input_values": (_wave,),
    "input_features": (
        lambda c: torch.randn(BATCH, _mel_bins(c), FRAMES),
        lambda c: torch.randn(BATCH, FRAMES, _mel_bins(c)),
    ),
    "input_features_mask": (_ones,),
    "bbox": (lambda c: torch.randint(0, 20, (BATCH, TOKENS, 4)).sort(-1).values,),
}


_OF_IMAGES = (
    "pixel_values",
    "high_res_pixel_values",
    "image_sizes",
    "image_grid_thw",
    "image_merge_sizes",
)
_OF_SOUND = ("input_values", "input_features", "input_features_mask", "feature_attention_mask")


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
    if "spatial_shapes" in accepted:
        makers = {**MAKERS, **{n: (lambda c, n=n: _siglip(c)[n],) for n in _siglip(config)}}
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
    text = [n for n in known if "input_ids" in n]
    sets = (
        known,
        [n for n in known if n != "pixel_values_videos"],
        [*text, *_OF_IMAGES],
        [*text, "pixel_values"],
        [*text, *_OF_SOUND],
        [*mains, *required],
        ["input_ids", *required],
    )
    for names in sets:
        chosen = sorted({n for n in names if n in makers and n in accepted})
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


def _series(config: PreTrainedConfig) -> dict[str, Any]:
    past = config.context_length + max(config.lags_sequence)
    return {
        "past_values": torch.randn(BATCH, past),
        "past_time_features": torch.randn(BATCH, past, config.num_time_features),
        "past_observed_mask": torch.ones(BATCH, past),
        "future_values": torch.randn(BATCH, config.prediction_length),
        "future_time_features": torch.randn(
            BATCH, config.prediction_length, config.num_time_features
        ),
    }


def _tokens_with(config: PreTrainedConfig, token: int | None, count: int, start: int = 2) -> Tensor:
    ids = _ids(config, TOKENS + count)
    if token is not None:
        ids[:, start : start + count] = token
    return ids


def _states(*shape: int) -> Maker:
    return lambda config: torch.randn(BATCH, *shape, find(config, "hidden_size", "d_model"))


def _kosmos(config: PreTrainedConfig) -> dict[str, Any]:
    ids = _ids(config, TOKENS + 8)
    mask = torch.zeros_like(ids)
    mask[:, 2:10] = 1
    return {"input_ids": ids, "pixel_values": _image(config), "image_embeds_position_mask": mask}


def _windows(config: PreTrainedConfig) -> dict[str, Any]:
    """Patches in a row, with the size of each image (MiniCPM)."""
    patch = find(config, "patch_size")
    return {
        "pixel_values": torch.randn(1, 3, patch, patch * GRID * GRID * BATCH),
        "target_sizes": torch.tensor([[GRID, GRID]] * BATCH),
    }


def _siglip(config: PreTrainedConfig) -> dict[str, Any]:
    patches = _patches(config).reshape(BATCH, GRID * GRID, -1)
    return {
        "pixel_values": patches,
        "pixel_attention_mask": torch.ones(BATCH, GRID * GRID, dtype=torch.long),
        "spatial_shapes": torch.tensor([[GRID, GRID]] * BATCH),
    }


def _image_pair(config: PreTrainedConfig) -> dict[str, Any]:
    return {"pixel_values": torch.rand(BATCH, 2, 3, 64, 64)}


def _flat_patches(config: PreTrainedConfig) -> Tensor:
    width = find(config, "patch_embed_hidden_size", default=192)
    places = torch.stack([torch.arange(16) // 4 + 1, torch.arange(16) % 4 + 1], -1)
    patches = torch.randn(BATCH, 16, width)
    return torch.cat([places.expand(BATCH, 16, 2).float(), patches], -1)


def _mel_row(config: PreTrainedConfig) -> dict[str, Any]:
    """Two recordings one after the other (Qwen)."""
    frames = 2 * config.n_window
    batch = {
        "input_features": torch.randn(config.num_mel_bins, 2 * frames),
        "feature_lens": torch.tensor([frames, frames]),
    }
    if config.model_type.startswith("qwen2"):
        batch["aftercnn_lens"] = torch.tensor([frames // 2, frames // 2])
    return batch


def _detr_decoder(config: PreTrainedConfig) -> dict[str, Any]:
    width = config.hidden_size
    return {
        "vision_features": torch.randn(BATCH, 36, width),
        "text_features": torch.randn(BATCH, 5, width),
        "vision_pos_encoding": torch.randn(BATCH, 36, width),
        "spatial_shapes": torch.tensor([[6, 6]]),
    }


def _mask_decoder(config: PreTrainedConfig) -> dict[str, Any]:
    width = config.hidden_size
    return {
        "decoder_queries": torch.randn(BATCH, 4, width),
        "backbone_features": [torch.randn(BATCH, width, s, s) for s in (24, 12, 6)],
        "encoder_hidden_states": torch.randn(BATCH, 36, width),
    }


def _codec(config: PreTrainedConfig) -> dict[str, Any]:
    return {
        "input_values": torch.randn(BATCH, 1, 640),
        "input_features": torch.randn(BATCH, 80, 80),
    }


GIVEN: dict[str, Callable[[PreTrainedConfig], dict[str, Any]]] = {
    "audio-spectrogram-transformer": lambda c: {
        "input_values": torch.randn(BATCH, c.max_length, c.num_mel_bins)
    },
    **dict.fromkeys(("autoformer", "informer", "time_series_transformer"), _series),
    **dict.fromkeys(
        ("patchtst", "patchtsmixer"),
        lambda c: {"past_values": torch.randn(BATCH, c.context_length, c.num_input_channels)},
    ),
    "timesfm": lambda c: {
        "past_values": torch.randn(BATCH, 32),
        "past_values_padding": torch.zeros(BATCH, 32),
        "freq": torch.zeros(BATCH, 1, dtype=torch.long),
    },
    "timesfm2_5": lambda c: {"past_values": torch.randn(BATCH, 32)},
    "clap_audio_model": lambda c: {
        "input_features": torch.randn(BATCH, 1, 512, 32),
        "is_longer": torch.zeros(BATCH, 1, dtype=torch.bool),
    },
    "clap": lambda c: {
        "input_ids": _ids(c),
        "input_features": torch.randn(BATCH, 1, 512, 32),
        "is_longer": torch.zeros(BATCH, 1, dtype=torch.bool),
    },
    "csm_depth_decoder_model": lambda c: {
        "input_ids": torch.randint(0, 20, (BATCH, 4)),
        "backbone_last_hidden_state": torch.randn(BATCH, 64),
    },
    "mllama": lambda c: {
        "input_ids": _ids(c),
        **GIVEN["mllama_vision_model"](c.vision_config),
    },
    "inkling2_vision": lambda c: {
        "pixel_values": torch.randn(BATCH * GRID * GRID * c.patch_size**2, 3),
        "image_grid_thw": _grid(c),
    },
    "idefics": lambda c: {
        "input_ids": _ids(c),
        "pixel_values": _image(c.vision_config).unsqueeze(1),
        "attention_mask": torch.ones(BATCH, TOKENS, dtype=torch.long),
        "image_attention_mask": torch.ones(BATCH, TOKENS, 1, dtype=torch.long),
    },
    "kosmos-2": _kosmos,
    "lxmert": lambda c: {
        "input_ids": _ids(c),
        "visual_feats": torch.randn(BATCH, 5, c.visual_feat_dim),
        "visual_pos": torch.rand(BATCH, 5, 4),
    },
    **dict.fromkeys(("minicpm_ocr_vision", "minicpmv4_6_vision", "minicpmv4_7_vision"), _windows),
    **dict.fromkeys(("lightglue", "superglue", "efficientloftr"), _image_pair),
    "superpoint": lambda c: {"pixel_values": torch.rand(BATCH, 3, 64, 64)},
    "pix2struct": lambda c: {
        "flattened_patches": _flat_patches(c),
        "decoder_input_ids": _ids(c, 7),
    },
    "pix2struct_vision_model": lambda c: {"flattened_patches": _flat_patches(c)},
    "kosmos_2_5_vision_model": lambda c: {"flattened_patches": _flat_patches(c)},
    "musicgen_decoder": lambda c: {"input_ids": torch.randint(0, 60, (BATCH * c.num_codebooks, 9))},
    "musicgen_melody_decoder": lambda c: {
        "input_ids": torch.randint(0, 60, (BATCH * c.num_codebooks, 9))
    },
    "musicgen": lambda c: {
        "input_ids": _ids(c),
        "decoder_input_ids": torch.randint(0, 60, (BATCH * c.decoder.num_codebooks, 9)),
    },
    "musicgen_melody": lambda c: {
        "input_ids": _ids(c),
        "decoder_input_ids": torch.randint(0, 60, (BATCH * c.decoder.num_codebooks, 9)),
    },
    "kyutai_speech_to_text": lambda c: {
        "input_ids": torch.randint(0, 60, (BATCH, 9, c.num_codebooks + 1))
    },
    "moshi_depth": lambda c: {
        "input_ids": torch.randint(0, 60, (BATCH, c.num_codebooks)),
        "last_hidden_state": torch.randn(BATCH, 1, c.input_size),
    },
    "mllama_vision_model": lambda c: {
        "pixel_values": torch.randn(BATCH, 1, c.max_num_tiles, 3, c.image_size, c.image_size),
        "aspect_ratio_ids": torch.ones(BATCH, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(BATCH, 1, c.max_num_tiles, dtype=torch.long),
    },
    "seggpt": lambda c: {
        "pixel_values": torch.randn(1, 3, 32, 32),
        "prompt_pixel_values": torch.randn(1, 3, 32, 32),
        "prompt_masks": torch.randn(1, 3, 32, 32),
    },
    "pop2piano": lambda c: {"input_ids": _ids(c), "decoder_input_ids": _ids(c, 7)},
    "speech-encoder-decoder": lambda c: {"input_values": _wave(c), "decoder_input_ids": _ids(c, 7)},
    "instructblip": lambda c: {
        "pixel_values": _image(c),
        "qformer_input_ids": _ids(c),
        "input_ids": _tokens_with(c, c.image_token_index, 8),
    },
    "instructblipvideo": lambda c: {
        "pixel_values": torch.randn(BATCH, 4, 3, 32, 32),
        "qformer_input_ids": _ids(c),
        "input_ids": _tokens_with(c, c.video_token_index, 32),
    },
    "bridgetower_vision_model": lambda c: {"image": _image(c)},
    "blip_2_qformer": lambda c: {
        "query_embeds": torch.randn(BATCH, 8, c.hidden_size),
        "encoder_hidden_states": torch.randn(BATCH, 6, c.encoder_hidden_size),
    },
    "flava_multimodal_model": lambda c: {"hidden_states": torch.randn(BATCH, 9, c.hidden_size)},
    "florence_vision": lambda c: {"hidden_states": torch.randn(BATCH, 3, 64, 64)},
    "gemma3n_audio": lambda c: {
        "audio_mel": torch.randn(BATCH, 64, c.input_feat_size),
        "audio_mel_mask": torch.zeros(BATCH, 64, dtype=torch.bool),
    },
    "gemma4_audio": lambda c: {
        "input_features": torch.randn(BATCH, 64, 128),
        "attention_mask": torch.ones(BATCH, 64, dtype=torch.bool),
    },
    "granite_speech_encoder": lambda c: {"hidden_states": torch.randn(BATCH, 16, c.input_dim)},
    "granite_speech_plus_encoder": lambda c: {"hidden_states": torch.randn(BATCH, 16, c.input_dim)},
    "idefics2_perceiver": lambda c: {
        "context": torch.randn(BATCH, 9, c.hidden_size),
        "attention_mask": torch.ones(BATCH, 9),
    },
    "blt_global_transformer": lambda c: {"inputs_embeds": torch.randn(BATCH, 9, c.hidden_size)},
    "fastspeech2_conformer_hifigan": lambda c: {
        "spectrogram": torch.randn(BATCH, 12, c.model_in_dim)
    },
    "speecht5_hifigan": lambda c: {"spectrogram": torch.randn(BATCH, 12, c.model_in_dim)},
    "phi4_multimodal_audio": lambda c: {
        "hidden_states": torch.randn(BATCH, 32, c.input_size),
        "mask": torch.ones(BATCH, 32, dtype=torch.bool),
    },
    "qwen2_5_omni_bigvgan": lambda c: {"mel_spectrogram": torch.randn(BATCH, c.mel_dim, 12)},
    "pi0": lambda c: {
        "state": torch.randn(BATCH, c.max_state_dim),
        "input_ids": _ids(c),
        "attention_mask": torch.ones(BATCH, TOKENS, dtype=torch.long),
        "pixel_values": torch.randn(BATCH, 1, 3, 32, 32),
        "pixel_attention_mask": torch.ones(BATCH, 1, dtype=torch.bool),
        "actions": torch.randn(BATCH, c.chunk_size, c.max_action_dim),
    },
    "granite_speech5_ctc": lambda c: {"input_features": torch.randn(BATCH, 32, 4 * _mel_bins(c))},
    "granite_speech5_encoder": lambda c: {
        "input_features": torch.randn(BATCH, 32, 4 * _mel_bins(c))
    },
    "fun_asr_nano_encoder": lambda c: {
        "input_features": torch.randn(BATCH, 16, c.num_mel_bins * c.num_stacked_frames),
        "input_features_mask": torch.ones(BATCH, 16, dtype=torch.long),
    },
    **dict.fromkeys(("qwen2_5_omni_audio_encoder", "qwen3_omni_moe_audio_encoder"), _mel_row),
    "qwen3_asr_encoder": lambda c: {
        "input_features": torch.randn(BATCH, c.num_mel_bins, 200),
        "input_features_mask": torch.ones(BATCH, 200, dtype=torch.long),
    },
    "qwen3_asr": lambda c: {"input_ids": _ids(c), **GIVEN["qwen3_asr_encoder"](c.audio_config)},
    "fun_asr_nano": lambda c: {
        "input_ids": _ids(c),
        **GIVEN["fun_asr_nano_encoder"](c.audio_config),
    },
    "molmo2_vision": lambda c: {"pixel_values": torch.randn(BATCH, 16, 192)},
    "depth_pro": lambda c: {"pixel_values": torch.randn(1, 3, 128, 128)},
    "dots3_note_audio_encoder": lambda c: {
        "input_features": torch.randn(BATCH, _mel_bins(c), FRAMES),
        "chunk_sample_lengths": torch.full((BATCH,), FRAMES * 160),
    },
    "gemma4_vision": lambda c: {
        "pixel_values": torch.randn(BATCH, 16, 192),
        "pixel_position_ids": torch.stack([torch.arange(16) % 4, torch.arange(16) // 4], -1).expand(
            BATCH, 16, 2
        ),
    },
    "blt": lambda c: {"input_ids": _ids(c), "use_cache": False},
    "dia_decoder": lambda c: {
        "input_ids": torch.randint(0, 100, (BATCH, 8, c.num_channels)),
        "encoder_hidden_states": torch.randn(BATCH, 6, c.cross_hidden_size),
    },
    "chameleon_vqgan": lambda c: {"pixel_values": torch.randn(BATCH, 3, 64, 64)},
    "sam3_lite_text_detr_encoder": lambda c: {
        "vision_features": [torch.randn(BATCH, c.hidden_size, 6, 6)],
        "text_features": torch.randn(BATCH, 5, c.hidden_size),
        "vision_pos_embeds": [torch.randn(BATCH, c.hidden_size, 6, 6)],
    },
    "sam3_detr_decoder": _detr_decoder,
    "sam3_lite_text_detr_decoder": _detr_decoder,
    "sam3_mask_decoder": _mask_decoder,
    "sam3_lite_text_mask_decoder": _mask_decoder,
    "inkling_audio": lambda c: {
        "audio_input_ids": torch.randint(0, 16, (BATCH, 8, getattr(c, "num_codebooks", 4)))
    },
    "nemotron3_5_transcribe_word_timestamp": lambda c: {
        "inputs_embeds": torch.randn(BATCH, 9, c.hidden_size)
    },
    "tvp": lambda c: {
        "input_ids": _ids(c)[:1],
        "pixel_values": torch.randn(1, 2, 3, 64, 64),
        "attention_mask": torch.ones(1, TOKENS, dtype=torch.long),
    },
    "pe_audio": lambda c: {"input_ids": _ids(c), "input_values": torch.randn(BATCH, 1, 3840)},
    "pe_audio_encoder": lambda c: {"input_values": torch.randn(BATCH, 1, 3840)},
    "rag": lambda c: {
        "input_ids": _ids(c),
        "context_input_ids": _ids(c).repeat(2, 1),
        "context_attention_mask": torch.ones(2 * BATCH, TOKENS, dtype=torch.long),
        "doc_scores": torch.randn(BATCH, 2),
        "decoder_input_ids": _ids(c, 7),
        "n_docs": 2,
    },
    "jev": lambda c: {
        "input_ids": _ids(c)[:1],
        "marks": torch.tensor([[5, 9]]),
        "num_options": torch.tensor([[2, 2]]),
        "question_type_ids": torch.tensor([[0, 1]]),
    },
    "t5gemma2_decoder": lambda c: {
        "input_ids": _ids(c),
        "encoder_hidden_states": torch.randn(BATCH, 6, c.hidden_size),
    },
    "muse_glimmer_assistant": lambda c: {
        "noise_embeds": torch.randn(BATCH, 4, c.hidden_size),
        "context_hidden_states": torch.randn(BATCH, 6, c.hidden_size * len(c.target_layer_ids)),
    },
    "neucodec": _codec,
    "xcodec2": _codec,
    "pp_ocrv5_mobile_rec": lambda c: {"pixel_values": torch.randn(BATCH, 3, 96, 128)},
    "oneformer": lambda c: {
        "pixel_values": torch.randn(BATCH, 3, 64, 64),
        "task_inputs": torch.randint(1, 90, (BATCH, 77)),
    },
    "omdet-turbo": lambda c: {
        "pixel_values": torch.randn(1, 3, 64, 64),
        "classes_input_ids": _ids(c),
        "classes_attention_mask": torch.ones(BATCH, TOKENS, dtype=torch.long),
        "tasks_input_ids": _ids(c)[:1],
        "tasks_attention_mask": torch.ones(1, TOKENS, dtype=torch.long),
        "classes_structure": torch.tensor([2]),
    },
    "sam3_detr_encoder": lambda c: {
        "vision_features": [torch.randn(BATCH, c.hidden_size, 6, 6)],
        "text_features": torch.randn(BATCH, 5, c.hidden_size),
        "vision_pos_embeds": [torch.randn(BATCH, c.hidden_size, 6, 6)],
    },
}


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
    return {**batch, "input_ids": _tokens_with(config, token, features // BATCH)}
