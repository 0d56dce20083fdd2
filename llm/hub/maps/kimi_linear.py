"""Kimi Linear as published: three short convolutions, and experts one by one under Mixtral's names."""

from typing import Any

from llm.hub.maps.common import ENDS, FFN, MIXER, OURS, PRE_NORM, THEIRS, fields, read_layer_types, write_layer_types
from llm.hub.tables import Operation, PretrainedError, Published, check_count, check_kind, join, require, same
from llm.models.case_studies.kimi_linear import KimiLinear

MINE, MIXERS, SPARSE = OURS + "mixer.", THEIRS + "self_attn.", THEIRS + "block_sparse_moe."
EXPERT = SPARSE + "experts.{expert}."
AXES = Operation(lambda theirs: [x.flatten() for x in theirs], lambda ours: [x[None, None, :, None] for x in ours])
NAMES = (
    *ENDS,
    *PRE_NORM,
    (MINE + "kv_a_proj.weight", MIXERS + "kv_a_proj_with_mqa.weight", same),
    (MINE + "kv_a_norm.weight", MIXERS + "kv_a_layernorm.weight", same),
    (MINE + "q_a_norm.weight", MIXERS + "q_a_layernorm.weight", same),
    (MINE + "conv.weight", tuple(f"{MIXERS}{name}_conv1d.weight" for name in "qkv"), join(3)),
    (MINE + "beta_proj.weight", MIXERS + "b_proj.weight", same),
    (MINE + "decay_a_proj.weight", MIXERS + "f_a_proj.weight", same),
    (MINE + "decay_b_proj.weight", MIXERS + "f_b_proj.weight", same),
    (MINE + "decay.A_log", MIXERS + "A_log", AXES),
    (MINE + "decay.dt_bias", MIXERS + "dt_bias", same),
    (MINE + "gate_a_proj.weight", MIXERS + "g_a_proj.weight", same),
    (MINE + "gate_b_proj.weight", MIXERS + "g_b_proj.weight", same),
    MIXER,
    (OURS + "ffn.router.weight", SPARSE + "gate.weight", same),
    (OURS + "ffn.router.expert_bias", SPARSE + "gate.e_score_correction_bias", same),
    (OURS + "ffn.experts.gate_up_proj[{expert}]", (EXPERT + "w1.weight", EXPERT + "w3.weight"), join(2)),
    (OURS + "ffn.experts.down_proj[{expert}]", EXPERT + "w2.weight", same),
    (OURS + "ffn.shared.*", SPARSE + "shared_experts.*", same),
    FFN,
    (OURS + "ffn.*", SPARSE + "*", same),  # a dense layer, as transformers saves it
)


