"""What the rule of `tiny` does not find out by itself, by model type."""

from typing import Any

MROPE = {"text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}}
DINO = {"backbone_config": {"out_indices": [0, 1, 1, 2]}}

EXCEPTIONS: dict[str, dict[str, Any]] = {
    "qwen2_vl": MROPE,
    "qwen2_5_vl": MROPE,
    "qwen3_vl": MROPE,
    "swin": {"window_size": 2, "image_size": 64, "patch_size": 4, "depths": [1, 2], "num_heads": [2, 2]},
    "swinv2": {"window_size": 2, "image_size": 64, "patch_size": 4, "depths": [1, 2], "num_heads": [2, 2]},
    "donut-swin": {"window_size": 2, "image_size": 64, "patch_size": 4, "depths": [1, 2], "num_heads": [2, 2]},
    "convnext": {"hidden_sizes": [16, 32, 48, 64], "embed_dims": "default"},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "falcon_h1": {"mamba_d_ssm": 64},
    "esmc": {"num_key_value_heads": 4},
    "luke": {"entity_vocab_size": 10, "entity_emb_size": 16},
    "roc_bert": {"pronunciation_vocab_size": 20, "shape_vocab_size": 20},
    "reformer": {
        "is_decoder": False,
        "axial_pos_embds": False,
        "attn_layers": ["local", "local"],
        "local_attn_chunk_length": 4,
    },
    "longformer": {"attention_window": [4, 4]},
    "led": {"attention_window": [4, 4]},
    "canine": {"downsampling_rate": 4, "local_transformer_stride": 4},
    "zamba": {"layer_types": ["linear_attention", "hybrid"], "num_hidden_layers": 2},
    "zaya": {"num_experts_per_tok": 1},
    "dots3_note_text": {"num_key_value_heads": 4},
}
SKIPPED: dict[str, str] = {}
