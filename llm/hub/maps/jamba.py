"""Jamba as published."""

import math
from typing import Any

from llm.hub.maps.common import ENDS, MIXER, OURS, THEIRS, fields
from llm.hub.maps.mamba import mamba_rows, read_rank
from llm.hub.tables import Published, join, same
from llm.models.case_studies.jamba import Jamba

SAME_RESULT = "use_mamba_kernels use_mambapy use_associative_scan num_logits_to_keep calc_logits_for_entire_prompt"
MIXED, FED, EXPERT = OURS + "mixer.", THEIRS + "feed_forward.", THEIRS + "feed_forward.experts.{expert}."


def read(left: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    return {"dt_rank": read_rank(left, "mamba_dt_rank", ours["d_model"])}


def write(config: Jamba.Config) -> dict[str, Any]:
    return {"mamba_dt_rank": config.dt_rank or math.ceil(config.d_model / 16)}


PUBLISHED = {
    Jamba: Published(
        model_type="jamba",
        architecture="JambaForCausalLM",
        names=(
            ENDS[0],
            ("norm.weight", "model.final_layernorm.weight", same),
            ENDS[2],
            (OURS + "mixer_norm.weight", THEIRS + "input_layernorm.weight", same),
            (OURS + "ffn_norm.weight", THEIRS + "pre_ff_layernorm.weight", same),
            *(
                (MIXED + f"{part}_norm.weight", THEIRS + f"mamba.{part}_layernorm.weight", same)
                for part in ("dt", "b", "c")
            ),
            *mamba_rows(MIXED, THEIRS + "mamba."),
            *((MIXED + f"{part}_proj.*", THEIRS + f"mamba.{part}_proj.*", same) for part in ("in", "x", "dt")),
            MIXER,
            (
                OURS + "ffn.experts.gate_up_proj[{expert}]",
                (EXPERT + "gate_proj.weight", EXPERT + "up_proj.weight"),
                join(2),
            ),
            (OURS + "ffn.experts.down_proj[{expert}]", EXPERT + "down_proj.weight", same),
            (OURS + "ffn.experts.*", FED + "experts.*", same),  # stacked, as transformers 5 has them in memory
            (OURS + "ffn.*", FED + "*", same),
        ),
        fields=fields(
            {
                **dict(attention_period="attn_layer_period", attention_offset="attn_layer_offset"),
                **dict(expert_period="expert_layer_period", expert_offset="expert_layer_offset"),
                **dict(d_state="mamba_d_state", d_conv="mamba_d_conv", expand="mamba_expand"),
            },
            **dict(vocab_size=65_536, max_seq_len=262_144, d_model=4096, n_layers=32, n_heads=32, n_kv_heads=8),
            **dict(head_dim=None, d_ff=14_336, norm_eps=1e-6, tie_embeddings=False, n_experts=16, top_k=2),
            **dict(attention_period=8, attention_offset=4, expert_period=2, expert_offset=1),
            **dict(d_state=16, d_conv=4, expand=2),
        ),
        required={
            "hidden_act": ("silu",),
            "mamba_proj_bias": (False,),
            "mamba_conv_bias": (True,),
            "mamba_inner_layernorms": (True,),
            "sliding_window": (None,),
        },
        ignored=frozenset(SAME_RESULT.split()),
        read=read,
        write=write,
    )
}
SHAPE = dict(vocab_size=65_536, max_seq_len=262_144, norm_eps=1e-6, tie_embeddings=False, n_kv_heads=8)
PATTERN = dict(attention_period=8, attention_offset=4, expert_period=2, expert_offset=1, n_experts=16, top_k=2)
SIZES = {
    Jamba: {
        "jamba-v0.1": dict(SHAPE, **PATTERN, d_model=4096, n_layers=32, n_heads=32, d_ff=14_336),
        "jamba-1.5-large": dict(SHAPE, **PATTERN, d_model=8192, n_layers=72, n_heads=64, d_ff=24_576),
    }
}
