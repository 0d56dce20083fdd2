"""GLM-4.5 as published. Its prediction module is left out, as transformers leaves it out."""

from collections.abc import Mapping
from typing import Any

from llm.hub.maps.common import ENDS, FFN, MIXER, OURS, PRE_NORM, THEIRS, fields
from llm.hub.rope import read_partial_rope, write_rope
from llm.hub.tables import Published, check_kind, join, same
from llm.models.case_studies.glm4_moe import GLM4MoE

EXPERT = THEIRS + "mlp.experts.{expert}."


def read(left: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    for name in ("num_nextn_predict_layers", "num_mtp_layers"):
        check_kind(name, left.pop(name, None), nullable=True)
    found = read_partial_rope(left, ours)
    share, width = found["partial_rotary_factor"], ours["head_dim"]
    if width is None and ours["n_heads"] > 0:
        width = ours["d_model"] // ours["n_heads"]  # rounded down, as in transformers: 96 heads do not divide 4,096
    return found | {"head_dim": width, "partial_rotary_factor": 0.5 if share is None else share}


def write(config: GLM4MoE.Config) -> dict[str, Any]:
    share = {"partial_rotary_factor": config.partial_rotary_factor}
    return {**write_rope(config), **share, "head_dim": config.head_width, "num_nextn_predict_layers": 0}


def prediction_modules(config: Mapping[str, Any]) -> str:
    """The names of the tensors of prediction modules, which are numbered as layers after the last one."""
    n_layers, n_modules = config.get("num_hidden_layers", 46), config.get("num_nextn_predict_layers", 1)
    return "|".join(rf"model\.layers\.{n_layers + k}\..*" for k in range(n_modules or 0)) or "(?!)"


PUBLISHED = {
    GLM4MoE: Published(
        model_type="glm4_moe",
        architecture="Glm4MoeForCausalLM",
        names=(
            *ENDS,
            *PRE_NORM,
            MIXER,
            (OURS + "ffn.router.weight", THEIRS + "mlp.gate.weight", same),
            (OURS + "ffn.router.expert_bias", THEIRS + "mlp.gate.e_score_correction_bias", same),
            (
                OURS + "ffn.experts.gate_up_proj[{expert}]",
                (EXPERT + "gate_proj.weight", EXPERT + "up_proj.weight"),
                join(2),
            ),
            (OURS + "ffn.experts.down_proj[{expert}]", EXPERT + "down_proj.weight", same),
            (OURS + "ffn.experts.*", THEIRS + "mlp.experts.*", same),  # stacked, as transformers 5 has them in memory
            (OURS + "ffn.shared.*", THEIRS + "mlp.shared_experts.*", same),
            FFN,
        ),
        fields=fields(
            {"n_experts": "n_routed_experts"},
            **dict(vocab_size=151_552, max_seq_len=131_072, d_model=4096, n_layers=46, n_heads=96, n_kv_heads=8),
            **dict(head_dim=None, d_ff=10_944, d_expert=1408, n_experts=128, top_k=8, n_shared_experts=1),
            **dict(n_groups=1, top_k_groups=1, n_dense_layers=1, routed_scaling_factor=1.0, normalize_weights=True),
            **dict(norm_eps=1e-5, tie_embeddings=False, attention_bias=False, qk_norm=False),
        ),
        required={"hidden_act": ("silu",)},
        ignored_weights=prediction_modules,
        read=read,
        write=write,
    )
}

COMMON = dict(vocab_size=151_552, max_seq_len=131_072, rope_theta=1_000_000.0, n_heads=96, n_kv_heads=8, head_dim=128)
SPARSE = dict(tie_embeddings=False, top_k=8, n_shared_experts=1)
SIZES = {
    GLM4MoE: {
        "glm-4.5-air": dict(
            **dict(COMMON, **SPARSE, d_model=4096, n_layers=46, d_ff=10_944, d_expert=1408, n_experts=128),
            **dict(n_dense_layers=1, attention_bias=True),
        ),
        "glm-4.5": dict(
            **dict(COMMON, **SPARSE, d_model=5120, n_layers=92, d_ff=12_288, d_expert=1536, n_experts=160),
            **dict(n_dense_layers=3, attention_bias=True, qk_norm=True, routed_scaling_factor=2.5),
        ),
    }
}
