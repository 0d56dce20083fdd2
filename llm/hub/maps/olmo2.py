"""OLMo 2 and 3 as published."""

from typing import Any

from llm.hub.maps.common import ENDS, FFN, MIXER, OURS, THEIRS, fields, read_layer_types, write_layer_types
from llm.hub.rope import read_rope, read_two_ropes, write_rope
from llm.hub.tables import PretrainedError, Published, same
from llm.models.case_studies.olmo2 import OLMo2
from llm.models.case_studies.olmo3 import OLMo3

NAMES = (
    *ENDS,
    (OURS + "mixer_norm.weight", THEIRS + "post_attention_layernorm.weight", same),
    (OURS + "ffn_norm.weight", THEIRS + "post_feedforward_layernorm.weight", same),
    MIXER,
    FFN,
)


def olmo_fields(**defaults: Any) -> tuple[tuple[str, str, Any], ...]:
    return fields(
        **dict(vocab_size=50_304, max_seq_len=2048, d_model=4096, n_layers=32, n_heads=32, n_kv_heads="n_heads"),
        **dict(head_dim=None, d_ff=11_008, norm_eps=1e-5, tie_embeddings=False, attention_bias=False),
        **defaults,
    )


def read3(left: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """Raises PretrainedError where layers with a window have a base of their own or a scaling."""
    far, near = read_two_ropes(left, ours, 500_000.0, 500_000.0)
    if near["rope_scaling"] or near["rope_theta"] != far["rope_theta"]:
        raise PretrainedError(
            f"config.json sets RoPE in layers with a window to {near}: this model scales the others only"
        )
    return read_layer_types(left, ours, period=4) | far


def write3(config: OLMo3.Config) -> dict[str, Any]:
    theta = {"rope_theta": config.rope_theta}
    far = dict(config.rope_scaling) or {"rope_type": "default"}
    ropes = {"full_attention": far | theta, "sliding_attention": {"rope_type": "default"} | theta}
    return {"rope_parameters": ropes, **write_layer_types(config)}


PUBLISHED = {
    OLMo2: Published(
        model_type="olmo2",
        architecture="Olmo2ForCausalLM",
        names=NAMES,
        fields=olmo_fields(),
        required={"hidden_act": ("silu",)},
        read=read_rope,
        write=write_rope,
    ),
    OLMo3: Published(
        model_type="olmo3",
        architecture="Olmo3ForCausalLM",
        names=NAMES,
        fields=olmo_fields(window_size=4096),
        required={"hidden_act": ("silu",)},
        read=read3,
        write=write3,
    ),
}

COMMON = dict(vocab_size=100_352, max_seq_len=4096, rope_theta=500_000.0, norm_eps=1e-6, tie_embeddings=False)
SIZES = {
    OLMo2: {
        "olmo2-1b": dict(COMMON, d_model=2048, n_layers=16, n_heads=16, n_kv_heads=16, d_ff=8192),
        "olmo2-7b": dict(COMMON, d_model=4096, n_layers=32, n_heads=32, n_kv_heads=32, d_ff=11_008),
        "olmo2-13b": dict(COMMON, d_model=5120, n_layers=40, n_heads=40, n_kv_heads=40, d_ff=13_824),
        "olmo2-32b": dict(COMMON, d_model=5120, n_layers=64, n_heads=40, n_kv_heads=8, d_ff=27_648),
    },
    OLMo3: {
        "olmo3-7b": dict(
            **dict(vocab_size=100_278, max_seq_len=65_536, rope_theta=500_000.0, norm_eps=1e-6, window_size=4096),
            **dict(d_model=4096, n_layers=32, n_heads=32, n_kv_heads=32, d_ff=11_008, tie_embeddings=False),
            rope_scaling=dict(
                **dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=8192, beta_fast=32.0),
                **dict(beta_slow=1.0, attention_factor=1.2079441541679836),
            ),
        ),
    },
}
