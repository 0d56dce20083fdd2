"""DeepSeek-V2 and V3 as published. V3's prediction modules are left out, as transformers leaves them out."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llm.hub.maps.common import ENDS, FFN, MIXER, OURS, PRE_NORM, THEIRS, fields
from llm.hub.rope import read_rope, write_rope
from llm.hub.tables import Operation, PretrainedError, Published, check_count, check_kind, join, require, same
from llm.models.case_studies.deepseek_v2 import DeepseekConfig, DeepseekV2
from llm.models.case_studies.deepseek_v3 import DeepseekV3
from llm.models.case_studies.deepseek_v3_2 import DeepseekV32

ATTENTION, EXPERTS = THEIRS + "self_attn.", THEIRS + "mlp."
EXPERT = EXPERTS + "experts.{expert}."
NAMES = (
    *ENDS,
    *PRE_NORM,
    (OURS + "mixer.q_a_norm.weight", ATTENTION + "q_a_layernorm.weight", same),
    (OURS + "mixer.kv_a_norm.weight", ATTENTION + "kv_a_layernorm.weight", same),
    (OURS + "mixer.kv_a_proj.weight", ATTENTION + "kv_a_proj_with_mqa.weight", same),
    MIXER,  # q_proj or q_a_proj and q_b_proj, kv_b_proj, o_proj
    (OURS + "ffn.router.weight", EXPERTS + "gate.weight", same),
    (OURS + "ffn.router.expert_bias", EXPERTS + "gate.e_score_correction_bias", same),
    (
        OURS + "ffn.experts.gate_up_proj[{expert}]",
        (EXPERT + "gate_proj.weight", EXPERT + "up_proj.weight"),
        join(2),
    ),
    (OURS + "ffn.experts.down_proj[{expert}]", EXPERT + "down_proj.weight", same),
    (OURS + "ffn.experts.*", EXPERTS + "experts.*", same),  # stacked, as transformers 5 has them in memory
    (OURS + "ffn.shared.*", EXPERTS + "shared_experts.*", same),
    FFN,
)
INDEXER = (
    (OURS + "mixer.indexer.q_proj.weight", ATTENTION + "indexer.wq_b.weight", same),
    (OURS + "mixer.indexer.k_proj.weight", ATTENTION + "indexer.wk.weight", same),
)  # k_norm and weights_proj are called alike
LEFT_OUT = Operation(lambda theirs: [], lambda ours: [])
REQUIRED = {"hidden_act": ("silu",), "attention_bias": (False,), "moe_layer_freq": (1,)}
# how experts were balanced and spread over machines; widths that transformers writes and does not read
IGNORED = frozenset({"aux_loss_alpha", "seq_aux", "ep_size", "head_dim", "qk_head_dim"})


def deepseek_fields(**defaults: Any) -> tuple[tuple[str, str, Any], ...]:
    both = dict(
        **dict(q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128),
        **dict(norm_eps=1e-6, tie_embeddings=False),
    )
    return fields({"n_experts": "n_routed_experts"}, **both, **defaults)


def read_common(left: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """Every head has its own keys; a config.json may say so, too."""
    require("num_key_value_heads", left.pop("num_key_value_heads", None), (ours["n_heads"], None))
    return {**read_rope(left, ours), "n_shared_experts": ours["n_shared_experts"] or 0}


def read_v2(left: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    check_count("num_experts_per_tok", ours["top_k"])  # transformers has no default
    method = left.pop("topk_method", "greedy")
    require("topk_method", method, ("greedy", "group_limited_greedy"))
    if method == "greedy":
        return read_common(left, ours) | {"n_groups": 1, "top_k_groups": 1}
    if None in (ours["n_groups"], ours["top_k_groups"]):
        raise PretrainedError(f"config.json sets topk_method = {method!r}, but not both of n_group and topk_group")
    return read_common(left, ours)


def write_v2(config: DeepseekV2.Config) -> dict[str, Any]:
    method = "greedy" if config.n_groups == 1 else "group_limited_greedy"
    return write_common(config) | {"topk_method": method}


def read_v3(left: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    for name in ("num_nextn_predict_layers", "num_mtp_layers"):  # transformers has two names for it, too
        check_kind(name, left.pop(name, None), nullable=True)
    return read_common(left, ours) | {"n_mtp": 0}


def write_v3(config: DeepseekV3.Config) -> dict[str, Any]:
    return write_common(config) | {"num_nextn_predict_layers": 0}


def read_v32(left: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """Layers are dense and sparse in the one order that first_k_dense_replace says, and all have an indexer."""
    n_dense, n_layers = min(ours["n_dense_layers"], ours["n_layers"]), ours["n_layers"]
    kinds = ["dense"] * n_dense + ["sparse"] * (n_layers - n_dense)
    for name, expected in (("mlp_layer_types", kinds), ("layer_types", ["indexed_attention"] * n_layers)):
        if left.pop(name, expected) not in (expected, None):
            raise PretrainedError(f"config.json sets {name}: this model knows {expected} only")
    return read_v3(left, ours)


def write_common(config: DeepseekConfig) -> dict[str, Any]:
    return write_rope(config) | {"num_key_value_heads": config.n_heads}


def empty_experts(config: Mapping[str, Any]) -> str:
    """The names of shared experts of width 0, which transformers saves."""
    return r"(?!)" if config.get("n_shared_experts", 1) else r"model\.layers\.\d+\.mlp\.shared_experts\..*"


def left_out(config: Mapping[str, Any]) -> str:
    """The names of the tensors of V3's prediction modules, which are numbered as layers after the last one."""
    n_layers, n_modules = config.get("num_hidden_layers", 61), config.get("num_nextn_predict_layers", 1)
    modules = (rf"model\.layers\.{n_layers + k}\..*" for k in range(n_modules or 0))
    return "|".join((empty_experts(config), *modules))


