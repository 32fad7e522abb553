"""Tiny configurations of transformers' architectures, made by one rule on the names of size fields, with a table of exceptions."""

import dataclasses
import functools
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .exceptions import EXCEPTIONS

VOCABULARY = 96
WIDTH, HEADS, KV_HEADS, LAYERS, INNER = 32, 4, 2, 2, 48
TOO_MANY = 4_000_000  # parameters; more means that a size field has a name which the rule does not know

_WIDTHS = (
    "hidden_size d_model n_embd dim embed_dim_out encoder_hidden_size decoder_hidden_size embedding_size projection_dim "
    "conv_dim_out encoder_hidden_dim decoder_hidden_dim decoder_embed_dim word_embed_proj_dim adapter_dim "
    "out_hidden_size proj_hidden_size output_dim codebook_dim emb_dim decoder_input_size block_out_dim model_dim "
    "text_embed_dim cross_attention_hidden_size language_dim vision_hidden_size text_hidden_size audio_hidden_size"
)
_HEADS = (
    "num_attention_heads num_heads n_head n_heads encoder_attention_heads decoder_attention_heads num_attn_heads "
    "attention_heads encoder_num_attention_heads decoder_num_attention_heads encoder_num_heads "
    "num_decoder_attention_heads num_encoder_attention_heads"
)
_KV_HEADS = (
    "num_key_value_heads num_kv_heads encoder_num_key_value_heads decoder_num_key_value_heads linear_num_key_heads "
    "swa_num_key_value_heads"
)
_LAYERS = (
    "num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers num_decoder_layers num_encoder_layers "
    "encoder_num_hidden_layers decoder_num_hidden_layers num_hidden_groups depth"
)
_INNER = (
    "intermediate_size ffn_dim d_ff encoder_ffn_dim decoder_ffn_dim inner_dim ffn_hidden_size dim_feedforward "
    "encoder_intermediate_size decoder_intermediate_size shared_intermediate_size moe_intermediate_size "
    "shared_expert_intermediate_size feed_forward_hidden_size n_inner"
)
_POSITIONS = (
    "max_position_embeddings n_positions max_source_positions max_target_positions n_ctx max_seq_len max_sequence_length "
    "context_length decoder_max_position_embeddings"
)
SIZES: dict[str, Any] = {
    **dict.fromkeys(_WIDTHS.split(), WIDTH),
    **dict.fromkeys(_HEADS.split(), HEADS),
    **dict.fromkeys(_KV_HEADS.split(), KV_HEADS),
    **dict.fromkeys(_LAYERS.split(), LAYERS),
    **dict.fromkeys(_INNER.split(), INNER),
    **dict.fromkeys(_POSITIONS.split(), 128),
    **dict.fromkeys("head_dim d_kv qk_rope_head_dim qk_nope_head_dim v_head_dim d_head global_head_dim".split(), WIDTH // HEADS),
    "linear_num_value_heads": KV_HEADS,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
    "embed_dim": 16,
    "rotary_dim": 4,
    "type_vocab_size": 2,
    "image_size": 32,
    "patch_size": 8,
    "num_frames": 4,
    "tubelet_size": 2,
    "num_mel_bins": 16,
    "max_length": 64,
    # experts: few, and more than are chosen
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_num_experts": 4,
    "moe_k": 2,
    # state spaces
    "state_size": 8,
    "mamba_d_state": 8,
    "mamba_d_head": 8,
    "mamba_n_heads": 8,
    "mamba_n_groups": 1,
    "time_step_rank": 4,
    # nothing random
    "layerdrop": 0.0,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
    "drop_path_rate": 0.0,
    "hidden_dropout_prob": 0.0,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "apply_spec_augment": False,
    "mask_time_prob": 0.0,
    "mask_feature_prob": 0.0,
    "router_jitter_noise": 0.0,
    "use_cache": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
SET_THOUGH_NONE = ("num_key_value_heads", "pad_token_id", "head_dim", "n_inner", "intermediate_size", "vocab_size")


@functools.cache
def config_class(model_type: str) -> type:
    return CONFIG_MAPPING[model_type]


def overrides(cls: type, model_type: str, exceptions: dict | None = None, **own: Any) -> dict[str, Any]:
    """Keyword arguments that make a configuration of class `cls` tiny: the rule, then the model's exceptions, then `own`."""
    exceptions = EXCEPTIONS.get(model_type, {}) if exceptions is None else exceptions
    fields = {f.name: f for f in dataclasses.fields(cls)}
    renamed = getattr(cls, "attribute_map", {})
    known = {renamed.get(name, name): value for name, value in SIZES.items() if name in fields or renamed.get(name) in fields}
    chosen = {}
    for name, value in known.items():
        default = fields[name].default
        if isinstance(default, list | tuple) or fields[name].default_factory is not dataclasses.MISSING:
            continue
        if default is None and name not in SET_THOUGH_NONE:
            continue
        if name == "pad_token_id" and default is None and "vocab_size" not in fields:
            continue
        chosen[name] = value
    for name, field in fields.items():
        default = _default(field)
        if isinstance(default, list | tuple) and default and all(isinstance(v, int) for v in default):
            if name == "depths":
                chosen[name] = [1] * len(default)
            elif name in ("num_attention_heads", "num_heads"):
                chosen[name] = [2] * len(default)
            elif name in ("hidden_sizes", "embed_dims", "channels", "neck_hidden_sizes"):
                chosen[name] = [16 * (i + 1) for i in range(len(default))]
    special = [n for n, f in fields.items() if n.endswith(("_token_id", "_token_index")) and isinstance(f.default, int)]
    for number, name in enumerate(n for n in special if n not in SIZES):
        chosen[name] = VOCABULARY - 1 - number
    for key, spec in getattr(cls, "sub_configs_defaults", {}).items():
        inside = exceptions.get(key, {})
        if inside is None or (spec.optional and key not in exceptions):
            chosen[key] = None
            continue
        of_type = inside.get("model_type", spec.model_type)
        sub = spec.config_class
        if sub is AutoConfig:
            sub = config_class(of_type)
        of_type = of_type or sub.model_type
        chosen[key] = {**overrides(sub, of_type), **inside}
        chosen[key].setdefault("model_type", of_type)
    chosen |= {k: v for k, v in exceptions.items() if k not in chosen or not isinstance(v, dict)}
    return {**{k: v for k, v in chosen.items() if v != "default"}, **own}


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def tiny_config(model_type: str, **own: Any) -> Any:
    cls = config_class(model_type)
    chosen = overrides(cls, model_type, **own)
    config = cls(**{"num_labels": 3, **chosen})
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 1
    return config


def model_class(mapping: str, model_type: str) -> type:
    """The class that a task's auto mapping names for a model type."""
    import transformers

    name = getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES")[model_type]
    return getattr(transformers, name if isinstance(name, str) else name[0])


def build(cls: type, config: Any, seed: int = 0) -> nn.Module:
    """The model in float64, in eval mode, without dropout; every parameter random (some start as zeros or ones)."""
    with torch.device("meta"):
        try:
            size = sum(p.numel() for p in cls._from_config(config, experts_implementation="eager").parameters())
        except (RuntimeError, NotImplementedError):
            size = 0  # it computes with values when it is made
    if size > TOO_MANY:
        raise ValueError(f"{size / 1e6:.0f}M parameters")
    torch.manual_seed(seed)
    model = cls._from_config(config, experts_implementation="eager")
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() < 2:
                p.add_(0.1 * torch.randn(p.shape, generator=g))
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
        if isinstance(getattr(m, "layerdrop", None), float):
            m.layerdrop = 0.0
    return model.double().eval()
