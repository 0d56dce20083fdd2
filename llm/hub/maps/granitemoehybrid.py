"""Granite 4 as published: gate and up in one matrix, experts stacked."""

import math
from typing import Any

from llm.hub.maps.common import ENDS, MIXER, OURS, PRE_NORM, THEIRS, fields, read_layer_types, write_layer_types
from llm.hub.rope import read_rope, write_rope
from llm.hub.tables import PretrainedError, Published, check_count, check_kind, require, same, split
from llm.models.case_studies.granitemoehybrid import GraniteMoEHybrid

MAMBA, MOE, SHARED = (THEIRS + part for part in ("mamba.", "block_sparse_moe.", "shared_mlp."))
NAMES = (
    *ENDS,
    *PRE_NORM,
    ((OURS + "mixer.in_proj.*", OURS + "mixer.o_proj.*"), (MAMBA + "in_proj.*", MAMBA + "out_proj.*"), same),
    (OURS + "mixer.conv.*", MAMBA + "conv1d.*", same),
    (OURS + "mixer.decay.*", MAMBA + "*", same),
    (OURS + "mixer.D", MAMBA + "D", same),
    (OURS + "mixer.o_norm.weight", MAMBA + "norm.weight", same),
    MIXER,
    (OURS + "ffn.router.weight", MOE + "router.layer.weight", same),
    (OURS + "ffn.router.weight", MOE + "router.weight", same),  # this and two below: as transformers 5 has them
    (OURS + "ffn.experts.gate_up_proj", MOE + "input_linear.weight", same),
    (OURS + "ffn.experts.down_proj", MOE + "output_linear.weight", same),
    (OURS + "ffn.experts.*", MOE + "experts.*", same),
    *(
        row
        for ffn in (OURS + "ffn.shared.", OURS + "ffn.")
        for row in (
            ((ffn + "gate_proj.weight", ffn + "up_proj.weight"), SHARED + "input_linear.weight", split(2)),
            (ffn + "down_proj.weight", SHARED + "output_linear.weight", same),
        )
    ),
)
KINDS = {"linear_attention": "mamba", "full_attention": "attention"}
"""How transformers 5 calls the layers -> how published files do."""


