"""Qwen3.5 as published, dense and with experts: Qwen3-Next with separate matrices for the gates, and stacked experts.

Published files hold a model that sees images, of which the text model is read. Written is the text model alone.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from llm.hub.maps.common import ENDS, FFN, OURS, PRE_NORM, THEIRS, in_layers
from llm.hub.maps.qwen3 import EXPERT_ROWS, SHARED_ROWS, in_vision, text_of_vision
from llm.hub.maps.qwen3_next import (
    LINEAR,
    LINEAR_ROWS,
    MINE,
    MIXERS,
    attention_rows,
    hybrid_fields,
    read_hybrid,
    together,
    write_hybrid,
)
from llm.hub.tables import PretrainedError, Published, Row, same
from llm.models.case_studies.qwen3_5 import Qwen35, Qwen35MoE
from llm.models.case_studies.qwen3_next import GatedHybridConfig


def mixer_rows(config: GatedHybridConfig) -> tuple[Row, ...]:
    separate = (
        together("q k v", LINEAR + "in_proj_qkv.weight", 1),
        (MINE + "gate_proj.weight", LINEAR + "in_proj_z.weight", same),
        (MINE + "beta_proj.weight", LINEAR + "in_proj_b.weight", same),
        (MINE + "decay_proj.weight", LINEAR + "in_proj_a.weight", same),
    )
    return in_layers(config, "linear_attention", *separate, *LINEAR_ROWS) + attention_rows(config)


def names(config: Qwen35.Config) -> tuple[Row, ...]:
    return *ENDS, *PRE_NORM, *mixer_rows(config), FFN


def moe_names(config: Qwen35MoE.Config) -> tuple[Row, ...]:
    stacked = (OURS + "ffn.experts.*", THEIRS + "mlp.experts.*", same)
    return *ENDS, *PRE_NORM, *mixer_rows(config), stacked, *EXPERT_ROWS, *SHARED_ROWS


def write_moe(config: Qwen35MoE.Config) -> dict[str, Any]:
    """Raises PretrainedError for settings that transformers' Qwen3.5 does not have."""
    if config.dense_layers or not config.normalize_weights:
        raise PretrainedError(
            f"dense_layers = {config.dense_layers} and normalize_weights = {config.normalize_weights}: transformers' "
            "Qwen3.5 has experts in each layer, whose weights sum to 1; with other settings export a qwen3_next"
        )
    return write_hybrid(config)


REQUIRED = {"hidden_act": ("silu",), "attn_output_gate": (True,)}
IGNORED = frozenset({"mamba_ssm_dtype", "mtp_num_hidden_layers", "mtp_use_dedicated_embeddings"})
PUBLISHED = {
    Qwen35: Published(
        model_type="qwen3_5_text",
        architecture="Qwen3_5ForCausalLM",
        names=names,
        fields=hybrid_fields(vocab_size=248_320, d_model=4096, n_layers=32, n_heads=16, n_kv_heads=4, d_ff=12_288),
        required=REQUIRED,
        ignored=IGNORED,
        ignored_weights=lambda config: r"mtp\..*",
        read=read_hybrid,
        write=write_hybrid,
    ),
    Qwen35MoE: Published(
        model_type="qwen3_5_moe_text",
        architecture="Qwen3_5MoeForCausalLM",
        names=moe_names,
        fields=hybrid_fields(
            **dict(vocab_size=248_320, d_model=2048, n_layers=40, n_heads=16, n_kv_heads=2),
            **dict(d_expert=512, d_shared=512, n_experts=256, top_k=8),
        ),
        required=REQUIRED | {"norm_topk_prob": (True,)},
        ignored=IGNORED | {"intermediate_size"},  # of dense layers, of which there are none
        ignored_weights=lambda config: r"mtp\..*",
        read=read_hybrid,
        write=write_moe,
    ),
}


def with_images(published: Published, rows: Callable[[Any], tuple[Row, ...]], kind: str, name: str) -> Published:
    """How the whole model is stored, of which the text model is a part."""
    return replace(
        published,
        model_type=kind,
        architecture=name,
        names=lambda config: in_vision(rows(config)),
        ignored_weights=lambda config: r"model\.visual\..*|mtp\..*",
        unwrap=text_of_vision,
    )


READ_ONLY = (
    (Qwen35, with_images(PUBLISHED[Qwen35], names, "qwen3_5", "Qwen3_5ForConditionalGeneration")),
    (Qwen35MoE, with_images(PUBLISHED[Qwen35MoE], moe_names, "qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration")),
)

COMMON = dict(MIXERS, vocab_size=248_320, tie_embeddings=False)
SPARSE = dict(COMMON, n_kv_heads=2, n_experts=256, top_k=8)
SIZES = {
    Qwen35: {
        "qwen3.5-9b": dict(COMMON, d_model=4096, n_layers=32, n_heads=16, n_kv_heads=4, d_ff=12_288, n_linear_heads=32),
        "qwen3.5-27b": dict(
            COMMON, d_model=5120, n_layers=64, n_heads=24, n_kv_heads=4, d_ff=17_408, n_linear_heads=48
        ),
    },
    Qwen35MoE: {
        "qwen3.5-35b-a3b": dict(
            SPARSE, d_model=2048, n_layers=40, n_heads=16, n_linear_heads=32, d_expert=512, d_shared=512
        ),
        "qwen3.5-122b-a10b": dict(
            SPARSE, d_model=3072, n_layers=48, n_heads=32, n_linear_heads=64, d_expert=1024, d_shared=1024
        ),
        "qwen3.5-397b-a17b": dict(
            **dict(COMMON, d_model=4096, n_layers=60, n_heads=32, n_kv_heads=2, n_linear_heads=64),
            **dict(n_experts=512, top_k=10, d_expert=1024, d_shared=1024),
        ),
    },
}
