"""Qwen3-Next as published: the projections of a recurrent layer in two matrices, queries and their gates in one."""

from typing import Any

from llm.hub.maps.common import (
    ENDS,
    FFN,
    MIXER,
    OURS,
    PRE_NORM,
    THEIRS,
    fields,
    in_layers,
    read_layer_types,
    write_layer_types,
)
from llm.hub.maps.qwen3 import EXPERT_ROWS, SHARED_ROWS, read_dense_layers, write_dense_layers
from llm.hub.rope import read_partial_rope, write_rope
from llm.hub.tables import Published, Row, check_count, same, split_as_ours
from llm.models.case_studies.qwen3_next import GatedHybridConfig, Qwen3Next

MINE, ATTENTION, LINEAR = OURS + "mixer.", THEIRS + "self_attn.", THEIRS + "linear_attn."
LINEAR_ROWS: tuple[Row, ...] = (
    (MINE + "conv.weight", LINEAR + "conv1d.weight", same),
    (MINE + "decay.*", LINEAR + "*", same),  # A_log, dt_bias
    (MINE + "o_norm.weight", LINEAR + "norm.weight", same),
    (MINE + "o_proj.weight", LINEAR + "out_proj.weight", same),
)


def together(ours: str, theirs: str, n_groups: int) -> Row:
    """A row for projections that are one matrix there, in `n_groups` groups of heads."""
    return tuple(f"{MINE}{name}_proj.weight" for name in ours.split()), theirs, split_as_ours(n_groups)


def attention_rows(config: GatedHybridConfig) -> tuple[Row, ...]:
    """Each head of their q_proj has the rows of its queries, then those of its gate."""
    biases = ((MINE + "q_proj.bias", MINE + "gate_proj.bias"), ATTENTION + "q_proj.bias", split_as_ours(config.n_heads))
    queries = together("q gate", ATTENTION + "q_proj.weight", config.n_heads)
    return in_layers(config, "full_attention", queries, biases, MIXER)


def names(config: Qwen3Next.Config) -> tuple[Row, ...]:
    """Each key head has its rows of q, k, v and the gate, and of beta and the decay, together."""
    packed = (
        together("q k v gate", LINEAR + "in_proj_qkvz.weight", config.n_linear_k_heads),
        together("beta decay", LINEAR + "in_proj_ba.weight", config.n_linear_k_heads),
    )
    mixers = in_layers(config, "linear_attention", *packed, *LINEAR_ROWS) + attention_rows(config)
    return *ENDS, *PRE_NORM, *mixers, *EXPERT_ROWS, *SHARED_ROWS, FFN


def hybrid_fields(**defaults: Any) -> tuple[tuple[str, str, Any], ...]:
    both = dict(
        **dict(norm_eps=1e-6, tie_embeddings=False, attention_bias=False, head_dim=256, max_seq_len=32_768),
        **dict(n_linear_k_heads=16, n_linear_heads=32, linear_head_dim=128, linear_v_head_dim=128, d_conv=4),
    )
    return fields({"d_conv": "linear_conv_kernel_dim"}, **both, **defaults)


def read_hybrid(left: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """Without `layer_types`, the last of each `full_attention_interval` layers has attention."""
    period = left.pop("full_attention_interval", 4)
    check_count("full_attention_interval", period)
    found = read_partial_rope(left, ours)
    share = found["partial_rotary_factor"]
    kinds = read_layer_types(left, ours, period, others="linear_attention")
    return found | kinds | {"partial_rotary_factor": 0.25 if share is None else share}


def write_hybrid(config: GatedHybridConfig) -> dict[str, Any]:
    share = {"partial_rotary_factor": config.partial_rotary_factor, "head_dim": config.head_width}
    return write_rope(config) | write_layer_types(config) | share


PUBLISHED = {
    Qwen3Next: Published(
        model_type="qwen3_next",
        architecture="Qwen3NextForCausalLM",
        names=names,
        fields=hybrid_fields(
            **dict(vocab_size=151_936, d_model=2048, n_layers=48, n_heads=16, n_kv_heads=2, d_ff=5632),
            **dict(d_expert=512, d_shared=512, n_experts=512, top_k=10, normalize_weights=True),
        ),
        required={"hidden_act": ("silu",)},
        ignored_weights=lambda config: r"mtp\..*",
        read=lambda left, ours: read_dense_layers(left, ours) | read_hybrid(left, ours),
        write=lambda config: write_dense_layers(config) | write_hybrid(config),
    )
}

MIXERS = dict(
    **dict(max_seq_len=262_144, rope_theta=10_000_000.0, norm_eps=1e-6, head_dim=256),
    **dict(n_linear_k_heads=16, linear_head_dim=128, linear_v_head_dim=128),
)
SIZES = {
    Qwen3Next: {
        "qwen3-next-80b-a3b": dict(
            **dict(MIXERS, vocab_size=151_936, d_model=2048, n_layers=48, n_heads=16, n_kv_heads=2, d_ff=5120),
            **dict(n_linear_heads=32, d_expert=512, d_shared=512, n_experts=512, top_k=10, tie_embeddings=False),
        )
    }
}
