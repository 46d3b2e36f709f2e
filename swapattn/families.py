"""Every causal-LM type of the installed transformers: a tiny config of it, and whether `convert` takes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .errors import UnsupportedModelError
from .surgery import attention_sites

LAYERS = 4  # of a tiny model: enough for hybrids, most of which attend in every second or fourth layer
VOCABULARY = 320
_WIDTH, _HEADS, _HEAD = 32, 4, 8

# What the fields of configs are called, and what a tiny model has instead. A field that a type lacks is left out.
_SIZES: tuple[tuple[int, str], ...] = (
    (LAYERS, "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_encoder_layers "),
    (LAYERS, "num_decoder_layers"),
    (VOCABULARY, "vocab_size vocab_size_per_layer_input unpadded_vocab_size decoder_vocab_size"),
    (_WIDTH, "hidden_size d_model n_embd emb_dim embedding_size word_embed_proj_dim lru_width attention_hidden_size"),
    (_WIDTH, "backbone_hidden_size input_embedding_size output_embedding_size"),
    (_HEADS, "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads"),
    (_HEADS, "num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads attention_heads"),
    (_HEADS, "linear_num_value_heads linear_num_heads mamba_n_heads n_mamba_heads mamba_num_heads index_n_heads"),
    (2, "num_key_value_heads num_kv_heads swa_num_key_value_heads num_query_groups linear_num_key_heads"),
    (_HEAD, "head_dim swa_head_dim v_head_dim kv_channels linear_key_head_dim linear_value_head_dim linear_head_dim"),
    (_HEAD, "attention_head_dim index_head_dim mamba_d_state state_size ssm_state_size dim_head attention_head_size"),
    (_HEAD, "d_head query_pre_attn_scalar hidden_size_per_layer_input"),
    (4, "qk_rope_head_dim qk_nope_head_dim rotary_dim"),
    (4, "num_experts n_routed_experts num_local_experts moe_num_experts"),
    (2, "num_experts_per_tok num_experts_per_token moe_topk moe_k"),
    (1, "n_group topk_group num_expert_group n_shared_experts num_shared_experts moe_num_shared_experts"),
    (64, "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner d_inner ffn_hidden_size dim_ff dff"),
    (64, "shared_intermediate_size intermediate_multiple_size intermediate_size_mlp dense_intermediate_size"),
    (16, "moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size"),
    (16, "expert_ffn_hidden_size moe_shared_expert_intermediate_size q_lora_rank kv_lora_rank"),
    (16, "mamba_d_head mamba_head_dim mamba_headdim time_step_rank mamba_dt_rank"),
    (1, "mamba_n_groups n_groups mamba_ngroups first_k_dense_replace num_dense_layers num_nextn_predict_layers"),
    (6, "sliding_window sliding_window_size attention_window_size"),
    (512, "max_position_embeddings n_positions model_max_length max_seq_len n_ctx"),
)
_SMALL: Mapping[str, int] = {name: size for size, names in _SIZES for name in names.split()} | {"qk_head_dim": 8}
_FILLED = {"num_key_value_heads", "head_dim", "num_experts_per_tok", "n_routed_experts", "n_shared_experts"}  # if None
# Types whose fields depend on each other in ways of their own, or whose default has no attention layer.
_EXCEPTIONS: Mapping[str, Mapping[str, Any]] = {
    "bailing_hybrid": {"layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma4_text": {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0, "global_head_dim": 8},
    "gemma4_unified_text": {"global_head_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 6},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [16, 32]},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}


@dataclass(frozen=True)
class Support:
    """Whether `convert` takes a model type: attention layers in its tiny model (0 if refused), and why not."""

    kind: str
    sites: int
    reason: str

    @property
    def supported(self) -> bool:
        """Whether there is something that can be swapped."""
        return self.sites > 0


def support(kind: str) -> Support:
    """Ask the code that plans conversions, on a tiny config of the type without weights."""
    try:
        return Support(kind, len(attention_sites(tiny_config(kind))), "")
    except UnsupportedModelError as error:
        return Support(kind, 0, error.reason)


def types() -> list[str]:
    """Every model type that this transformers builds a causal LM for."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(kind: str, **overrides: Any) -> Any:
    """A config of a model type that is small in every way: 4 layers, width 32, 4 heads of 8, 320 tokens.

    Types that are encoders or encoder-decoders at heart get the config of their causal LM, a decoder.

    Args:
        kind: the model type.
        overrides: fields that win over the tiny ones.

    Raises:
        UnsupportedModelError: the type refuses the tiny sizes.
    """
    try:
        return _shrunk(CONFIG_MAPPING[kind], kind, overrides)
    except Exception as error:  # whatever the validation of a type raises
        reason = f"has no small config ({' '.join(str(error).split())[:120]})"
        raise UnsupportedModelError(f"model type {kind!r} {reason}", reason) from error


def _shrunk(config_class: Any, kind: str, overrides: Mapping[str, Any]) -> Any:
    default = config_class()
    fields = default.to_dict()
    values: dict[str, Any] = {}
    for name, value in fields.items():
        if name in _SMALL and (isinstance(value, int) or (value is None and name in _FILLED)):
            values[name] = _SMALL[name]
        elif name.endswith("token_id") and isinstance(value, int) and value >= VOCABULARY:
            values[name] = 0
    if isinstance(fields.get("pad_token_id"), int):
        values["pad_token_id"] = 1
    if "kv_lora_rank" in fields:  # latent attention has no groups of heads, and calls its rotary part the head
        values |= {"num_key_value_heads": _HEADS, "head_dim": _SMALL["qk_rope_head_dim"]}
        values = {name: value for name, value in values.items() if name in fields}
    for name in ("layer_types", "mlp_layer_types"):
        kinds = list(dict.fromkeys(fields.get(name) or ()))
        if len(kinds) > 1:
            values[name] = (kinds * LAYERS)[:LAYERS]
    if fields.get("is_encoder_decoder"):
        values["is_encoder_decoder"] = False
    if "is_decoder" in fields:
        values["is_decoder"] = True
    for name in default.sub_configs:
        sub = getattr(default, name, None)
        if isinstance(sub, PreTrainedConfig):
            values[name] = _shrunk(type(sub), sub.model_type, {}).to_dict()
    return config_class(**{**values, **_EXCEPTIONS.get(kind, {}), **overrides})
