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

WIDTHS = """hidden_size d_model n_embd dim embed_dim_out encoder_hidden_size decoder_hidden_size embedding_size projection_dim
    conv_dim_out encoder_hidden_dim decoder_hidden_dim decoder_embed_dim word_embed_proj_dim adapter_dim out_hidden_size
    proj_hidden_size output_dim codebook_dim emb_dim decoder_input_size block_out_dim model_dim text_embed_dim
    cross_attention_hidden_size language_dim vision_hidden_size text_hidden_size audio_hidden_size projector_hidden_size
    hidden_dim output_channels project_dim image_text_hidden_size patch_embed_hidden_size cross_hidden_size hidden_size_global
    backbone_hidden_size prediction_head_size pred_hidden_size speaker_embedding_dim output_proj_dims mm_embed_dim
    projection_hidden_size adapter_in_dim adapter_out_dim adapter_input_size projection_hidden_dim encoder_dim"""
HEAD_COUNTS = """num_attention_heads num_heads n_head n_heads encoder_attention_heads decoder_attention_heads num_attn_heads
    attention_heads encoder_num_attention_heads decoder_num_attention_heads encoder_num_heads num_decoder_attention_heads
    num_encoder_attention_heads"""
KV_HEAD_COUNTS = """num_key_value_heads num_kv_heads encoder_num_key_value_heads decoder_num_key_value_heads
    linear_num_key_heads swa_num_key_value_heads linear_num_value_heads"""
LAYER_COUNTS = """num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers num_decoder_layers
    num_encoder_layers encoder_num_hidden_layers decoder_num_hidden_layers num_hidden_groups depth"""
INNERS = """intermediate_size ffn_dim d_ff encoder_ffn_dim decoder_ffn_dim inner_dim ffn_hidden_size dim_feedforward
    encoder_intermediate_size decoder_intermediate_size shared_intermediate_size moe_intermediate_size d_inner dff dim_ff
    shared_expert_intermediate_size feed_forward_hidden_size n_inner mlp_dim dense_intermediate_size expert_ffn_hidden_size
    intermediate_size_mlp shared_experts_intermediate_size moe_shared_expert_intermediate_size share_expert_dim
    projection_intermediate_size alignment_intermediate_size speech_encoder_intermediate_size"""
POSITIONS = """max_position_embeddings n_positions max_source_positions max_target_positions n_ctx max_seq_len
    max_sequence_length context_length decoder_max_position_embeddings max_encoder_position_embeddings
    max_decoder_position_embeddings"""
HEAD_WIDTHS = """head_dim d_kv qk_rope_head_dim qk_nope_head_dim v_head_dim d_head global_head_dim linear_key_head_dim
    linear_value_head_dim swa_head_dim index_head_dim dim_head resampler_head_dim cross_head_dim kv_channels linear_head_dim"""
CHANNELS = """embed_dim classifier_proj_size num_conv_pos_embeddings subsampling_conv_channels fusion_hidden_size
    auxiliary_channels neck_out_channels aspp_out_channels reassemble_hidden_size conv_channels downsample_hidden_size
    q_lora_rank kv_lora_rank num_mel_bins feature_projection_input_dim input_feat_per_channel o_lora_rank rel_extent
    head_hidden_size bottleneck_features codevector_dim proj_codevector_dim xvector_output_dim"""
SMALL = """state_size mamba_d_state mamba_d_head mamba_n_heads mamba_num_heads mamba_head_dim ssm_state_size patch_size
    hidden_size_per_layer_input num_queries hc_lowrank"""
VOCABULARIES = "vocab_size vocab_size_per_layer_input src_vocab_size tgt_vocab_size unpadded_vocab_size"
FEW = "num_experts num_local_experts n_routed_experts moe_num_experts time_step_rank rotary_dim num_frames block_size"
TWO = "num_experts_per_tok moe_k tubelet_size type_vocab_size zero_expert_num moe_topk top_k_experts"
ONE = "n_shared_experts n_group topk_group first_k_dense_replace mamba_n_groups n_groups"
NONE_AT_ALL = """layerdrop speech_encoder_layerdrop encoder_layerdrop decoder_layerdrop drop_path_rate hidden_dropout_prob hidden_dropout
    attention_dropout attention_probs_dropout_prob mask_time_prob mask_feature_prob router_jitter_noise"""
