"""What the rule of `tiny` does not find out by itself, by model type."""

from typing import Any

MROPE = {"text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}}
WHOLE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "partial_rotary_factor": 1.0}
GLM = {"text_config": {"rope_parameters": WHOLE}}
SWIN = {"window_size": 2, "image_size": 64, "patch_size": 4, "depths": [1, 2], "num_heads": [2, 2]}

EXCEPTIONS: dict[str, dict[str, Any]] = {
    # windows that divide what the stages leave
    "swin": SWIN,
    "swinv2": SWIN,
    "donut-swin": SWIN,
    "convnext": {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1], "num_stages": 4},
    "convnextv2": {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1], "num_stages": 4},
    "bit": {"embedding_size": 32, "hidden_sizes": [32, 32, 64, 64], "num_groups": 4},
    "cvt": {"embed_dim": [16, 16, 32], "num_heads": [1, 2, 2], "depth": [1, 1, 1]},
    "yolos": {"image_size": [32, 32]},
    "imagegpt": {"image_size": 4},
    "vjepa2": {"num_attention_heads": 4, "pred_num_attention_heads": 4, "crop_size": 32, "image_size": "default"},
    # rotary sections of tiny heads
    "qwen2_vl": MROPE,
    "qwen2_5_vl": MROPE,
    "qwen3_vl": MROPE,
    "qwen3_5": MROPE,
    "glm4v": GLM,
    "glm46v": GLM,
    "glm4v_moe": GLM,
    "glm_ocr": GLM,
    "glmga": GLM,
    "gemma3": {"mm_tokens_per_image": 4},
    "shieldgemma2": {"mm_tokens_per_image": 4},
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "llava_next": {"image_grid_pinpoints": [[32, 32]]},
    "llava_next_video": {"image_grid_pinpoints": [[32, 32]]},
    "llava_onevision": {"image_grid_pinpoints": [[32, 32]]},
    "xmod": {"default_language": "en_XX"},
    "lilt": {"hidden_size": 48, "num_attention_heads": 2},
    # layers of several kinds
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "bamba": {"attn_layer_indices": [1]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "num_hidden_layers": 2},
    # sizes that must fit each other
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "falcon_h1": {"mamba_d_ssm": 64},
    "esmc": {"num_key_value_heads": 4},
    "zaya": {"num_experts_per_tok": 1},
    "deepseek_v2": {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
    "luke": {"entity_vocab_size": 10, "entity_emb_size": 16},
    "roc_bert": {"pronunciation_vocab_size": 20, "shape_vocab_size": 20},
    "rembert": {"input_embedding_size": 16, "output_embedding_size": 32},
    "reformer": {
        "is_decoder": False,
        "axial_pos_embds": False,
        "attn_layers": ["local", "local"],
        "local_attn_chunk_length": 4,
    },
    "longformer": {"attention_window": [4, 4]},
    "led": {"attention_window": [4, 4]},
    "canine": {"downsampling_rate": 4, "local_transformer_stride": 4},
    "siglip2": {"vision_config": {"num_patches": 16}},
    "fsmt": {"src_vocab_size": 96, "tgt_vocab_size": 96},
}