def read(left: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    position = left.pop("position_embedding_type", None)
    require("position_embedding_type", position, ("rope", "nope", None))
    for name in ("layer_types", "layers_block_type"):
        if isinstance(types := left.pop(name, None), list):
            left["layer_types"] = [KINDS.get(kind, kind) if isinstance(kind, str) else kind for kind in types]
    left.setdefault("layer_types", ["mamba"] * ours["n_layers"])
    found = read_rope(left, ours) | read_layer_types(left, ours)
    return found | {"use_rope": position == "rope", "mamba_head_dim": read_head_dim(left, ours)}


def read_head_dim(left: dict[str, Any], ours: dict[str, Any]) -> int:
    """`mamba_d_head`, where "auto" stands for mamba_expand * hidden_size / mamba_n_heads. Raises PretrainedError for
    another product of heads and channels, which transformers refuses."""
    expand, width, n_heads = left.pop("mamba_expand", 2), left.pop("mamba_d_head", "auto"), ours["n_mamba_heads"]
    check_kind("mamba_expand", expand)
    check_count("mamba_n_heads", n_heads)
    inside = expand * ours["d_model"]
    if width == "auto":
        width = inside // n_heads
    check_count("mamba_d_head", width)
    if width * n_heads != inside:
        raise PretrainedError(
            f"config.json sets {n_heads} mamba_n_heads of mamba_d_head = {width}: together they must be mamba_expand * "
            f"hidden_size = {inside} wide"
        )
    return width


def write(config: GraniteMoEHybrid.Config) -> dict[str, Any]:
    """Raises PretrainedError where Mamba-2 is not a whole multiple as wide as the stream: transformers needs that."""
    inside = config.n_mamba_heads * config.mamba_head_dim
    if inside % config.d_model:
        raise PretrainedError(
            f"transformers opens no GraniteMoeHybridForCausalLM where the heads of Mamba-2 are {inside} channels wide "
            f"together, no multiple of d_model = {config.d_model} (--model.n-mamba-heads, --model.mamba-head-dim). "
            "This model can be trained and kept as a run, but not exported"
        )
    return {
        **write_rope(config),
        **write_layer_types(config),
        "position_embedding_type": "rope" if config.use_rope else "nope",
        "mamba_expand": inside // config.d_model,
        "mamba_d_head": config.mamba_head_dim,
        "attention_multiplier": config.attention_scale,
    }


PUBLISHED = {
    GraniteMoEHybrid: Published(
        model_type="granitemoehybrid",
        architecture="GraniteMoeHybridForCausalLM",
        names=NAMES,
        fields=fields(
            {
                **dict(n_experts="num_local_experts", d_expert="intermediate_size", d_ff="shared_intermediate_size"),
                **dict(n_mamba_heads="mamba_n_heads", n_state_groups="mamba_n_groups", d_state="mamba_d_state"),
                **dict(d_conv="mamba_d_conv", conv_bias="mamba_conv_bias", logits_scaling="logits_scaling"),
                **{name: name for name in ("embedding_multiplier", "attention_multiplier", "residual_multiplier")},
            },
            **dict(vocab_size=32_000, max_seq_len=2048, d_model=4096, n_layers=32, n_heads=32, n_kv_heads="n_heads"),
            **dict(head_dim=None, d_expert=11_008, d_ff=1024, n_experts=8, top_k=2, norm_eps=1e-6),
            **dict(tie_embeddings=False, attention_bias=False, n_mamba_heads=128, n_state_groups=1, d_state=256),
            **dict(d_conv=4, conv_bias=True, embedding_multiplier=1.0, attention_multiplier=1.0),
            **dict(residual_multiplier=1.0, logits_scaling=1.0),
        ),
        required={
            "hidden_act": ("silu",),
            "mamba_proj_bias": (False,),
            "time_step_limit": (0.0, math.inf, {"__float__": "Infinity"}),  # the last as transformers 5 writes it
        },
        ignored=frozenset({"mamba_chunk_size", "init_method", "normalization_function"}),  # no part of the result
        read=read,
        write=write,
    )
}


def pattern(n_layers: int, *attention: int) -> tuple[str, ...]:
    """Mamba-2 in all layers but those that are numbered."""
    return tuple("attention" if layer in attention else "mamba" for layer in range(n_layers))


COMMON = dict(vocab_size=100_352, max_seq_len=131_072, residual_multiplier=0.22)
FORTY = dict(COMMON, n_layers=40, layer_types=pattern(40, 5, 15, 25, 35), d_state=128)
SIZES = {
    GraniteMoEHybrid: {
        "granite-4.0-h-350m": dict(
            **dict(vocab_size=100_352, max_seq_len=32_768, d_model=768, n_layers=32, n_heads=12, n_kv_heads=4),
            **dict(layer_types=pattern(32, 10, 13, 17, 27), n_mamba_heads=48, mamba_head_dim=32, d_state=128),
            **dict(d_ff=2048, d_expert=2048, n_experts=0, top_k=0),
            **dict(attention_multiplier=1 / 64, residual_multiplier=0.246, logits_scaling=3.0),
        ),
        "granite-4.0-h-micro": dict(
            **dict(FORTY, d_model=2048, n_heads=32, n_kv_heads=8, n_mamba_heads=64),
            **dict(d_ff=8192, d_expert=8192, n_experts=0, top_k=0),
            **dict(attention_multiplier=1 / 64, logits_scaling=8.0),
        ),
        "granite-4.0-h-tiny": dict(
            **dict(FORTY, d_model=1536, n_heads=12, n_kv_heads=4, n_mamba_heads=48),
            **dict(d_ff=1024, d_expert=512, n_experts=64, top_k=6),
            **dict(attention_multiplier=1 / 128, logits_scaling=6.0),
        ),
        "granite-4.0-h-small": dict(
            **dict(FORTY, d_model=4096, n_heads=32, n_kv_heads=8, n_mamba_heads=128),
            **dict(d_ff=1536, d_expert=768, n_experts=72, top_k=10),
            **dict(attention_multiplier=1 / 128, logits_scaling=16.0),
        ),
        "granite-4.0-micro": dict(
            **dict(COMMON, d_model=2560, n_layers=40, n_heads=40, n_kv_heads=8, layer_types=("attention",)),
            **dict(d_ff=8192, d_expert=8192, n_experts=0, top_k=0, use_rope=True, rope_theta=10_000_000.0),
            **dict(n_mamba_heads=128, mamba_head_dim=40, d_state=256),
            **dict(attention_multiplier=1 / 64, logits_scaling=10.0),
        ),
    }
}