SIZES: dict[str, Any] = {
    **dict.fromkeys(WIDTHS.split(), WIDTH),
    **dict.fromkeys(HEAD_COUNTS.split(), HEADS),
    **dict.fromkeys(KV_HEAD_COUNTS.split(), KV_HEADS),
    **dict.fromkeys(LAYER_COUNTS.split(), LAYERS),
    **dict.fromkeys(INNERS.split(), INNER),
    **dict.fromkeys(POSITIONS.split(), 128),
    **dict.fromkeys(HEAD_WIDTHS.split(), WIDTH // HEADS),
    **dict.fromkeys(CHANNELS.split(), 16),
    **dict.fromkeys(SMALL.split(), 8),
    **dict.fromkeys(VOCABULARIES.split(), VOCABULARY),
    **dict.fromkeys(FEW.split(), 4),
    **dict.fromkeys(TWO.split(), 2),
    **dict.fromkeys(ONE.split(), 1),
    **dict.fromkeys(NONE_AT_ALL.split(), 0.0),
    "image_size": 32,
    "max_length": 64,
    "index_topk": 64,
    "num_position_embeddings": 64,
    "num_detection_tokens": 5,
    "apply_spec_augment": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
LAYER_KINDS = ("layer_types", "layers_block_type", "mlp_layer_types")
SET_THOUGH_NONE = ("num_key_value_heads", "pad_token_id", "head_dim", "n_inner", "intermediate_size", "vocab_size")


@functools.cache
def config_class(model_type: str) -> type:
    return CONFIG_MAPPING[model_type]


def overrides(cls: type, model_type: str, exceptions: dict | None = None, **own: Any) -> dict[str, Any]:
    """Keyword arguments that make a configuration of class `cls` tiny: the rule, then the model's exceptions, then `own`."""
    exceptions = EXCEPTIONS.get(model_type, {}) if exceptions is None else exceptions
    fields = {f.name: f for f in dataclasses.fields(cls)}
    renamed = getattr(cls, "attribute_map", {})
    known = {}
    for name, value in SIZES.items():
        target = name if name in fields else renamed.get(name)
        if target in fields:
            known[target] = value
    if "kv_lora_rank" in fields and "num_key_value_heads" in fields:
        known["num_key_value_heads"] = HEADS  # latent attention has one key a head
    chosen = {}
    for name, value in known.items():
        default = fields[name].default
        if isinstance(default, list | tuple) or fields[name].default_factory is not dataclasses.MISSING:
            continue
        if default is None and name not in SET_THOUGH_NONE:
            continue
        if name == "pad_token_id" and default is None and "vocab_size" not in fields:
            continue
        chosen[name] = int(value) if isinstance(default, int) and isinstance(value, float) else value
    for name, field in fields.items():
        default = _default(field)
        if name in ("conv_dim", "tdnn_dim"):
            chosen[name] = [16] * len(default)
        elif isinstance(default, list | tuple) and default and all(isinstance(v, int) for v in default):
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
    chosen |= _layer_kinds(cls, fields)
    chosen |= {k: v for k, v in exceptions.items() if k not in chosen or not isinstance(v, dict)}
    return {**{k: v for k, v in chosen.items() if v != "default"}, **own}


def _layer_kinds(cls: type, fields: dict[str, Any]) -> dict[str, Any]:
    """One layer of every kind that the default configuration has, where layers are of several kinds."""
    wanted = [name for name in LAYER_KINDS if name in fields]
    if not wanted:
        return {}
    try:
        whole = cls()
    except Exception:  # it cannot be made without arguments: left to the exceptions
        return {}
    kinds = {name: list(dict.fromkeys(getattr(whole, name, None) or [])) for name in wanted}
    kinds = {name: found for name, found in kinds.items() if found}
    length = max([LAYERS, *map(len, kinds.values())])
    if length > 4 or not kinds:
        return {}
    chosen: dict[str, Any] = {name: (found * length)[:length] for name, found in kinds.items()}
    count = next((n for n in LAYER_COUNTS.split() if n in fields), None)
    return chosen | ({count: length} if count else {})


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
        if isinstance(m, nn.Embedding) and m.padding_idx is not None:
            with torch.no_grad():  # zeros there would hide what padding does
                m.weight[m.padding_idx] = 0.1 * torch.randn(m.embedding_dim, generator=g)
        if isinstance(m, nn.Dropout):
            m.p = 0.0
        if isinstance(getattr(m, "layerdrop", None), float):
            m.layerdrop = 0.0
    return model.double().eval()
