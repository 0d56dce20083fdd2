"""Rows and fields that many families share. llm/hub/tables.py says what they mean.

A family's file holds its published sizes, the names of its tensors and the fields of its config.json.
"""

from typing import Any

from llm.hub.tables import PretrainedError, Row, as_tuple, check_kind, same

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
    "attention_bias": "attention_bias",
    "mlp_bias": "mlp_bias",
    "qkv_bias": "qkv_bias",
    "qk_norm": "use_qk_norm",
    "d_shared": "shared_expert_intermediate_size",
    "d_state": "state_size",
    "d_conv": "conv_kernel",
    "expand": "expand",
    "n_linear_k_heads": "linear_num_key_heads",
    "n_linear_heads": "linear_num_value_heads",
    "linear_head_dim": "linear_key_head_dim",
    "linear_v_head_dim": "linear_value_head_dim",
}
"""Our field -> the name that most families have for it in config.json."""


def fields(renamed: dict[str, str] | None = None, **defaults: Any) -> tuple[tuple[str, str, Any], ...]:
    """The fields of a family: ours, theirs, and the default of HF transformers. `renamed` has the names that differ
    from
    FIELDS. If a default is the name of another field, list that field before it."""
    names = FIELDS | (renamed or {})
    return tuple((ours, names[ours], default) for ours, default in defaults.items())


def read_layer_types(
    left: dict[str, Any], ours: dict[str, Any], period: int = 2, others: str = "sliding_attention"
) -> dict[str, Any]:
    """`layer_types` of config.json or, where it has none, full attention in the last of each `period` layers and
    `others` in the rest.

    Raises PretrainedError where there is not one for each layer.
    """
    types, n_layers = left.pop("layer_types", None), ours["n_layers"]
    if types is None:
        types = (others,) * (period - 1) + ("full_attention",)
    elif not isinstance(types, list) or len(types) != n_layers:
        raise PretrainedError(f"config.json sets layer_types = {types}: {n_layers} layers need a list of {n_layers}")
    return {"layer_types": tuple(types)}


def write_layer_types(config: Any) -> dict[str, Any]:
    """Our config -> `layer_types`, one for each layer."""
    return {"layer_types": [config.layer_type(layer) for layer in range(config.n_layers)]}


def in_layers(config: Any, kind: str, *rows: Row) -> tuple[Row, ...]:
    """The rows for the layers of one kind alone, with the number of each in place of `{layer}`: for hybrids, where
    layers of another kind have tensors of the same names."""
    numbers = [str(layer) for layer in range(config.n_layers) if config.layer_type(layer) == kind]
    return tuple(
        (*(tuple(name.replace("{layer}", number) for name in as_tuple(names)) for names in row[:2]), row[2])
        for number in numbers
        for row in rows
    )


def read_windows(left: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """Qwen's windows of `sliding_window` tokens: with `use_sliding_window`, layers from `max_window_layers` on have
    one, or those that `layer_types` names. Where none has, one kind of layer stands for all."""
    use, window = left.pop("use_sliding_window", False), left.pop("sliding_window", 4096)
    first, types = left.pop("max_window_layers", 28), left.pop("layer_types", None)
    check_kind("use_sliding_window", use, bool)
    check_kind("sliding_window", window, nullable=True)
    check_kind("max_window_layers", first, nullable=True)
    used, n_layers = use and window is not None, ours["n_layers"]
    if types is None:
        first = n_layers if first is None else first
        types = ["sliding_attention" if used and layer >= first else "full_attention" for layer in range(n_layers)]
    left["layer_types"] = types
    types = read_layer_types(left, ours)["layer_types"]
    if all(kind == "full_attention" for kind in types):
        return {"layer_types": ("full_attention",)}
    if not used:
        raise PretrainedError(
            f"config.json sets layer_types = {list(types)}, but use_sliding_window = {use} and "
            f"sliding_window = {window}: say how long the window is"
        )
    return {"layer_types": types, "window_size": window}


def write_windows(config: Any) -> dict[str, Any]:
    """The inverse of `read_windows`."""
    types = write_layer_types(config)
    used = "sliding_attention" in types["layer_types"]
    return {"use_sliding_window": used, **({"sliding_window": config.window_size, **types} if used else {})}
