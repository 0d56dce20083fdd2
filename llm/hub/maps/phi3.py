"""Phi-3 and Phi-4 as published: queries, keys and values in one matrix, gate and up in another."""

from typing import Any

from llm.hub.maps.common import ENDS, FFN, MIXER, OURS, PRE_NORM, THEIRS, fields
from llm.hub.rope import read_partial_rope, write_rope
from llm.hub.tables import Published, split, split_as_ours
from llm.models.case_studies.phi3 import Phi3
from llm.modules.position_encoding.rope_settings import LENGTH


def read(left: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """Phi-3 names the original length beside the settings, and means its own without them."""
    left.setdefault(LENGTH, 4096)
    found = read_partial_rope(left, ours)
    return found | {"partial_rotary_factor": found["partial_rotary_factor"] or 1.0}


def write(config: Phi3.Config) -> dict[str, Any]:
    original = config.rope_scaling.get(LENGTH, config.max_seq_len)
    return {**write_rope(config), "partial_rotary_factor": config.partial_rotary_factor, LENGTH: original}


HEADS = tuple(f"{OURS}mixer.{name}_proj.weight" for name in "qkv")
PUBLISHED = {
    Phi3: Published(
        model_type="phi3",
        architecture="Phi3ForCausalLM",
        names=(
            *ENDS,
            *PRE_NORM,
            (HEADS, THEIRS + "self_attn.qkv_proj.weight", split_as_ours()),
            (
                (OURS + "ffn.gate_proj.weight", OURS + "ffn.up_proj.weight"),
                THEIRS + "mlp.gate_up_proj.weight",
                split(2),
            ),
            MIXER,
            FFN,
        ),
        fields=fields(
            **dict(vocab_size=32_064, max_seq_len=4096, d_model=3072, n_layers=32, n_heads=32, n_kv_heads="n_heads"),
            **dict(head_dim=None, d_ff=8192, norm_eps=1e-5, tie_embeddings=False, window_size=None),
        ),
        required={"hidden_act": ("silu",), "attention_bias": (False,), "lm_head_bias": (False,), "mlp_bias": (False,)},
        ignored=frozenset({"resid_pdrop", "embd_pdrop", "full_attn_mod", "interpolate_factor", "use_sliding_window"}),
        read=read,
        write=write,
    )
}

MINI = dict(d_model=3072, n_layers=32, d_ff=8192)
SIZES = {
    Phi3: {
        "phi3-mini-4k": dict(
            **dict(MINI, vocab_size=32_064, max_seq_len=4096, n_heads=32, n_kv_heads=32, window_size=2047),
            **dict(partial_rotary_factor=1.0, tie_embeddings=False),
        ),
        "phi4-mini": dict(MINI, vocab_size=200_064, max_seq_len=4096, n_heads=24, n_kv_heads=8),  # up to 4,096 tokens
        "phi4": dict(
            **dict(vocab_size=100_352, max_seq_len=16_384, d_model=5120, n_layers=40, n_heads=40, n_kv_heads=10),
            **dict(d_ff=17_920, rope_theta=250_000.0, partial_rotary_factor=1.0, tie_embeddings=False),
        ),
    }
}