PUBLISHED = {
    DeepseekV2: Published(
        model_type="deepseek_v2",
        architecture="DeepseekV2ForCausalLM",
        names=NAMES,
        fields=deepseek_fields(
            **dict(vocab_size=102_400, max_seq_len=2048, d_model=4096, n_layers=32, n_heads=32, n_dense_layers=0),
            **dict(d_ff=11_008, n_experts=64, top_k=None, n_shared_experts=2, d_expert=1407, n_groups=None),
            **dict(top_k_groups=None, routed_scaling_factor=1.0),
        ),
        required=REQUIRED | {"mlp_bias": (False,), "scoring_func": ("softmax",), "norm_topk_prob": (False,)},
        nullable=frozenset({"q_lora_rank", "n_shared_experts"}),
        heads_divide_width=True,
        ignored=IGNORED,
        ignored_weights=empty_experts,
        read=read_v2,
        write=write_v2,
    ),
    DeepseekV3: Published(
        model_type="deepseek_v3",
        architecture="DeepseekV3ForCausalLM",
        names=(*NAMES, ("mtp.*", (), LEFT_OUT)),
        fields=deepseek_fields(
            **dict(vocab_size=129_280, max_seq_len=4096, d_model=7168, n_layers=61, n_heads=128, n_dense_layers=3),
            **dict(d_ff=18_432, n_experts=256, top_k=8, n_shared_experts=1, d_expert=2048, n_groups=8, top_k_groups=4),
            **dict(routed_scaling_factor=2.5, normalize_weights=True),
        ),
        required=REQUIRED
        | {
            "scoring_func": ("sigmoid",),
            "topk_method": ("noaux_tc",),
            "rope_interleave": (True,),
        },
        nullable=frozenset({"q_lora_rank", "n_shared_experts"}),
        ignored=IGNORED,
        ignored_weights=left_out,
        read=read_v3,
        write=write_v3,
    ),
    DeepseekV32: Published(
        model_type="deepseek_v32",
        architecture="DeepseekV32ForCausalLM",
        names=(*INDEXER, *NAMES, ("mtp.*", (), LEFT_OUT)),
        fields=deepseek_fields(
            **dict(vocab_size=129_280, max_seq_len=163_840, d_model=7168, n_layers=61, n_heads=128, n_dense_layers=3),
            **dict(d_ff=18_432, n_experts=256, top_k=8, n_shared_experts=1, d_expert=2048, n_groups=8, top_k_groups=4),
            **dict(routed_scaling_factor=2.5, index_n_heads=64, index_head_dim=128, index_top_k=2048),
            normalize_weights=True,
        ),
        required=REQUIRED
        | {
            "scoring_func": ("sigmoid",),
            "topk_method": ("noaux_tc",),
            "mlp_bias": (False,),
        },
        nullable=frozenset({"n_shared_experts"}),
        ignored=IGNORED | {"output_router_logits"},
        ignored_weights=left_out,
        read=read_v32,
        write=write_v3,
    ),
}
# Kimi K2 is a DeepSeek-V3 with more experts and fewer heads; transformers 5.23 does not know its model_type
READ_ONLY = ((DeepseekV3, replace(PUBLISHED[DeepseekV3], model_type="kimi_k2")),)


