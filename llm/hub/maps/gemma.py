"""Gemma 1, 2 and 3 as published."""

from typing import Any

from llm.hub.maps.common import DECODER, ENDS, FFN, MIXER, OURS, THEIRS, fields, read_layer_types, write_layer_types
from llm.hub.rope import read_rope, read_two_ropes, write_rope
from llm.hub.tables import PretrainedError, Published, check_count, same
from llm.models.case_studies.gemma import Gemma, Gemma2, Gemma3, WindowedGemma

NAMES = (
    *ENDS,
    (OURS + "mixer_norm.weight", THEIRS + "input_layernorm.weight", same),
    (OURS + "mixer_output_norm.weight", THEIRS + "post_attention_layernorm.weight", same),
    (OURS + "ffn_norm.weight", THEIRS + "pre_feedforward_layernorm.weight", same),
    (OURS + "ffn_output_norm.weight", THEIRS + "post_feedforward_layernorm.weight", same),
    MIXER,
    FFN,
)
REQUIRED = {"hidden_activation": ("gelu_pytorch_tanh",), "attention_bias": (False,)}
IGNORED = frozenset({"cache_implementation", "hidden_act", "sliding_window_size"})  # no part of transformers' model


def gemma_fields(**defaults: Any) -> tuple[tuple[str, str, Any], ...]:
    return fields(
        **dict(d_model=2304, n_layers=26, n_heads=8, n_kv_heads=4, head_dim=256, query_width=256, d_ff=9216),
        **dict(window_size=4096, norm_eps=1e-6, tie_embeddings=True),
        **defaults,
    )


def read2(left: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    return read_layer_types(left, ours) | read_rope(left, ours)


def read3(left: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """RoPE of both kinds of layers, too: `rope_theta`, `rope_scaling` and `rope_local_base_freq`, or `rope_parameters`
    with a dict for each kind. Raises PretrainedError for layers with a window whose RoPE is scaled."""
    period = left.pop("sliding_window_pattern", 6)
    check_count("sliding_window_pattern", period)
    far, near = read_two_ropes(left, ours, 1_000_000.0, 10_000.0)
    if near["rope_scaling"]:
        raise PretrainedError(f"config.json scales RoPE in layers with a window ({near['rope_scaling']}): unknown here")
    return read_layer_types(left, ours, period) | far | {"local_rope_theta": near["rope_theta"]}


def write2(config: WindowedGemma.Config) -> dict[str, Any]:
    widths = {"head_dim": config.head_width, "query_pre_attn_scalar": config.query_width or config.head_width}
    return {**write_rope(config), **write_layer_types(config), **widths}


def write3(config: Gemma3.Config) -> dict[str, Any]:
    return {**write2(config), "rope_local_base_freq": config.local_rope_theta}


PUBLISHED = {
    Gemma: Published(
        model_type="gemma",
        architecture="GemmaForCausalLM",
        names=DECODER,
        fields=fields(
            **dict(vocab_size=256_000, max_seq_len=8192, d_model=3072, n_layers=28, n_heads=16, n_kv_heads=16),
            **dict(head_dim=256, d_ff=24_576, norm_eps=1e-6, tie_embeddings=True),
        ),
        # the first files say gelu, which transformers takes for the tanh form, since that is what was trained
        required={
            "hidden_act": ("gelu_pytorch_tanh", "gelu"),
            "hidden_activation": (None, "gelu_pytorch_tanh"),
            "attention_bias": (False,),
        },
        read=read_rope,
        write=lambda config: {**write_rope(config), "head_dim": config.head_width},
    ),
    Gemma2: Published(
        model_type="gemma2",
        architecture="Gemma2ForCausalLM",
        names=NAMES,
        fields=gemma_fields(vocab_size=256_000, max_seq_len=8192, soft_cap=50.0, logit_soft_cap=30.0),
        required=REQUIRED,
        nullable=frozenset({"attn_logit_softcapping", "final_logit_softcapping"}),
        heads_divide_width=True,
        ignored=IGNORED,
        read=read2,
        write=write2,
    ),
    Gemma3: Published(
        model_type="gemma3_text",
        architecture="Gemma3ForCausalLM",
        names=NAMES,
        fields=gemma_fields(vocab_size=262_208, max_seq_len=131_072, logit_soft_cap=None),
        required=REQUIRED,
        heads_divide_width=True,
        ignored=IGNORED | {"attn_logit_softcapping"},  # transformers has the field and does not apply it
        read=read3,
        write=write3,
    ),
}


def widths(d_model: int, n_layers: int, n_heads: int, n_kv_heads: int, d_ff: int, head_dim: int) -> dict:
    return dict(
        d_model=d_model, n_layers=n_layers, n_heads=n_heads, n_kv_heads=n_kv_heads, d_ff=d_ff, head_dim=head_dim
    )


TWO = {"vocab_size": 256_000, "max_seq_len": 8192, "window_size": 4096, "query_width": 256}
THREE = {"vocab_size": 262_144, "max_seq_len": 32_768, "window_size": 512, "query_width": 256}
SIZES = {
    Gemma: {
        "gemma-2b": dict(vocab_size=256_000, max_seq_len=8192) | widths(2048, 18, 8, 1, 16_384, 256),
        "gemma-7b": dict(vocab_size=256_000, max_seq_len=8192) | widths(3072, 28, 16, 16, 24_576, 256),
    },
    Gemma2: {
        "gemma2-2b": TWO | widths(2304, 26, 8, 4, 9216, 256),
        "gemma2-9b": TWO | widths(3584, 42, 16, 8, 14_336, 256),
        "gemma2-27b": TWO | widths(4608, 46, 32, 16, 36_864, 128) | {"query_width": 144},
    },
    Gemma3: {
        "gemma3-270m": THREE | widths(640, 18, 4, 1, 2048, 256),
        "gemma3-1b": THREE | widths(1152, 26, 4, 1, 6912, 256),
    },
}
