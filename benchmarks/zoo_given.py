"""Inputs of the models that the general rules of ``zoo_inputs`` do not fit, by model type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.models.edgetam_video.modeling_edgetam_video import EdgeTamVideoInferenceSession
from transformers.models.esmfold2.modeling_esmfold2 import EsmFold2AtomInputs
from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoInferenceSession
from transformers.models.sam3_tracker_video.modeling_sam3_tracker_video import (
    Sam3TrackerVideoInferenceSession,
)

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
    numbers,
    ones,
    wave,
)


def _series(config: PreTrainedConfig) -> dict[str, Any]:
    past = config.context_length + max(config.lags_sequence)
    return {
        "past_values": normal(past),
        "past_time_features": normal(past, config.num_time_features),
        "past_observed_mask": torch.ones(BATCH, past),
        "future_values": normal(config.prediction_length),
        "future_time_features": normal(config.prediction_length, config.num_time_features),
    }


def _kosmos(config: PreTrainedConfig) -> dict[str, Any]:
    text = ids(config, TOKENS + 8)
    mask = torch.zeros_like(text)
    mask[:, 2:10] = 1
    return {"input_ids": text, "pixel_values": image(config), "image_embeds_position_mask": mask}


def _windows(config: PreTrainedConfig) -> dict[str, Any]:
    """Patches in a row, with the size of each image (MiniCPM)."""
    patch = find(config, "patch_size")
    return {
        "pixel_values": torch.randn(1, 3, patch, patch * GRID * GRID * BATCH),
        "target_sizes": torch.tensor([[GRID, GRID]] * BATCH),
    }


def _image_pair(config: PreTrainedConfig) -> dict[str, Any]:
    return {"pixel_values": torch.rand(BATCH, 2, 3, 64, 64)}


def _flat_patches(config: PreTrainedConfig) -> Tensor:
    width = find(config, "patch_embed_hidden_size", default=192)
    places = torch.stack([torch.arange(16) // 4 + 1, torch.arange(16) % 4 + 1], -1)
    patches = normal(16, width)
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
        "vision_features": normal(36, width),
        "text_features": normal(5, width),
        "vision_pos_encoding": normal(36, width),
        "spatial_shapes": torch.tensor([[6, 6]]),
    }


def _mask_decoder(config: PreTrainedConfig) -> dict[str, Any]:
    width = config.hidden_size
    return {
        "decoder_queries": normal(4, width),
        "backbone_features": [normal(width, s, s) for s in (24, 12, 6)],
        "encoder_hidden_states": normal(36, width),
    }


def _codec(config: PreTrainedConfig) -> dict[str, Any]:
    return {
        "input_values": normal(1, 640),
        "input_features": normal(80, 80),
    }


def _protein(config: PreTrainedConfig) -> dict[str, Any]:
    """Residues of one chain, each with three atoms (ESMFold2)."""
    places, same = torch.arange(TOKENS).expand(BATCH, TOKENS), ones(TOKENS)
    atoms = 3 * TOKENS
    of_token = torch.arange(atoms).div(3, rounding_mode="floor").expand(BATCH, atoms)
    atom_inputs = EsmFold2AtomInputs(
        ref_pos=normal(atoms, 3),
        ref_charge=torch.zeros(BATCH, atoms),
        atom_attention_mask=ones(atoms, dtype=torch.bool),
        ref_element=numbers(10, atoms),
        ref_atom_name_chars=numbers(20, atoms, config.max_chars),
        ref_space_uid=of_token,
        atom_to_token=of_token,
    )
    return {
        "token_index": places,
        "residue_index": places,
        "asym_id": same,
        "sym_id": same,
        "entity_id": same,
        "mol_type": 0 * same,
        "res_type": numbers(20, TOKENS),
        "token_bonds": torch.zeros(BATCH, TOKENS, TOKENS, 1),
        "attention_mask": same.bool(),
        "atom_inputs": atom_inputs,
        "msa": numbers(20, 3, TOKENS),
        "input_ids": numbers(20, TOKENS) + 4,
    }


def _tracked(
    config: PreTrainedConfig, session_type: Callable[..., Any], *places: int
) -> dict[str, Any]:
    """The second frame of a video, and what is remembered of an object in the first (SAM)."""
    side, memory = config.image_size, (*places, config.memory_encoder_output_channels)
    frames = torch.randn(2, 3, side, side)
    session = session_type(frames, side, side, dtype=frames.dtype)
    tracked = session.output_dict_per_obj[session.obj_id_to_idx(1)]
    tracked["cond_frame_outputs"][0] = {
        "maskmem_features": torch.randn(memory),
        "maskmem_pos_enc": torch.randn(memory),
        "object_pointer": torch.randn(1, config.memory_attention_hidden_size),
    }
    # Features that are kept would spare the next call, of another model, the vision encoder.
    session.cache.get_vision_features = lambda frame_idx: None
    return {"inference_session": session, "frame_idx": 1}


GIVEN: dict[str, Callable[[PreTrainedConfig], dict[str, Any]]] = {
    "audio-spectrogram-transformer": lambda c: {
        "input_values": normal(c.max_length, c.num_mel_bins)
    },
    **dict.fromkeys(("autoformer", "informer", "time_series_transformer"), _series),
    **dict.fromkeys(
        ("patchtst", "patchtsmixer"),
        lambda c: {"past_values": normal(c.context_length, c.num_input_channels)},
    ),
    "timesfm": lambda c: {
        "past_values": normal(32),
        "past_values_padding": torch.zeros(BATCH, 32),
        "freq": torch.zeros(BATCH, 1, dtype=torch.long),
    },
    "timesfm2_5": lambda c: {"past_values": normal(32)},
    "clap_audio_model": lambda c: {
        "input_features": normal(1, 512, 32),
        "is_longer": torch.zeros(BATCH, 1, dtype=torch.bool),
    },
    "clap": lambda c: {
        "input_ids": ids(c),
        "input_features": normal(1, 512, 32),
        "is_longer": torch.zeros(BATCH, 1, dtype=torch.bool),
    },
    "csm_depth_decoder_model": lambda c: {
        "input_ids": numbers(20, 4),
        "backbone_last_hidden_state": normal(64),
    },
    "mllama": lambda c: {
        "input_ids": ids(c),
        **GIVEN["mllama_vision_model"](c.vision_config),
    },
    "inkling2_vision": lambda c: {
        "pixel_values": torch.randn(
            BATCH * GRID * GRID, *[c.patch_size * c.spatial_merge_size] * 2, c.num_channels
        ),
        "image_grid_thw": grid(c),
    },
    "idefics": lambda c: {
        "input_ids": ids(c),
        "pixel_values": image(c.vision_config).unsqueeze(1),
        "attention_mask": ones(TOKENS),
        "image_attention_mask": ones(TOKENS, 1),
    },
    "kosmos-2": _kosmos,
    "lxmert": lambda c: {
        "input_ids": ids(c),
        "visual_feats": normal(5, c.visual_feat_dim),
        "visual_pos": torch.rand(BATCH, 5, 4),
    },
    **dict.fromkeys(("minicpm_ocr_vision", "minicpmv4_6_vision", "minicpmv4_7_vision"), _windows),
    **dict.fromkeys(("lightglue", "superglue", "efficientloftr"), _image_pair),
    "superpoint": lambda c: {"pixel_values": torch.rand(BATCH, 3, 64, 64)},
    "pix2struct": lambda c: {
        "flattened_patches": _flat_patches(c),
        "decoder_input_ids": ids(c, 7),
    },
    "pix2struct_vision_model": lambda c: {"flattened_patches": _flat_patches(c)},
    "kosmos_2_5_vision_model": lambda c: {"flattened_patches": _flat_patches(c)},
    "musicgen_decoder": lambda c: {"input_ids": torch.randint(0, 60, (BATCH * c.num_codebooks, 9))},
    "musicgen_melody_decoder": lambda c: {
        "input_ids": torch.randint(0, 60, (BATCH * c.num_codebooks, 9))
    },
    "musicgen": lambda c: {
        "input_ids": ids(c),
        "decoder_input_ids": torch.randint(0, 60, (BATCH * c.decoder.num_codebooks, 9)),
    },
    "musicgen_melody": lambda c: {
        "input_ids": ids(c),
        "decoder_input_ids": torch.randint(0, 60, (BATCH * c.decoder.num_codebooks, 9)),
    },
    "kyutai_speech_to_text": lambda c: {"input_ids": numbers(60, 9, c.num_codebooks + 1)},
    "moshi_depth": lambda c: {
        "input_ids": numbers(60, c.num_codebooks),
        "last_hidden_state": normal(1, c.input_size),
    },
    "mllama_vision_model": lambda c: {
        "pixel_values": normal(1, c.max_num_tiles, 3, c.image_size, c.image_size),
        "aspect_ratio_ids": ones(1),
        "aspect_ratio_mask": ones(1, c.max_num_tiles),
    },
    "seggpt": lambda c: {
        "pixel_values": torch.randn(1, 3, 32, 32),
        "prompt_pixel_values": torch.randn(1, 3, 32, 32),
        "prompt_masks": torch.randn(1, 3, 32, 32),
    },
    "pop2piano": lambda c: {"input_ids": ids(c), "decoder_input_ids": ids(c, 7)},
    "speech-encoder-decoder": lambda c: {"input_values": wave(c), "decoder_input_ids": ids(c, 7)},
    "instructblip": lambda c: {
        "pixel_values": image(c),
        "qformer_input_ids": ids(c),
        "input_ids": ids_with(c, c.image_token_index, 8),
    },
    "instructblipvideo": lambda c: {
        "pixel_values": normal(4, 3, 32, 32),
        "qformer_input_ids": ids(c),
        "input_ids": ids_with(c, c.video_token_index, 32),
    },
    **dict.fromkeys(
        ("mimi_decoder", "pocket_tts_audio_tokenizer_decoder"),
        lambda c: {"latents": normal(c.hidden_size, 8)},
    ),
    "vibevoice_acoustic_tokenizer_encoder": lambda c: {"hidden_states": normal(c.channels, 64)},
    "vibevoice_acoustic_tokenizer_decoder": lambda c: {"hidden_states": normal(c.hidden_size, 8)},
    "unlimited_ocr_vision_encoder": lambda c: {
        "patch_embeds": normal(c.hidden_size, GRID, GRID),
    },
    "deepseek_ocr2_encoder": lambda c: {
        "inputs_embeds": normal(TOKENS, c.hidden_size),
        "num_patches": 6,
    },
    "voxtral_realtime": lambda c: {
        "input_ids": ids(c, 8),
        "input_features": normal(mel_bins(c), FRAMES),
    },
    "voxtral_realtime_text": lambda c: {
        "input_ids": ids(c),
        "t_cond": torch.randn(1, 1, c.hidden_size),
    },
    "xclip_vision_model": lambda c: {
        "pixel_values": torch.cat([image(c) for _ in range(c.num_frames)])
    },
    "bridgetower_vision_model": lambda c: {"image": image(c)},
    "blip_2_qformer": lambda c: {
        "query_embeds": normal(8, c.hidden_size),
        "encoder_hidden_states": normal(6, c.encoder_hidden_size),
    },
    "flava_multimodal_model": lambda c: {"hidden_states": normal(9, c.hidden_size)},
    "florence_vision": lambda c: {"hidden_states": normal(3, 64, 64)},
    "gemma3n_audio": lambda c: {
        "audio_mel": normal(64, c.input_feat_size),
        "audio_mel_mask": torch.zeros(BATCH, 64, dtype=torch.bool),
    },
    "gemma4_audio": lambda c: {
        "input_features": normal(64, 128),
        "attention_mask": ones(64, dtype=torch.bool),
    },
    "gemma4_unified_assistant": lambda c: {
        "inputs_embeds": normal(4, 2 * c.backbone_hidden_size),
        "shared_kv_states": {
            kind: (normal(1, 6, 16), normal(1, 6, 16))
            for kind in ("full_attention", "sliding_attention")
        },
    },
    "granite_speech_encoder": lambda c: {"hidden_states": normal(16, c.input_dim)},
    "granite_speech_plus_encoder": lambda c: {"hidden_states": normal(16, c.input_dim)},
    "idefics2_perceiver": lambda c: {
        "context": normal(9, c.hidden_size),
        "attention_mask": torch.ones(BATCH, 9),
    },
    "blt_global_transformer": lambda c: {"inputs_embeds": normal(9, c.hidden_size)},
    "blt_local_encoder": lambda c: {
        "input_ids": ids(c),
        "patch_ids": torch.arange(TOKENS).div(4, rounding_mode="floor").expand(BATCH, TOKENS),
        "num_patches": TOKENS // 4,
    },
    "blt_local_decoder": lambda c: {
        "inputs_embeds": normal(8, c.hidden_size),
        "patch_embeds": normal(8 // c.cross_attn_k, c.hidden_size_global),
    },
    "fastspeech2_conformer_hifigan": lambda c: {"spectrogram": normal(12, c.model_in_dim)},
    "speecht5_hifigan": lambda c: {"spectrogram": normal(12, c.model_in_dim)},
    "phi4_multimodal_audio": lambda c: {
        "hidden_states": normal(32, c.input_size),
        "mask": ones(32, dtype=torch.bool),
    },
    "qwen2_5_omni_dit": lambda c: {
        "hidden_states": normal(16, c.mel_dim),
        "condition_vector": normal(20, c.mel_dim),
        "speaker_embedding": normal(16, c.enc_emb_dim),
        "quantized_code": numbers(c.num_embeds, 8),
        "time_step": torch.tensor(0.3),
    },
    "qwen2_5_omni_token2wav": lambda c: {
        "code": torch.randint(0, 60, (1, 8)),
        "conditioning": torch.randn(1, c.dit_config.enc_emb_dim),
        "reference_mel": torch.randn(1, 20, c.dit_config.mel_dim),
        "num_steps": 2,
    },
    **dict.fromkeys(
        ("qwen3_omni_moe_talker_code_predictor", "qwen3_omni_moe_talker_text"),
        lambda c: {"inputs_embeds": normal(4, c.hidden_size)},
    ),
    "qwen2_5_omni_bigvgan": lambda c: {"mel_spectrogram": normal(c.mel_dim, 12)},
    "pi0": lambda c: {
        "state": normal(c.max_state_dim),
        "input_ids": ids(c),
        "attention_mask": ones(TOKENS),
        "pixel_values": normal(1, 3, 32, 32),
        "pixel_attention_mask": ones(1, dtype=torch.bool),
        "actions": normal(c.chunk_size, c.max_action_dim),
    },
    "granite_speech5_ctc": lambda c: {"input_features": normal(32, 4 * mel_bins(c))},
    "granite_speech5_encoder": lambda c: {"input_features": normal(32, 4 * mel_bins(c))},
    "fun_asr_nano_encoder": lambda c: {
        "input_features": normal(16, c.num_mel_bins * c.num_stacked_frames),
        "input_features_mask": ones(16),
    },
    **dict.fromkeys(("qwen2_5_omni_audio_encoder", "qwen3_omni_moe_audio_encoder"), _mel_row),
    "qwen3_asr_encoder": lambda c: {
        "input_features": normal(c.num_mel_bins, 200),
        "input_features_mask": ones(200),
    },
    "qwen3_asr": lambda c: {"input_ids": ids(c), **GIVEN["qwen3_asr_encoder"](c.audio_config)},
    "esmfold2": _protein,
    "fun_asr_nano": lambda c: {
        "input_ids": ids(c),
        **GIVEN["fun_asr_nano_encoder"](c.audio_config),
    },
    "molmo2_vision": lambda c: {
        "pixel_values": normal(c.num_position_embeddings, 3 * c.patch_size**2)
    },
    "molmo2_adapter": lambda c: {
        "image_features": normal(16, 2 * c.hidden_size),
        "pooled_patches_idx": torch.arange(16 * BATCH).reshape(-1, 4),
    },
    "depth_pro": lambda c: {"pixel_values": torch.randn(1, 3, 128, 128)},
    "dots3_note_audio_encoder": lambda c: {
        "input_features": normal(mel_bins(c), FRAMES),
        "chunk_sample_lengths": torch.full((BATCH,), FRAMES * 160),
    },
    "gemma4_vision": lambda c: {
        "pixel_values": normal(16, 192),
        "pixel_position_ids": torch.stack([torch.arange(16) % 4, torch.arange(16) // 4], -1).expand(
            BATCH, 16, 2
        ),
    },
    "blt": lambda c: {"input_ids": ids(c), "use_cache": False},
    "dia_decoder": lambda c: {
        "input_ids": numbers(100, 8, c.num_channels),
        "encoder_hidden_states": normal(6, c.cross_hidden_size),
    },
    "sam3_lite_text_detr_encoder": lambda c: {
        "vision_features": [normal(c.hidden_size, 6, 6)],
        "text_features": normal(5, c.hidden_size),
        "vision_pos_embeds": [normal(c.hidden_size, 6, 6)],
    },
    "edgetam_video": lambda c: _tracked(c, EdgeTamVideoInferenceSession, 1, 24),
    "sam2_video": lambda c: _tracked(c, Sam2VideoInferenceSession, 64, 1),
    "sam3_tracker_video": lambda c: _tracked(c, Sam3TrackerVideoInferenceSession, 64, 1),
    "sam3_detr_decoder": _detr_decoder,
    "sam3_lite_text_detr_decoder": _detr_decoder,
    "sam3_mask_decoder": _mask_decoder,
    "sam3_lite_text_mask_decoder": _mask_decoder,
    "inkling_audio": lambda c: {"audio_input_ids": numbers(16, 8, getattr(c, "num_codebooks", 4))},
    "nemotron3_5_transcribe_word_timestamp": lambda c: {"inputs_embeds": normal(9, c.hidden_size)},
    "tvp": lambda c: {
        "input_ids": ids(c)[:1],
        "pixel_values": torch.randn(1, 2, 3, 64, 64),
        "attention_mask": torch.ones(1, TOKENS, dtype=torch.long),
    },
    "pe_audio": lambda c: {"input_ids": ids(c), "input_values": normal(1, 3840)},
    "pe_audio_encoder": lambda c: {"input_values": normal(1, 3840)},
    "rag": lambda c: {
        "input_ids": ids(c),
        "context_input_ids": ids(c).repeat(2, 1),
        "context_attention_mask": torch.ones(2 * BATCH, TOKENS, dtype=torch.long),
        "doc_scores": normal(2),
        "decoder_input_ids": ids(c, 7),
        "n_docs": 2,
    },
    "jev": lambda c: {
        "input_ids": ids(c)[:1],
        "marks": torch.tensor([[5, 9]]),
        "num_options": torch.tensor([[2, 2]]),
        "question_type_ids": torch.tensor([[0, 1]]),
    },
    "t5gemma2_decoder": lambda c: {
        "input_ids": ids(c),
        "encoder_hidden_states": normal(6, c.hidden_size),
    },
    "muse_glimmer_assistant": lambda c: {
        "noise_embeds": normal(4, c.hidden_size),
        "context_hidden_states": normal(6, c.hidden_size * len(c.target_layer_ids)),
    },
    "neucodec": _codec,
    "xcodec2": _codec,
    "pp_ocrv5_mobile_rec": lambda c: {"pixel_values": normal(3, 96, 128)},
    "oneformer": lambda c: {
        "pixel_values": normal(3, 64, 64),
        "task_inputs": torch.randint(1, 90, (BATCH, 77)),
    },
    "omdet-turbo": lambda c: {
        "pixel_values": torch.randn(1, 3, 64, 64),
        "classes_input_ids": ids(c),
        "classes_attention_mask": ones(TOKENS),
        "tasks_input_ids": ids(c)[:1],
        "tasks_attention_mask": torch.ones(1, TOKENS, dtype=torch.long),
        "classes_structure": torch.tensor([2]),
    },
    "sam3_detr_encoder": lambda c: {
        "vision_features": [normal(c.hidden_size, 6, 6)],
        "text_features": normal(5, c.hidden_size),
        "vision_pos_embeds": [normal(c.hidden_size, 6, 6)],
    },
}