def longer(mscale: float) -> dict[str, Any]:
    """From 4,096 tokens to 163,840."""
    lengths = {"factor": 40.0, "original_max_position_embeddings": 4096}
    ramp = {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": mscale, "mscale_all_dim": mscale}
    return {"max_seq_len": 163_840, "rope_scaling": {"rope_type": "yarn", **lengths, **ramp}}


HEADS = dict(kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, tie_embeddings=False)
TWO = dict(HEADS, vocab_size=102_400, norm_eps=1e-6, n_dense_layers=1, n_shared_experts=2, top_k=6) | longer(0.707)
THREE = dict(HEADS, vocab_size=129_280, norm_eps=1e-6, n_dense_layers=3, n_shared_experts=1, top_k=8) | longer(1.0)
SIZES = {
    DeepseekV2: {
        "deepseek-v2-lite": dict(
            **dict(TWO, d_model=2048, n_layers=27, n_heads=16, q_lora_rank=None, d_ff=10_944),
            **dict(n_experts=64, d_expert=1408, n_groups=1, top_k_groups=1, routed_scaling_factor=1.0),
        ),
        "deepseek-v2": dict(
            **dict(TWO, d_model=5120, n_layers=60, n_heads=128, q_lora_rank=1536, d_ff=12_288),
            **dict(n_experts=160, d_expert=1536, n_groups=8, top_k_groups=3, routed_scaling_factor=16.0),
        ),
    },
    DeepseekV3: {
        "deepseek-v3": dict(
            **dict(THREE, d_model=7168, n_layers=61, n_heads=128, q_lora_rank=1536, d_ff=18_432),
            **dict(n_experts=256, d_expert=2048, n_groups=8, top_k_groups=4, n_mtp=0),
        ),
        "kimi-k2": dict(
            **dict(HEADS, vocab_size=163_840, norm_eps=1e-6, d_model=7168, n_layers=61, n_heads=64, q_lora_rank=1536),
            **dict(n_dense_layers=1, d_ff=18_432, n_experts=384, top_k=8, n_shared_experts=1, d_expert=2048),
            **dict(n_groups=1, top_k_groups=1, routed_scaling_factor=2.827, n_mtp=0, rope_theta=50_000.0),
            max_seq_len=131_072,
            rope_scaling=dict(
                **dict(rope_type="yarn", factor=32.0, original_max_position_embeddings=4096, beta_fast=1.0),
                **dict(beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0),
            ),
        ),
    },
    DeepseekV32: {
        "deepseek-v3.2": dict(
            **dict(THREE, d_model=7168, n_layers=61, n_heads=128, q_lora_rank=1536, d_ff=18_432),
            **dict(n_experts=256, d_expert=2048, n_groups=8, top_k_groups=4, n_mtp=0),
            **dict(index_n_heads=64, index_head_dim=128, index_top_k=2048),
        )
    },
}
