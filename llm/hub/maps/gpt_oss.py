"""GPT-OSS as published: experts as matrices (in, out), gate and up alternating."""

from typing import Any

from llm.hub.maps.common import ENDS, MIXER, OURS, PRE_NORM, THEIRS, fields, read_layer_types, write_layer_types
from llm.hub.rope import read_rope, write_rope
from llm.hub.tables import Published, deinterleave, join, same, transpose
from llm.models.case_studies.gpt_oss import GPTOSS

YARN = dict(factor=32.0, original_max_position_embeddings=4096, beta_fast=32.0, beta_slow=1.0, truncate=False)


def read(left: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """Where config.json has no settings of RoPE, transformers takes those of the published models."""
    if not left.get("rope_parameters") and not left.get("rope_scaling"):
        left["rope_scaling"] = {"rope_type": "yarn", **YARN}
    return read_layer_types(left, ours) | read_rope(left, ours, default_theta=150_000.0)


def write(config: GPTOSS.Config) -> dict[str, Any]:
    settings = write_rope(config)
    scaling = settings["rope_scaling"] or {"rope_type": "default"}
    return {**settings, "rope_scaling": scaling, **write_layer_types(config), "head_dim": config.head_width}


EXPERTS, THEIR_EXPERTS = OURS + "ffn.experts.", THEIRS + "mlp.experts."
ONE = THEIR_EXPERTS + "{expert}."
ONE_BY_ONE = (  # as llm/hub/gguf_layouts.py names them: matrices (out, in), gate and up apart
    (EXPERTS + "gate_up_proj[{expert}]", (ONE + "gate_proj.weight", ONE + "up_proj.weight"), join(2)),
    (EXPERTS + "gate_up_proj_bias[{expert}]", (ONE + "gate_proj.bias", ONE + "up_proj.bias"), join(2)),
    (EXPERTS + "down_proj[{expert}]", ONE + "down_proj.weight", same),
    (EXPERTS + "down_proj_bias[{expert}]", ONE + "down_proj.bias", same),
)
PUBLISHED = {
    GPTOSS: Published(
        model_type="gpt_oss",
        architecture="GptOssForCausalLM",
        names=(
            *ENDS,
            *PRE_NORM,
            # theirs (E, D, 2 F)
            (EXPERTS + "gate_up_proj", THEIR_EXPERTS + "gate_up_proj", deinterleave(-1).then(transpose)),
            (EXPERTS + "gate_up_proj_bias", THEIR_EXPERTS + "gate_up_proj_bias", deinterleave(-1)),
            (EXPERTS + "down_proj", THEIR_EXPERTS + "down_proj", transpose),
            (EXPERTS + "down_proj_bias", THEIR_EXPERTS + "down_proj_bias", same),
            *ONE_BY_ONE,
            (OURS + "ffn.router.*", THEIRS + "mlp.router.*", same),
            MIXER,
        ),
        fields=fields(
            {"n_experts": "num_local_experts"},
            **dict(vocab_size=201_088, max_seq_len=131_072, d_model=2880, n_layers=36, n_heads=64, n_kv_heads=8),
            **dict(head_dim=64, d_ff=2880, n_experts=128, top_k=4, window_size=128, norm_eps=1e-5),
            **dict(tie_embeddings=False),
        ),
        required={"attention_bias": (True,), "swiglu_limit": (7.0,), "swiglu_alpha": (1.702,)},
        # transformers reads none of them: experts have their own activation, the others repeat other fields
        ignored=frozenset({"hidden_act", "experts_per_token", "initial_context_length"}),
        read=read,
        write=write,
    )
}

ROPE = dict(rope_theta=150_000.0, rope_scaling=dict(YARN, rope_type="yarn"), max_seq_len=131_072)
COMMON = dict(ROPE, n_heads=64, n_kv_heads=8, head_dim=64, vocab_size=201_088, tie_embeddings=False)
SIZES = {
    GPTOSS: {
        "gpt-oss-20b": dict(COMMON, d_model=2880, d_ff=2880, n_layers=24, n_experts=32),
        "gpt-oss-120b": dict(COMMON, d_model=2880, d_ff=2880, n_layers=36, n_experts=128),
    }
}