def read(left: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """The sizes of Kimi Delta Attention stand in `linear_attn_config`, or beside the others."""
    require("num_key_value_heads", left.pop("num_key_value_heads", None), (ours["n_heads"], None))
    linear = left.pop("linear_attn_config", None)
    check_kind("linear_attn_config", linear, dict, nullable=True)
    linear = dict(linear or {})
    sizes = {"head_dim": "linear_head_dim", "num_heads": "n_linear_heads", "short_conv_kernel_size": "d_conv"}
    for name in sizes.keys() & linear.keys():
        check_count(f"{name} in linear_attn_config", linear[name])
    found = {mine: linear.pop(name) for name, mine in sizes.items() if name in linear}
    return found | read_mixers(left, ours, linear) | read_dense_layers(left, ours)


def read_mixers(left: dict[str, Any], ours: dict[str, Any], linear: dict[str, Any]) -> dict[str, Any]:
    """`layer_types`, or `full_attn_layers` and `kda_layers`, which count from 1. Without either, transformers takes
    attention for the layers 4, 8 .., counted from 0."""
    layers = range(ours["n_layers"])
    full, others = linear.pop("full_attn_layers", None), linear.pop("kda_layers", None)
    if any(linear.values()):
        raise PretrainedError(f"config.json sets {linear} in linear_attn_config, which this code does not know")
    if left.get("layer_types") is not None:
        return read_layer_types(left, ours)
    left.pop("layer_types", None)
    if full is None or others is None:
        full, others = [layer + 1 for layer in layers if layer and layer % 4 == 0], None
    check_kind("full_attn_layers", full, list)
    if others is not None and sorted(map(str, [*full, *others])) != sorted(str(layer + 1) for layer in layers):
        raise PretrainedError(f"full_attn_layers = {full} and kda_layers = {others} do not name each layer once")
    return {"layer_types": tuple("full_attention" if i + 1 in full else "linear_attention" for i in layers)}


def read_dense_layers(left: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """Dense layers come first: `first_k_dense_replace` of them, or as `mlp_layer_types` says."""
    n_dense, kinds = left.pop("first_k_dense_replace", 1), left.pop("mlp_layer_types", None)
    check_kind("first_k_dense_replace", n_dense)
    if kinds is not None:
        check_kind("mlp_layer_types", kinds, list)
        n_dense = kinds.count("dense")
        if kinds != ["dense"] * n_dense + ["sparse"] * (ours["n_layers"] - n_dense):
            raise PretrainedError(f"config.json sets mlp_layer_types = {kinds}: this model knows dense layers first")
    return {"n_dense_layers": n_dense}


def write(config: KimiLinear.Config) -> dict[str, Any]:
    if config.tie_embeddings:
        raise PretrainedError(
            "tie_embeddings = True: transformers has no Kimi Linear with a tied head; only models trained without "
            "--model.tie-embeddings can be exported"
        )
    n_dense = min(config.n_dense_layers, config.n_layers)
    kinds = ["dense"] * n_dense + ["sparse"] * (config.n_layers - n_dense)
    heads = {"num_key_value_heads": config.n_heads, "mlp_layer_types": kinds}
    return write_layer_types(config) | heads


PUBLISHED = {
    KimiLinear: Published(
        model_type="kimi_linear",
        architecture="KimiLinearForCausalLM",
        names=NAMES,
        fields=fields(
            {
                **dict(max_seq_len="model_max_length", normalize_weights="moe_renormalize", n_experts="num_experts"),
                **dict(n_groups="num_expert_group", top_k="num_experts_per_token", n_linear_heads="linear_num_heads"),
                **dict(n_shared_experts="num_shared_experts", linear_head_dim="linear_head_dim"),
                **dict(d_conv="linear_conv_kernel_dim"),
            },
            **dict(vocab_size=163_840, max_seq_len=1_048_576, d_model=2304, n_layers=27, n_heads=32, d_ff=9216),
            **dict(q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128),
            **dict(d_expert=1024, n_experts=256, top_k=8, n_shared_experts=1, n_groups=1, top_k_groups=1),
            **dict(normalize_weights=True, routed_scaling_factor=2.446, norm_eps=1e-5, tie_embeddings=False),
            **dict(linear_head_dim=128, n_linear_heads=32, d_conv=4),
        ),
        required={
            **dict(hidden_act=("silu",), attention_bias=(False,), mla_use_nope=(True,), moe_layer_freq=(1,)),
            "moe_router_activation_func": ("sigmoid",),
        },
        # what a rotation would need; a width that is none; how groups are chosen, of which there is one
        ignored=frozenset({"rope_theta", "head_dim", "qk_head_dim", "use_grouped_topk"}),
        read=read,
        write=write,
    )
}
SIZES = {
    KimiLinear: {
        "kimi-linear-48b-a3b": dict(
            **dict(vocab_size=163_840, max_seq_len=1_048_576, d_model=2304, n_layers=27, n_heads=32, d_ff=9216),
            **dict(kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, d_expert=1024),
            **dict(n_experts=256, top_k=8, n_linear_heads=32, linear_head_dim=128),
            layer_types=(("linear_attention",) * 3 + ("full_attention",)) * 6
            + ("linear_attention", "linear_attention", "full_attention"),
        )
    }
}
