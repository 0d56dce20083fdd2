"""LLaDA, Dream and SDAR as published. Transformers has no class of them: their repositories bring their own code."""

from typing import Any

from llm.hub.maps.common import DECODER, OURS, fields
from llm.hub.maps.qwen3 import dense_fields
from llm.hub.rope import read_rope, write_rope
from llm.hub.tables import PretrainedError, Published, check_kind, same
from llm.models.case_studies.dream import Dream
from llm.models.case_studies.llada import LLaDA
from llm.models.case_studies.sdar import SDAR

THEIRS = "model.transformer.blocks.{layer}."
LLADA_NAMES = (
    ("tok_embed.weight", "model.transformer.wte.weight", same),
    ("norm.weight", "model.transformer.ln_f.weight", same),
    ("lm_head.weight", "model.transformer.ff_out.weight", same),
    (OURS + "mixer_norm.weight", THEIRS + "attn_norm.weight", same),
    (OURS + "ffn_norm.weight", THEIRS + "ff_norm.weight", same),
    (OURS + "mixer.o_proj.weight", THEIRS + "attn_out.weight", same),
    (OURS + "ffn.gate_proj.weight", THEIRS + "ff_proj.weight", same),
    (OURS + "ffn.up_proj.weight", THEIRS + "up_proj.weight", same),
    (OURS + "ffn.down_proj.weight", THEIRS + "ff_out.weight", same),
    (OURS + "mixer.*", THEIRS + "*", same),  # q_proj, k_proj, v_proj
)
OLMO_FIELDS = {
    **{name: name for name in ("d_model", "n_layers", "n_heads", "n_kv_heads")},
    "max_seq_len": "max_sequence_length",
    "d_ff": "mlp_hidden_size",
    "tie_embeddings": "weight_tying",
    "mask_token": "mask_token_id",
}

NO_EFFECT = frozenset(
    {
        *("alibi_bias_max", "attention_layer_norm_with_affine", "embedding_dropout", "residual_dropout"),
        *("init_cutoff_factor", "init_device", "init_fn", "init_std", "mlp_ratio", "precision"),
        *("flash_attention", "rope_full_precision"),
    }
)
"""Fields of code that LLaDA's began as: training, numerics, and settings of parts that are switched off."""


FULL_ATTENTION = {"hidden_act": ("silu",), "use_sliding_window": (False,), "layer_types": ("full_attention", None)}
UNUSED_WINDOW = frozenset({"sliding_window", "max_window_layers"})
HOW_TO_TRAIN = frozenset({"debug", "ep_size", "fuse_cross_entropy", "micro_forward", "skip_checkpoint", "use_deepep"})


def read_llada(left: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """RoPE's base, and a check: the embedding may be larger than the vocabulary in other models of this code."""
    size = left.pop("embedding_size", None)
    check_kind("embedding_size", size, nullable=True)
    if size not in (None, ours["vocab_size"]):
        raise PretrainedError(f"config.json sets embedding_size = {size}, but vocab_size = {ours['vocab_size']}")
    return read_rope(left, ours)


def write_llada(config: LLaDA.Config) -> dict[str, Any]:
    return {"rope_theta": config.rope_theta, "embedding_size": config.vocab_size}


PUBLISHED = {
    LLaDA: Published(
        model_type="llada",
        architecture="LLaDAModelLM",
        own_code=True,
        names=LLADA_NAMES,
        fields=fields(
            OLMO_FIELDS,
            **dict(vocab_size=126_464, max_seq_len=4096, d_model=4096, n_layers=32, n_heads=32, n_kv_heads="n_heads"),
            **dict(d_ff=12_288, norm_eps=1e-5, tie_embeddings=False, mask_token=126_336),
        ),
        required={
            **dict(activation_type=("silu",), block_type=("llama",), layer_norm_type=("rms",), rope=(True,)),
            **dict(layer_norm_with_affine=(True,), block_group_size=(1,)),
        },
        ignored=NO_EFFECT,
        read=read_llada,
        write=write_llada,
    ),
    Dream: Published(
        model_type="Dream",
        architecture="DreamModel",
        own_code=True,
        names=DECODER,
        fields=(*dense_fields(head_dim=None), ("mask_token", "mask_token_id", 151_666)),
        required=FULL_ATTENTION,
        ignored=UNUSED_WINDOW,
        read=read_rope,
        write=write_rope,
    ),
    SDAR: Published(
        model_type="sdar",
        architecture="SDARForCausalLM",
        own_code=True,
        names=DECODER,
        fields=(
            *dense_fields(head_dim=128),
            ("mask_token", "mask_token_id", 151_669),
            ("block_size", "block_size", 4),
        ),
        required={**FULL_ATTENTION, "attention_bias": (False,)},
        ignored=UNUSED_WINDOW | HOW_TO_TRAIN,
        read=read_rope,
        write=write_rope,
    ),
}
EIGHT_B = dict(vocab_size=126_464, max_seq_len=4096, d_model=4096, n_layers=32, n_heads=32, n_kv_heads=32, d_ff=12_288)
SEVEN_B = dict(vocab_size=152_064, max_seq_len=131_072, d_model=3584, n_layers=28, n_heads=28, n_kv_heads=4)
FOUR_TOKENS = dict(vocab_size=151_936, max_seq_len=32_768, n_kv_heads=8, head_dim=128, rope_theta=1e6, norm_eps=1e-6)
FOUR_TOKENS |= dict(tie_embeddings=False, mask_token=151_669, block_size=4)
SIZES = {
    LLaDA: {"llada-8b": dict(EIGHT_B, rope_theta=500_000.0, tie_embeddings=False, mask_token=126_336)},
    Dream: {
        "dream-7b": dict(SEVEN_B, d_ff=18_944, rope_theta=1e6, norm_eps=1e-6, tie_embeddings=False, mask_token=151_666)
    },
    SDAR: {
        "sdar-1.7b": dict(FOUR_TOKENS, d_model=2048, n_layers=28, n_heads=16, d_ff=6144),
        "sdar-8b": dict(FOUR_TOKENS, d_model=4096, n_layers=36, n_heads=32, d_ff=12_288),
    },
}
