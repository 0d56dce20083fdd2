"""MiniMax-01 as published for transformers: queries, keys and values of Lightning attention in one matrix."""

from typing import Any

from llm.hub.maps.common import (
    ENDS,
    MIXER,
    OURS,
    PRE_NORM,
    THEIRS,
    fields,
    in_layers,
    read_layer_types,
    write_layer_types,
)
from llm.hub.maps.mixtral import EXPERT_ROWS
from llm.hub.rope import read_partial_rope, write_rope
from llm.hub.tables import PretrainedError, Published, Row, check_count, same, split_as_ours
from llm.models.case_studies.minimax import MiniMax

MINE, ATTENTION = OURS + "mixer.", THEIRS + "self_attn."


def names(config: MiniMax.Config) -> tuple[Row, ...]:
    """Each head of their qkv_proj has the rows of its queries, its keys and its values."""
    lightning = (
        (tuple(f"{MINE}{n}_proj.weight" for n in "qkv"), ATTENTION + "qkv_proj.weight", split_as_ours(config.n_heads)),
        (MINE + "gate_proj.weight", ATTENTION + "output_gate.weight", same),
        (MINE + "o_norm.weight", ATTENTION + "norm.weight", same),
        (MINE + "o_proj.weight", ATTENTION + "out_proj.weight", same),
    )
    return *ENDS, *PRE_NORM, *in_layers(config, "linear_attention", *lightning), MIXER, *EXPERT_ROWS


def read(left: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """`rotary_dim` is the number of channels of each head that turn. transformers 5.23 passes over it and turns whole
    heads, which is not how the published weights were trained."""
    left["layer_types"] = left.get("layer_types") or [
        "linear_attention" if layer % 2 else "full_attention" for layer in range(ours["n_layers"])
    ]
    found = read_partial_rope(left, ours, default_theta=1_000_000.0)
    share, turned = found["partial_rotary_factor"], left.pop("rotary_dim", None)
    if turned is not None:
        check_count("rotary_dim", turned)
        share = turned / (ours["head_dim"] or ours["d_model"] // ours["n_heads"])
    return found | read_layer_types(left, ours) | {"partial_rotary_factor": 1.0 if share is None else share}


def write(config: MiniMax.Config) -> dict[str, Any]:
    """Raises PretrainedError where a part of each head turns, since transformers turns whole heads."""
    if config.partial_rotary_factor != 1:
        raise PretrainedError(
            f"partial_rotary_factor = {config.partial_rotary_factor}: transformers 5.23 turns whole heads, so it would "
            "compute something else; a model to export is trained with --model.partial-rotary-factor 1"
        )
    return write_rope(config) | write_layer_types(config)


PUBLISHED = {
    MiniMax: Published(
        model_type="minimax",
        architecture="MiniMaxForCausalLM",
        names=names,
        fields=fields(
            {
                "n_experts": "num_local_experts",
                **dict(full_attention_alpha="full_attn_alpha_factor", full_attention_beta="full_attn_beta_factor"),
                **dict(linear_attention_alpha="linear_attn_alpha_factor", ffn_alpha="mlp_alpha_factor"),
                **dict(linear_attention_beta="linear_attn_beta_factor", ffn_beta="mlp_beta_factor"),
            },
            **dict(vocab_size=32_000, max_seq_len=131_072, d_model=4096, n_layers=32, n_heads=32, n_kv_heads=8),
            **dict(head_dim=None, d_ff=14_336, n_experts=8, top_k=2, window_size=None, norm_eps=1e-5),
            **dict(tie_embeddings=False, linear_attention_alpha=1.0, linear_attention_beta=1.0),
            **dict(full_attention_alpha=1.0, full_attention_beta=1.0, ffn_alpha=1.0, ffn_beta=1.0),
        ),
        required={"hidden_act": ("silu",), "postnorm": (True,)},
        # noise in training only; the length of a chunk; the kind of a shared expert of width 0
        ignored=frozenset({"router_jitter_noise", "block_size", "shared_moe_mode"}),
        ignored_weights=lambda config: r".*\.self_attn\.(slope_rate|(query|key|diagonal)_decay)",
        read=read,
        write=write,
    )
}
ALPHA = 160**0.25
SIZES = {
    MiniMax: {
        "minimax-text-01": dict(
            **dict(vocab_size=200_064, max_seq_len=10_240_000, d_model=6144, n_layers=80, n_heads=64, n_kv_heads=8),
            **dict(head_dim=128, d_ff=9216, n_experts=32, tie_embeddings=False, rope_theta=10_000_000.0),
            **dict(linear_attention_alpha=ALPHA, full_attention_alpha=ALPHA, ffn_alpha=ALPHA),
            partial_rotary_factor=0.5,
            layer_types=("linear_attention",) * 7 + ("full_attention",),
        )
    }
}
