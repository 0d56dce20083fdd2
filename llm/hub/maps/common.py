"""Rows and fields that many families share. llm/hub/tables.py says what they mean.

A family's file holds its published sizes, the names of its tensors and the fields of its config.json.
"""

from typing import Any

from llm.hub.tables import PretrainedError, Row, same

OURS, THEIRS = "blocks.{layer}.", "model.layers.{layer}."
ENDS: tuple[Row, ...] = (
    ("tok_embed.weight", "model.embed_tokens.weight", same),
    ("norm.weight", "model.norm.weight", same),
    ("lm_head.weight", "lm_head.weight", same),
)
PRE_NORM: tuple[Row, ...] = (
    (OURS + "mixer_norm.weight", THEIRS + "input_layernorm.weight", same),
    (OURS + "ffn_norm.weight", THEIRS + "post_attention_layernorm.weight", same),
)
MIXER: Row = (OURS + "mixer.*", THEIRS + "self_attn.*", same)  # projections, with any biases and norms
FFN: Row = (OURS + "ffn.*", THEIRS + "mlp.*", same)  # gate_proj, up_proj, down_proj
DECODER = (*ENDS, *PRE_NORM, MIXER, FFN)

FIELDS = {
    "vocab_size": "vocab_size",
    "max_seq_len": "max_position_embeddings",
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "d_ff": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
    "window_size": "sliding_window",
    "query_width": "query_pre_attn_scalar",
    "soft_cap": "attn_logit_softcapping",
    "logit_soft_cap": "final_logit_softcapping",
    "n_experts": "num_experts",
    "top_k": "num_experts_per_tok",
    "d_expert": "moe_intermediate_size",
    "normalize_weights": "norm_topk_prob",
    "n_shared_experts": "n_shared_experts",
    "n_dense_layers": "first_k_dense_replace",
    "n_groups": "n_group",
    "top_k_groups": "topk_group",
    "routed_scaling_factor": "routed_scaling_factor",
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
    "index_n_heads": "index_n_heads",
    "index_head_dim": "index_head_dim",
    "index_top_k": "index_topk",
}
"""Our field -> the name that most families have for it in config.json."""


def fields(renamed: dict[str, str] | None = None, **defaults: Any) -> tuple[tuple[str, str, Any], ...]:
    """The fields of a family: ours, theirs, and the default of HF transformers. `renamed` has the names that differ
    from
    FIELDS. If a default is the name of another field, list that field before it."""
    names = FIELDS | (renamed or {})
    return tuple((ours, names[ours], default) for ours, default in defaults.items())


def read_layer_types(left: dict[str, Any], ours: dict[str, Any], period: int = 2) -> dict[str, Any]:
    """`layer_types` of config.json or, where it has none, full attention in the last of each `period` layers.

    Raises PretrainedError where there is not one for each layer.
    """
    types, n_layers = left.pop("layer_types", None), ours["n_layers"]
    if types is None:
        types = ("sliding_attention",) * (period - 1) + ("full_attention",)
    elif not isinstance(types, list) or len(types) != n_layers:
        raise PretrainedError(f"config.json sets layer_types = {types}: {n_layers} layers need a list of {n_layers}")
    return {"layer_types": tuple(types)}


def write_layer_types(config: Any) -> dict[str, Any]:
    """Our config -> `layer_types`, one for each layer."""
    return {"layer_types": [config.layer_type(layer) for layer in range(config.n_layers)]}
