"""Qwen 2, 2.5 and 3 as published, dense and with experts."""

from typing import Any

from llm.hub.maps.common import DECODER, ENDS, FFN, MIXER, OURS, PRE_NORM, THEIRS, fields
from llm.hub.rope import read_rope, write_rope
from llm.hub.tables import Published, check_count, check_kind, join, same
from llm.models.case_studies.qwen3 import Qwen2, Qwen3
from llm.models.case_studies.qwen3_moe import Qwen3MoE


def dense_fields(**defaults: Any) -> tuple[tuple[str, str, Any], ...]:
    return fields(
        **dict(vocab_size=151_936, max_seq_len=32_768, d_model=4096, n_layers=32, n_heads=32, n_kv_heads=32),
        **dict(d_ff=22_016, norm_eps=1e-6, tie_embeddings=False),
        **defaults,
    )


def write_with_width(config: Any) -> dict[str, Any]:
    return {**write_rope(config), "head_dim": config.head_width}


def read_experts(left: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """Layers whose number, counted from 1, is a multiple of `decoder_sparse_step` have experts, except those in
    `mlp_only_layers` (counted from 0). transformers 5 has another name for the number of experts."""
    step, dense = left.pop("decoder_sparse_step", 1), left.pop("mlp_only_layers", None) or []
    n_experts = left.pop("num_local_experts", ours["n_experts"])
    check_count("decoder_sparse_step", step)
    check_kind("mlp_only_layers", dense, list)
    check_count("num_local_experts", n_experts)
    sparse = [layer for layer in range(ours["n_layers"]) if layer not in dense and (layer + 1) % step == 0]
    dense_layers = tuple(layer for layer in range(ours["n_layers"]) if layer not in sparse)
    return {"n_experts": n_experts, "dense_layers": dense_layers, **read_rope(left, ours)}


def write_experts(config: Qwen3MoE.Config) -> dict[str, Any]:
    return {**write_with_width(config), "decoder_sparse_step": 1, "mlp_only_layers": list(config.dense_layers)}


FULL_ATTENTION = {"hidden_act": ("silu",), "use_sliding_window": (False,), "layer_types": ("full_attention", None)}
UNUSED_WINDOW = frozenset({"sliding_window", "max_window_layers"})
EXPERTS, EXPERT = OURS + "ffn.experts.", THEIRS + "mlp.experts.{expert}."
PUBLISHED = {
    Qwen2: Published(
        model_type="qwen2",
        architecture="Qwen2ForCausalLM",
        names=DECODER,
        fields=dense_fields(head_dim=None),
        required=FULL_ATTENTION,
        ignored=UNUSED_WINDOW,
        read=read_rope,
        write=write_rope,
    ),
    Qwen3: Published(
        model_type="qwen3",
        architecture="Qwen3ForCausalLM",
        names=DECODER,
        fields=dense_fields(head_dim=128),
        required={**FULL_ATTENTION, "attention_bias": (False,)},
        ignored=UNUSED_WINDOW,
        read=read_rope,
        write=write_with_width,
    ),
    Qwen3MoE: Published(
        model_type="qwen3_moe",
        architecture="Qwen3MoeForCausalLM",
        names=(
            *ENDS,
            *PRE_NORM,
            MIXER,
            (OURS + "ffn.router.weight", THEIRS + "mlp.gate.weight", same),
            (EXPERTS + "gate_up_proj[{expert}]", (EXPERT + "gate_proj.weight", EXPERT + "up_proj.weight"), join(2)),
            (EXPERTS + "down_proj[{expert}]", EXPERT + "down_proj.weight", same),
            FFN,  # a dense layer, or experts as transformers 5 has them in memory
        ),
        fields=fields(
            **dict(vocab_size=151_936, max_seq_len=32_768, d_model=2048, n_layers=24, n_heads=32, n_kv_heads=4),
            **dict(head_dim=None, d_ff=6144, d_expert=768, n_experts=128, top_k=8, normalize_weights=False),
            **dict(norm_eps=1e-6, tie_embeddings=False),
        ),
        required={
            "hidden_act": ("silu",),
            "attention_bias": (False,),
            "use_qk_norm": (True,),
            "use_sliding_window": (False,),
        },
        ignored=UNUSED_WINDOW,
        read=read_experts,
        write=write_experts,
    ),
}


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
}
