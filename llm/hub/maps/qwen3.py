"""Qwen 2, 2.5 and 3 as published, dense and with experts; of Qwen3-VL the part that reads text."""

from collections.abc import Mapping
from typing import Any

from llm.hub.maps.common import (
    DECODER,
    ENDS,
    FFN,
    MIXER,
    OURS,
    PRE_NORM,
    THEIRS,
    fields,
    read_windows,
    write_windows,
)
from llm.hub.rope import read_rope, write_rope
from llm.hub.tables import Published, Row, as_tuple, check_count, check_kind, join, same
from llm.models.case_studies.qwen2_moe import Qwen2MoE
from llm.models.case_studies.qwen3 import Qwen2, Qwen3
from llm.models.case_studies.qwen3_moe import Qwen3MoE


def dense_fields(**defaults: Any) -> tuple[tuple[str, str, Any], ...]:
    return fields(
        **dict(vocab_size=151_936, max_seq_len=32_768, d_model=4096, n_layers=32, n_heads=32, n_kv_heads=32),
        **dict(d_ff=22_016, norm_eps=1e-6, tie_embeddings=False),
        **defaults,
    )


def read_dense(left: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    return read_windows(left, ours) | read_rope(left, ours)


def write_dense(config: Any) -> dict[str, Any]:
    return write_rope(config) | write_windows(config)


def write_with_width(config: Any) -> dict[str, Any]:
    return {**write_dense(config), "head_dim": config.head_width}


def text_of_vision(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a Qwen3-VL's config.json that describes its text model, with the head tied as the whole has it.

    Positions of text are equal on all three axes, so `mrope_section` changes nothing.
    """
    text = config.get("text_config")
    check_kind("text_config", text, dict)
    return {"tie_word_embeddings": config.get("tie_word_embeddings", False)} | dict(text)


def in_vision(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """The rows of a text model that is a part of one that sees images, too."""
    return tuple(
        (ours, tuple(name.replace("model.", "model.language_model.", 1) for name in as_tuple(theirs)), operation)
        for ours, theirs, operation in rows
    )


def read_vision(left: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    return read_rope(left, ours, default_theta=500_000.0)


def read_dense_layers(left: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """Layers whose number, counted from 1, is a multiple of `decoder_sparse_step` have experts, except those in
    `mlp_only_layers` (counted from 0). transformers 5 has another name for the number of experts."""
    step, dense = left.pop("decoder_sparse_step", 1), left.pop("mlp_only_layers", None) or []
    n_experts = left.pop("num_local_experts", ours["n_experts"])
    check_count("decoder_sparse_step", step)
    check_kind("mlp_only_layers", dense, list)
    check_count("num_local_experts", n_experts)
    sparse = [layer for layer in range(ours["n_layers"]) if layer not in dense and (layer + 1) % step == 0]
    dense_layers = tuple(layer for layer in range(ours["n_layers"]) if layer not in sparse)
    return {"n_experts": n_experts, "dense_layers": dense_layers}


def read_experts(left: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    return read_dense_layers(left, ours) | read_rope(left, ours)


def read_three(left: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """Qwen3-MoE has a window in all layers or in none."""
    use, window = left.pop("use_sliding_window", False), left.pop("sliding_window", 4096)
    check_kind("use_sliding_window", use, bool)
    check_kind("sliding_window", window, nullable=True)
    return read_experts(left, ours) | {"window_size": window if use else None}


def write_dense_layers(config: Any) -> dict[str, Any]:
    return {"decoder_sparse_step": 1, "mlp_only_layers": list(config.dense_layers)}


def write_experts(config: Qwen3MoE.Config) -> dict[str, Any]:
    return write_rope(config) | write_dense_layers(config)


def write_three(config: Qwen3MoE.Config) -> dict[str, Any]:
    window = {"use_sliding_window": config.window_size is not None, "sliding_window": config.window_size}
    return {**write_experts(config), **window, "head_dim": config.head_width}


EXPERT_ROWS = (
    (OURS + "ffn.router.weight", THEIRS + "mlp.gate.weight", same),
    (
        OURS + "ffn.experts.gate_up_proj[{expert}]",
        (THEIRS + "mlp.experts.{expert}.gate_proj.weight", THEIRS + "mlp.experts.{expert}.up_proj.weight"),
        join(2),
    ),
    (OURS + "ffn.experts.down_proj[{expert}]", THEIRS + "mlp.experts.{expert}.down_proj.weight", same),
)
SHARED_ROWS = (
    (OURS + "ffn.shared.gate.weight", THEIRS + "mlp.shared_expert_gate.weight", same),
    (OURS + "ffn.shared.expert.*", THEIRS + "mlp.shared_expert.*", same),
)
PUBLISHED = {
    Qwen2: Published(
        model_type="qwen2",
        architecture="Qwen2ForCausalLM",
        names=DECODER,
        fields=dense_fields(head_dim=None),
        required={"hidden_act": ("silu",)},
        read=read_dense,
        write=write_dense,
    ),
    Qwen3: Published(
        model_type="qwen3",
        architecture="Qwen3ForCausalLM",
        names=DECODER,
        fields=dense_fields(head_dim=128, attention_bias=False),
        required={"hidden_act": ("silu",)},
        read=read_dense,
        write=write_with_width,
    ),
    Qwen3MoE: Published(
        model_type="qwen3_moe",
        architecture="Qwen3MoeForCausalLM",
        names=(
            *ENDS,
            *PRE_NORM,
            MIXER,
            *EXPERT_ROWS,
            FFN,  # a dense layer, or experts as transformers 5 has them in memory
        ),
        fields=fields(
            **dict(vocab_size=151_936, max_seq_len=32_768, d_model=2048, n_layers=24, n_heads=32, n_kv_heads=4),
            **dict(head_dim=None, d_ff=6144, d_expert=768, n_experts=128, top_k=8, normalize_weights=False),
            **dict(norm_eps=1e-6, tie_embeddings=False, attention_bias=False),
        ),
        required={"hidden_act": ("silu",), "use_qk_norm": (True,)},
        ignored=frozenset({"max_window_layers"}),
        read=read_three,
        write=write_three,
    ),
    Qwen2MoE: Published(
        model_type="qwen2_moe",
        architecture="Qwen2MoeForCausalLM",
        names=(
            *ENDS,
            *PRE_NORM,
            MIXER,
            *EXPERT_ROWS,
            *SHARED_ROWS,
            FFN,
        ),
        fields=fields(
            **dict(vocab_size=151_936, max_seq_len=32_768, d_model=2048, n_layers=24, n_heads=16, n_kv_heads=16),
            **dict(head_dim=None, d_ff=5632, d_expert=1408, d_shared=5632, n_experts=60, top_k=4),
            **dict(normalize_weights=False, norm_eps=1e-6, tie_embeddings=False, qkv_bias=True),
        ),
        # with use_sliding_window, transformers gives a window to every second layer
        required={
            "hidden_act": ("silu",),
            "use_sliding_window": (False,),
            "layer_types": ("full_attention", None),
        },
        ignored=frozenset({"sliding_window", "max_window_layers"}),
        read=read_experts,
        write=write_experts,
    ),
}
READ_ONLY = (
    (
        Qwen3,
        Published(
            model_type="qwen3_vl",
            architecture="Qwen3VLForConditionalGeneration",
            names=in_vision(DECODER),
            fields=fields(
                **dict(vocab_size=151_936, max_seq_len=128_000, d_model=4096, n_layers=32, n_heads=32, n_kv_heads=32),
                **dict(head_dim=128, d_ff=22_016, norm_eps=1e-6, tie_embeddings=False, attention_bias=False),
            ),
            required={"hidden_act": ("silu",)},
            ignored_weights=lambda config: r"model\.visual\..*",
            unwrap=text_of_vision,
            read=read_vision,
        ),
    ),
)


def dense(d_model: int, n_layers: int, n_heads: int, n_kv_heads: int, d_ff: int, tie_embeddings: bool, **more) -> dict:
    widths = {"d_model": d_model, "n_layers": n_layers, "n_heads": n_heads, "n_kv_heads": n_kv_heads, "d_ff": d_ff}
    common = {"vocab_size": 151_936, "max_seq_len": 32_768, "rope_theta": 1_000_000.0, "norm_eps": 1e-6}
    return {**widths, **common, "tie_embeddings": tie_embeddings, **more}


LARGE = {"vocab_size": 152_064, "max_seq_len": 131_072}
THREE = {"head_dim": 128, "max_seq_len": 40_960}
BASE = dict(vocab_size=151_936, max_seq_len=40_960, rope_theta=1e6, norm_eps=1e-6, tie_embeddings=False)
SPARSE = dict(BASE, n_kv_heads=4, head_dim=128, n_experts=128, top_k=8)
SIZES = {
    Qwen2: {
        "qwen2-0.5b": dense(896, 24, 14, 2, 4864, True, max_seq_len=131_072),
        "qwen2-1.5b": dense(1536, 28, 12, 2, 8960, True, max_seq_len=131_072),
        "qwen2-7b": dense(3584, 28, 28, 4, 18_944, False, **LARGE),
        "qwen2-72b": dense(8192, 80, 64, 8, 29_568, False, **LARGE, norm_eps=1e-5),
        "qwen2.5-3b": dense(2048, 36, 16, 2, 11_008, True),  # the other sizes of Qwen2.5 are those of Qwen2
        "qwen2.5-14b": dense(5120, 48, 40, 8, 13_824, False, **LARGE, norm_eps=1e-5),
        "qwen2.5-32b": dense(5120, 64, 40, 8, 27_648, False, **LARGE, norm_eps=1e-5),
    },
    Qwen3: {
        "qwen3-0.6b": dense(1024, 28, 16, 8, 3072, True, **THREE),
        "qwen3-1.7b": dense(2048, 28, 16, 8, 6144, True, **THREE),
        "qwen3-4b": dense(2560, 36, 32, 8, 9728, True, **THREE),
        "qwen3-8b": dense(4096, 36, 32, 8, 12_288, False, **THREE),
        "qwen3-14b": dense(5120, 40, 40, 8, 17_408, False, **THREE),
        "qwen3-32b": dense(5120, 64, 64, 8, 25_600, False, **THREE),
    },
    Qwen3MoE: {
        "qwen3-30b-a3b": dict(SPARSE, d_model=2048, n_layers=48, n_heads=32, d_ff=6144, d_expert=768),
        "qwen3-235b-a22b": dict(SPARSE, d_model=4096, n_layers=94, n_heads=64, d_ff=12_288, d_expert=1536),
    },
    Qwen2MoE: {
        "qwen1.5-moe-a2.7b": dict(
            **dict(vocab_size=151_936, max_seq_len=8192, rope_theta=1e6, norm_eps=1e-6, tie_embeddings=False),
            **dict(d_model=2048, n_layers=24, n_heads=16, n_kv_heads=16, d_ff=5632, d_expert=1408, d_shared=5632),
            **dict(n_experts=60, top_k=4),
        ),
    },
}
