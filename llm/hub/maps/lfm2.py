"""LFM2 as published."""

from typing import Any

from llm.hub.maps.common import ENDS, MIXER, OURS, THEIRS, fields, read_layer_types, write_layer_types
from llm.hub.rope import read_rope, write_rope
from llm.hub.tables import Published, check_count, check_kind, same
from llm.models.case_studies.lfm2 import LFM2

CONV, ATTENTION, FEED_FORWARD = (THEIRS + part for part in ("conv.", "self_attn.", "feed_forward."))
NAMES = (
    ("norm.weight", "model.embedding_norm.weight", same),
    *ENDS,
    (OURS + "mixer_norm.weight", THEIRS + "operator_norm.weight", same),
    (OURS + "ffn_norm.weight", THEIRS + "ffn_norm.weight", same),
    ((OURS + "mixer.in_proj.*", OURS + "mixer.o_proj.*"), (CONV + "in_proj.*", CONV + "out_proj.*"), same),
    (OURS + "mixer.conv.*", CONV + "conv.*", same),
    (OURS + "mixer.o_proj.weight", ATTENTION + "out_proj.weight", same),
    (OURS + "mixer.q_norm.weight", ATTENTION + "q_layernorm.weight", same),
    (OURS + "mixer.k_norm.weight", ATTENTION + "k_layernorm.weight", same),
    MIXER,
    (OURS + "ffn.gate_proj.weight", FEED_FORWARD + "w1.weight", same),
    (OURS + "ffn.up_proj.weight", FEED_FORWARD + "w3.weight", same),
    (OURS + "ffn.down_proj.weight", FEED_FORWARD + "w2.weight", same),
)


def read(left: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    tied = left.pop("tie_embedding", ours["tie_embeddings"])  # the first files spell it so
    check_kind("tie_embedding", tied, bool)
    number_types(left, ours)
    found = read_rope(left, ours, default_theta=1_000_000.0) | read_layer_types(left, ours)
    return found | {"tie_embeddings": tied, "d_ff": read_width(left, ours)}


def read_width(left: dict[str, Any], ours: dict[str, Any]) -> int:
    """The width of the feed-forward layers: 2/3 of `intermediate_size` or `block_ff_dim`, times a factor and rounded up
    to a multiple, or as it stands where `block_auto_adjust_ff_dim` is false."""
    width, adjust = left.pop("block_ff_dim", ours["d_ff"]), left.pop("block_auto_adjust_ff_dim", True)
    factor, multiple = left.pop("block_ffn_dim_multiplier", 1.0), left.pop("block_multiple_of", 256)
    check_count("block_ff_dim", width)
    check_kind("block_auto_adjust_ff_dim", adjust, bool)
    check_kind("block_ffn_dim_multiplier", factor, float, nullable=True)
    check_count("block_multiple_of", multiple)
    if not adjust:
        return width
    width = int(2 * width / 3)
    return width if factor is None else -(-int(factor * width) // multiple) * multiple


def number_types(left: dict[str, Any], ours: dict[str, Any]) -> None:
    """Where `layer_types` is missing, `full_attn_idxs` numbers the layers with attention, or all layers have it."""
    numbers, layers = left.pop("full_attn_idxs", None), range(ours["n_layers"])
    check_kind("full_attn_idxs", numbers, list, nullable=True)
    if left.get("layer_types") is None:
        numbers = layers if numbers is None else numbers
        left["layer_types"] = ["full_attention" if layer in numbers else "conv" for layer in layers]


def write(config: LFM2.Config) -> dict[str, Any]:
    return {**write_rope(config), **write_layer_types(config), "block_auto_adjust_ff_dim": False}


PUBLISHED = {
    LFM2: Published(
        model_type="lfm2",
        architecture="Lfm2ForCausalLM",
        names=NAMES,
        fields=fields(
            {"norm_eps": "norm_eps", "conv_width": "conv_L_cache", "conv_bias": "conv_bias"},
            **dict(vocab_size=65_536, max_seq_len=128_000, d_model=2560, n_layers=32, n_heads=32, n_kv_heads=8),
            **dict(head_dim=None, d_ff=12_288, norm_eps=1e-5, tie_embeddings=True, conv_width=3, conv_bias=False),
        ),
        ignored=frozenset(  # of the code that trained the first models; transformers reads none of them
            f"block_{name}" for name in ("dim", "norm_eps", "use_swiglu", "use_xavier_init")
        )
        | {"block_mlp_init_scale", "block_out_init_scale", "conv_dim", "conv_dim_out", "conv_use_xavier_init"}
        | {"num_heads", "theta", "use_pos_enc"},
        read=read,
        write=write,
    )
}


def pattern(n_layers: int, *attention: int) -> tuple[str, ...]:
    """Convolutions in all layers but those that are numbered."""
    return tuple("full_attention" if layer in attention else "conv" for layer in range(n_layers))


COMMON = dict(vocab_size=65_536, max_seq_len=128_000, n_kv_heads=8, rope_theta=1_000_000.0)
SIXTEEN = dict(COMMON, n_layers=16, layer_types=pattern(16, 2, 5, 8, 10, 12, 14))
SIZES = {
    LFM2: {
        "lfm2-350m": dict(SIXTEEN, d_model=1024, n_heads=16, d_ff=4608),
        "lfm2-700m": dict(SIXTEEN, d_model=1536, n_heads=24, d_ff=6912),
        "lfm2-1.2b": dict(SIXTEEN, d_model=2048, n_heads=32, d_ff=8192),
        "lfm2-2.6b": dict(
            **dict(COMMON, d_model=2048, n_heads=32, d_ff=10_752, n_layers=30),
            layer_types=pattern(30, 2, 5, 9, 13, 17, 21, 24, 27),
        ),
    }
}
