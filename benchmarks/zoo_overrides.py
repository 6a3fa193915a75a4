"""What the small configurations of some architectures need beyond the rules of ``zoo_configs``.

By model type: the fields to set, where a mapping changes fields of a part. Some say what the rules
cannot know (two fields that have to agree), some give what the standard configuration lacks.
"""

from __future__ import annotations

from typing import Any

from transformers import ResNetConfig

_SWIN = {"window_size": 4, "image_size": 64}
_MOE = {
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
_GEMMA3N = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "intermediate_size": [96] * 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
    "laurel_rank": 16,
}
_SERIES = {
    "prediction_length": 4,
    "context_length": 8,
    "lags_sequence": [1, 2, 3],
    "label_length": 4,
    "moving_average": 3,
    "num_time_features": 1,
}
_DAC = {
    "encoder_hidden_size": 16,
    "decoder_hidden_size": 64,
    "downsampling_ratios": (2, 4),
    "n_codebooks": 2,
}
_CODEC = {"encoder_hidden_size": 16, "downsampling_ratios": (2, 4), "quantization_dim": 128}
_VIBEVOICE = {"num_filters": 8, "downsampling_ratios": (2, 4), "depths": (1, 1, 1)}
_HIERA = {
    "hidden_size": 16,
    "image_size": [128, 128],
    "blocks_per_stage": [1, 1, 2, 1],
    "embed_dim_per_stage": [16, 32, 64, 128],
    "window_size_per_stage": [4, 2, 4, 2],
    "global_attention_blocks": [3],
    "num_attention_heads": 1,
}
_SAM2_VISION = {
    "backbone_config": _HIERA,
    "backbone_channel_list": [128, 64, 32, 16],
    "fpn_hidden_size": 64,
    "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
}
_SAM2_VIDEO = {
    "image_size": 128,
    "prompt_encoder_config": {"image_size": 128, "patch_size": 16},
    "memory_attention_rope_feat_sizes": [8, 8],
}
_PP_V6 = {
    "layer_list_out_channels": (48, 48, 64, 96),
    "backbone_config": {
        "out_features": ["stage1", "stage2", "stage3", "stage4"],
        "stem_channels": (3, 24, 48),
        "block_configs": [
            [[3, 48, 48, 1, True]],
            [[3, 48, 48, 2, False]],
            [[3, 48, 64, 2, False]],
            [[3, 64, 96, 2, False]],
        ],
    },
}
_INTRACLASS = {
    "intraclass_block_config": {
        "reduce_channel": [1, 1, 0],
        "return_channel": [1, 1, 0],
        **{
            f"vertical_long_to_small_conv_{r}ratio": [[k, 1], 1, [k // 2, 0]]
            for r, k in (("long", 7), ("mid", 5), ("short", 3))
        },
        **{
            f"horizontal_small_to_long_conv_{r}ratio": [[1, k], 1, [0, k // 2]]
            for r, k in (("long", 7), ("mid", 5), ("short", 3))
        },
        **{
            f"symmetric_conv_long_{r}ratio": [k, 1, k // 2]
            for r, k in (("long", 7), ("mid", 5), ("short", 3))
        },
    }
}


_ATOMS = {
    "hidden_size": 64,
    "output_dim": 64,
    "num_attention_heads": 4,
    "head_dim": 16,
    "num_spatial_rope_pairs_per_axis": 1,
    "num_uid_rope_pairs": 5,
}


def _resnet(*stages: str) -> ResNetConfig:
    outputs: dict[str, Any] = {"out_features": list(stages)}
    return ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 24, 32, 48], depths=[1, 1, 1, 1], **outputs
    )


def _on_resnet(*stages: str) -> dict[str, Any]:
    """A detector on a ResNet of transformers, where the standard one comes from timm."""
    return {
        "backbone_config": _resnet(*stages),
        "use_timm_backbone": False,
        "use_pretrained_backbone": False,
        "backbone": None,
    }


_ANYRES = {"image_grid_pinpoints": [[32, 64], [64, 32]]}


def _letters(number: int) -> str:
    return "".join(chr(65 + int(digit)) for digit in str(number))


# Names of the tokens that stand for pieces of an image.
_CHAMELEON = {"<image>": 150, **{f"IMGIMG{_letters(k)}Z": 80 + k for k in range(64)}}
_EMU = {
    "<image>": 150,
    "<|extra_200|>": 149,
    **{f"<|visual token {k:06}|>": 80 + k for k in range(64)},
}
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 257, "local_attention_window_len": 16},
    "clvp_encoder": {"hidden_size": 128, "projection_dim": 128},
    "cohere_compass_text": {
        "rope_parameters": {
            k: {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
            for k in ("full_attention", "sliding_attention")
        }
    },
    "deepseek_v2": {**_MOE, "n_group": 1, "topk_group": 1},
    "dots1": _MOE,
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [32, 24],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [3, 3, 2],
        },
    },
    "esm": {"vocab_size": 33, "mask_token_id": 32, "pad_token_id": 1},
    "gemma3n_text": _GEMMA3N,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "window_size": 8},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_dt_rank": 8,
        "use_mamba_kernels": False,
    },
    "lfm2_moe": {
        "num_hidden_layers": 4,
        "layer_types": ["conv", "full_attention", "conv", "full_attention"],
        "num_dense_layers": 1,
    },
    "lilt": {"max_2d_position_embeddings": 128, "hidden_size": 96},
    "longcat_flash": {"qk_head_dim": 32, "zero_expert_num": 2, "expert_ffn_hidden_size": 32},
    "mamba2": {"num_heads": 8, "n_groups": 2},
    "mimi": {
        "hidden_size": 64,
        "upsampling_ratios": [4, 2],
        "codebook_dim": 32,
        "vector_quantization_hidden_dimension": 32,
    },
    "mimi_decoder": {"upsampling_ratios": [4, 2]},
    "nemotron_h": {"n_groups": 2},
    "recurrent_gemma": {"num_hidden_layers": 3, "attention_window_size": 8},
    "reformer": {
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [4, 8],
        "axial_pos_embds_dim": [16, 48],
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "feed_forward_size": 96,
        "num_buckets": 4,
        "is_decoder": True,
        "hash_seed": 0,
    },
    "step3p5": {"sliding_window": 8},
    "t5gemma2_text": {"dropout_rate": 0.0},
    "xlstm": {"qk_dim_factor": 1.0},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "mamba_dt_rank": 8,
        "use_mamba_kernels": False,
    },
    "perceiver": {
        "d_latents": 64,
        "d_model": 64,
        "num_self_attends_per_block": 2,
        "num_self_attention_heads": 4,
        "num_cross_attention_heads": 4,
        "max_position_embeddings": 64,
        "train_size": [16, 16],
    },
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 32},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
        "hc_lowrank": 8,
        "ngram_vocab_size_base": 64,
    },
    "wav2vec2-bert": {
        "vocab_size": 64,
        "feature_projection_input_dim": 80,
        "max_source_positions": 128,
    },
    "efficientnet": {
        "image_size": 64,
        "width_coefficient": 1.0,
        "depth_coefficient": 1.0,
        "hidden_dim": 1280,
        "in_channels": (32, 16, 24, 24),
        "out_channels": (16, 24, 24, 32),
        "kernel_sizes": (3, 3, 5, 3),
        "strides": (1, 2, 2, 2),
        "num_block_repeats": (1, 1, 2, 1),
        "expand_ratios": (1, 4, 4, 4),
    },
    "swin": _SWIN,
    "swinv2": _SWIN,
    "maskformer-swin": _SWIN,
    "levit": {"image_size": 64, "patch_size": 16},
    "bit": {"num_groups": 8},
    "audio-spectrogram-transformer": {
        "max_length": 64,
        "num_mel_bins": 32,
        "frequency_stride": 8,
        "time_stride": 8,
    },
    "autoformer": _SERIES,
    "informer": _SERIES,
    "time_series_transformer": _SERIES,
    "clap_audio_model": {
        "num_hidden_layers": 4,
        "depths": (2, 2, 2, 2),
        "num_attention_heads": (4, 8, 16, 32),
        "patch_embeds_hidden_size": 32,
        "hidden_size": 256,
        "spec_size": 128,
        "num_mel_bins": 32,
        "window_size": 4,
    },
    "focalnet": {"embed_dim": 16},
    "muse_spark_audio": {
        "num_hidden_layers": 4,
        "hidden_sizes": (16, 32, 64, 128),
        "patch_sizes": (16, 6, 5, 4),
        "depths": (1, 1, 1, 1),
    },
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "gemma3": {"mm_tokens_per_image": 4},
    "shieldgemma2": {"mm_tokens_per_image": 4},
    "llava_next": _ANYRES,
    "llava_next_video": _ANYRES,
    "llava_onevision": _ANYRES,
    "t5gemma2_encoder": {"mm_tokens_per_image": 4},
    "vipllava": {"vision_feature_layers": [-1, -2, -1, -2, 1]},
    "voxtral": {"audio_token_id": 150},
    "voxtral_encoder": {"intermediate_size": 256},
    "glmasr_encoder": {"intermediate_size": 256},
    "cvt": {"depth": (1, 2, 10)},
    "dac": _DAC,
    "deepseek_ocr2_text": {
        **_MOE,
        "n_group": 1,
        "topk_group": 1,
        "mlp_layer_types": ["dense", "sparse"],
    },
    "depth_pro": {
        "patch_size": 32,
        "intermediate_hook_ids": (1, 0),
        "intermediate_feature_dims": (64, 64),
        "scaled_images_feature_dims": (64, 64, 32),
        "fusion_hidden_size": 64,
    },
    "dots3_note_audio_encoder": {"adapter_input_size": 64, "adapter_out_dim": 64},
    "sam2_hiera_det_model": _HIERA,
    "sam2_vision_model": _SAM2_VISION,
    "emu3": {"vocabulary_map": _EMU},
    "emu3_vqgan": {"hidden_size": 128},
    "chameleon": {"vocabulary_map": _CHAMELEON},
    "janus_vqgan": {"num_patches": 4},
    "chameleon_vqgan": {"resolution": 64},
    "esmc": {"hidden_size": 64},
    "esmfold2": {
        "hidden_size": 64,
        "pairwise_hidden_size": 32,
        "single_inputs_size": 64 + 2 * 33 + 1,
        "num_loops": 1,
        "atom_feature_dim": None,
        "atom_encoder": _ATOMS,
        "structure_head": {"diffusion_module": {"hidden_size": 64, "atom_encoder": _ATOMS}},
    },
    "fun_asr_nano": {"adaptor_config": {"hidden_size": 64, "intermediate_size": 16}},
    "kosmos-2": {"latent_query_num": 8},
    "layoutlmv3": {
        "coordinate_size": 12,
        "shape_size": 8,
        "input_size": 32,
        "max_2d_position_embeddings": 128,
    },
    "superpoint": {"keypoint_decoder_dim": 65},
    "llama4_vision_model": {
        "intermediate_size": 256,
        "vision_output_dim": 64,
        "projector_input_dim": 64,
        "projector_output_dim": 64,
    },
    "lw_detr_vit": {
        "image_size": 64,
        "num_windows": 4,
        "num_hidden_layers": 4,
        "out_indices": [1, 2, 3, 4],
        "window_block_indices": [0, 2],
    },
    "lw_detr": {"projector_scale_factors": [1.0], "group_detr": 1},
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0], "text_hidden_size": 64}},
    "minicpm_ocr_vision": {"insert_layer_id": 1},
    "minicpmv4_6_vision": {"insert_layer_id": 1},
    "minicpmv4_7_vision": {"insert_layer_id": 1},
    "timesfm": {"patch_length": 8, "context_length": 32, "horizon_length": 8, "hidden_size": 64},
    "timesfm2_5": {
        "patch_length": 8,
        "context_length": 32,
        "horizon_length": 8,
        "output_quantile_len": 16,
    },
    "patchtst": {"d_model": 32, "patch_length": 4, "patch_stride": 4},
    "patchtsmixer": {"d_model": 32},
    "neucodec": _CODEC,
    "xcodec2": _CODEC,
    "pe_audio_encoder": {"dac_config": {"downsampling_ratios": [2, 4], "codebook_dim": 64}},
    "xcodec": {
        "target_bandwidths": (0.5, 1),
        "acoustic_model_config": {"downsampling_ratios": (8, 5, 4, 2)},
        "codebook_dim": None,
    },
    "paddleocr_vl_text": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [2, 3, 3],
        }
    },
    "vibevoice_acoustic_tokenizer": _VIBEVOICE,
    "vibevoice_acoustic_tokenizer_encoder": _VIBEVOICE,
    "vibevoice_acoustic_tokenizer_decoder": {**_VIBEVOICE, "downsampling_ratios": (4, 2)},
    "vivit": {"tubelet_size": (2, 8, 8), "num_frames": 4, "image_size": 32},
    "pp_doclayout_v3": {"x4_feat_dim": 48},
    "qwen2_5_omni_bigvgan": {
        "upsample_initial_channel": 64,
        "upsample_rates": (2, 2),
        "upsample_kernel_sizes": (4, 4),
    },
    "univnet": {},
    "seggpt": {
        "image_size": (64, 32),
        "pretrain_image_size": 32,
        "merge_index": 0,
        "intermediate_hidden_state_indices": [0, 1],
    },
    "kimi_k25_vision": {"pos_emb_height": 8, "pos_emb_width": 8},
    "vitmatte": {
        "backbone_config": {
            "num_hidden_layers": 2,
            "out_indices": [2],
            "patch_size": 16,
            "image_size": 64,
        },
        "convstream_hidden_sizes": [16, 24, 32],
        "fusion_hidden_sizes": [32, 24, 16, 16],
    },
    "xmod": {"languages": ["en_XX", "de_DE"], "default_language": "en_XX"},
    "zoedepth": {"bottleneck_features": 64},
    "upernet": {
        "backbone_config": _resnet("stage1", "stage2", "stage3", "stage4"),
        "auxiliary_channels": 64,
    },
    "uvdoc": {"backbone_config": {"out_features": [f"stage{k}" for k in range(1, 7)]}},
    "unlimited_ocr_sam_vision_model": {"downsample_channels": [32, 64]},
    "deepseek_ocr2_sam_vision_model": {"downsample_channels": [32, 64]},
    "pix2struct_vision_model": {"seq_len": 32, "patch_embed_hidden_size": 192},
    "align": {"projection_dim": 32},
    **dict.fromkeys(
        ("detr", "conditional_detr", "dab-detr", "table-transformer"), _on_resnet("stage4")
    ),
    "deformable_detr": _on_resnet("stage2", "stage3", "stage4"),
    "omdet-turbo": {
        **_on_resnet("stage2", "stage3", "stage4"),
        "encoder_in_channels": (24, 32, 48),
        "vision_features_channels": (64, 64, 64),
        "apply_layernorm_after_vision_backbone": False,
        "text_config": {"hidden_size": 48, "projection_dim": 48},
        "text_projection_in_dim": 48,
        "text_projection_out_dim": 48,
        "class_embed_dim": 48,
        "image_size": 64,
    },
    "moonshine_streaming": {"num_key_value_heads": 4},
    "chmv2": {"backbone_config": {"return_class_token": True}},
    "donut-swin": {**_SWIN, "patch_size": 2},
    "efficientloftr": {"num_attention_heads": 8},
    "instructblip": {"image_token_index": 150},
    "instructblipvideo": {"video_token_index": 150},
    "mllama_vision_model": {
        "intermediate_layers_indices": [0, 1],
        "vision_output_dim": 192,
        "num_hidden_layers": 2,
    },
    "sam_vision_model": {"num_pos_feats": 32, "global_attn_indexes": [1], "window_size": 2},
    "sam_hq_vision_model": {"num_pos_feats": 32, "global_attn_indexes": [1], "window_size": 2},
    "sam3_vision_model": {"backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]},
    # So wide that the object is in sight: masks of hidden ones are constant.
    "sam3_tracker_video": {"image_size": 64, "mask_decoder_config": {"mlp_dim": 128}},
    "sapiens2": {
        "image_size": 64,
        "num_hidden_layers": 2,
        "num_key_value_heads_per_layer": [4, 2],
        "num_first_full_attention_layers": 1,
        "num_last_full_attention_layers": 1,
        "num_key_value_attention_heads": 2,
        "head_config": {
            "upsample_out_channels": [32, 32],
            "upsample_kernel_sizes": [4, 4],
            "use_pixel_shuffle": False,
            "conv_out_channels": [32],
            "conv_kernel_sizes": [1],
        },
    },
    "qwen2_5_omni_audio_encoder": {"n_window": 16},
    "qwen3_omni_moe_audio_encoder": {"n_window_infer": 100},
    "pp_ocrv5_server_det": {
        **_INTRACLASS,
        "scale_factor_list": [1, 2, 4, 8],
        "kernel_list": [3, 2, 2],
    },
    "pp_lcnet_v4": {"stem_channels": (3, 48, 96)},
    "pp_ocrv6_small_det": {**_PP_V6},
    "pp_ocrv6_medium_det": {
        **_INTRACLASS,
        **_PP_V6,
        "scale_factor_list": [1, 2, 4, 8],
        "kernel_list": [3, 2, 2],
    },
    "sam2": {"prompt_encoder_config": {"image_size": 128, "patch_size": 16}},
    "sam2_video": _SAM2_VIDEO,
    "edgetam_video": {
        **_SAM2_VIDEO,
        "perceiver_resampler_num_latents": 8,
        "perceiver_resampler_num_latents_2d": 16,
        "perceiver_resampler_attention_head_dim": 64,
        "memory_attention_rope_k_sizes": [4, 4],
        "memory_attention_mlp_hidden_size": 96,  # the object is in sight then
    },
    "dots3_note_text": {
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "kv_lora_rank": 32,
        "q_lora_rank": 32,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "head_dim": 16,
        "v_head_dim": 16,
        "num_hidden_layers": 3,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "layer_types": ["indexed_attention", "sliding_attention", "sliding_attention"],
        "index_topk": 8,
        "shared_experts_intermediate_size": 32,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 32,
        "swa_kv_lora_rank": 32,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 16,
        "rope_parameters": None,
    },
    "pix2struct_text_model": {"initializer_range": 0.02},
    "t5gemma2_decoder": {"dropout_rate": 0.0},
    "gemma4_vision": {"pooling_kernel_size": 2, "position_embedding_size": 64},
    "gemma4_unified_assistant": {
        "backbone_hidden_size": 64,
        "text_config": {
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    },
    "granite4_vision": {
        "downsample_rate": "1/2",
        "deepstack_layer_map": [[0, 0]],
        "spatial_target_layers": [0],
    },
    "moshi_depth": {"hidden_size": 96},
    "phi4_multimodal_audio": {
        "nemo_conv_channels": 64,
        "ext_pw_out_channel": 64,
        "depthwise_separable_out_channel": 64,
    },
    "tvp": {
        "max_img_size": 64,
        "visual_prompt_size": 8,
        "num_frames": 2,
        "backbone_config": {"out_indices": [4]},
    },
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0, "kv_n_heads": 2},
        "ffn_config": {"ffn_hidden_size": 32, "moe_top_k": 2},
    },
}
OVERRIDES["align_vision_model"] = OVERRIDES["efficientnet"]
