"""How llama.cpp stores each architecture: the names of tensors and sizes, and what it changes in the numbers.

A file of `qwen2` holds `blk.3.attn_q.weight`, which the hub calls `model.layers.3.self_attn.q_proj.weight`, and a field
`qwen2.embedding_length`, which config.json calls `hidden_size`. A name on the hub may have two placeholders:

    {layer}     the number of the block
    {expert}    the tensor holds all experts, stacked along its first axis; each is one of these

`changes` undo what llama.cpp's converter does to the numbers, for the tensors that their key names.
Source: llama.cpp's convert_hf_to_gguf.py, and the tensor names of its package `gguf`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

Change = Callable[[Tensor, Mapping[str, Any]], Tensor]
"""(a tensor as it is stored, the fields of config.json) -> the tensor as it is on the hub."""


@dataclass(frozen=True)
class Layout:
    """How one architecture is stored."""

    model_type: str
    """The model_type of config.json."""
    names: Mapping[str, str]
    """The name in the file without `blk.N.` and the kind (`.weight`, `.bias`) -> the name on the hub without the kind.
    A key with the kind stands for a tensor whose name on the hub has no kind."""
    sizes: Mapping[str, str]
    """Fields of the file -> fields of config.json."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Fields of config.json that the architecture implies."""
    changes: Mapping[str, Change] = field(default_factory=dict)


def turn(heads: str) -> Change:
    """Rows of queries or keys, whose number of heads is the field `heads` of config.json, in the hub's order: llama.cpp
    rotates neighbouring channels of a head, the hub a channel of the first half with one of the second."""

    def change(x: Tensor, config: Mapping[str, Any]) -> Tensor:
        return x.unflatten(0, (config[heads], -1, 2)).transpose(1, 2).flatten(0, 2)

    return change


def minus_one(x: Tensor, config: Mapping[str, Any]) -> Tensor:
    """A gain, which Gemma stores as its difference to 1."""
    return x - 1


def transposed(x: Tensor, config: Mapping[str, Any]) -> Tensor:
    """A matrix (out, in), which GPT-2 has as (in, out)."""
    return x.mT


def with_channel(x: Tensor, config: Mapping[str, Any]) -> Tensor:
    """The filters (D, width) of a convolution by channel -> (D, 1, width)."""
    return x.view(len(x), 1, -1)


def as_row(x: Tensor, config: Mapping[str, Any]) -> Tensor:
    """A vector (D,) -> a matrix (1, D)."""
    return x.view(1, -1)


def log_of_negative(x: Tensor, config: Mapping[str, Any]) -> Tensor:
    """Mamba's A < 0 -> the logarithm of -A, which is its parameter."""
    return (-x).log()


SIZES = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "embedding_length": "hidden_size",
    "rope.freq_base": "rope_theta",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
FEW_EXPERTS = {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"}
WITH_EXPERTS = SIZES | {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
WINDOWED = SIZES | {"attention.sliding_window": "sliding_window"}
NEAR_BASE = {"rope.freq_base_swa": "rope_local_base_freq"}
CAPPED = (
    WINDOWED
    | NEAR_BASE
    | {
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
    }
)


def in_blocks(prefix: str = "model.layers.{layer}.", **names: str) -> dict[str, str]:
    return {part: prefix + name for part, name in names.items()}


ENDS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
ATTENTION = in_blocks(
    **{f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"},
    **{f"attn_{x}_norm": f"self_attn.{x}_norm" for x in "qk"},
    attn_output="self_attn.o_proj",
    attn_norm="input_layernorm",
    ffn_norm="post_attention_layernorm",
)
FEED_FORWARD = in_blocks(**{f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")})
DECODER = ENDS | ATTENTION | FEED_FORWARD
AFTER = in_blocks(post_attention_norm="post_attention_layernorm", post_ffw_norm="post_feedforward_layernorm")
SANDWICH = DECODER | AFTER | in_blocks(ffn_norm="pre_feedforward_layernorm")
EXPERTS = in_blocks(
    ffn_gate_inp="mlp.gate",
    **{f"ffn_{x}_exps": f"mlp.experts.{{expert}}.{x}_proj" for x in ("gate", "up", "down")},
)
SHARED = in_blocks(
    ffn_gate_inp_shexp="mlp.shared_expert_gate",
    **{f"ffn_{x}_shexp": f"mlp.shared_expert.{x}_proj" for x in ("gate", "up", "down")},
)
MIXTRAL_EXPERTS = in_blocks(
    ffn_gate_inp="block_sparse_moe.gate",
    ffn_gate_exps="block_sparse_moe.experts.{expert}.w1",
    ffn_down_exps="block_sparse_moe.experts.{expert}.w2",
    ffn_up_exps="block_sparse_moe.experts.{expert}.w3",
)
PHI = ENDS | in_blocks(
    attn_norm="input_layernorm",
    ffn_norm="post_attention_layernorm",
    attn_qkv="self_attn.qkv_proj",
    attn_output="self_attn.o_proj",
    ffn_up="mlp.gate_up_proj",
    ffn_down="mlp.down_proj",
)
GPT_OSS = ENDS | ATTENTION | EXPERTS | in_blocks(ffn_gate_inp="mlp.router", **{"attn_sinks.weight": "self_attn.sinks"})
GPT_OSS |= in_blocks(post_attention_norm="post_attention_layernorm")
GPT2 = {"token_embd": "wte", "position_embd": "wpe", "output_norm": "ln_f", "output": "lm_head"} | in_blocks(
    "h.{layer}.",
    attn_norm="ln_1",
    ffn_norm="ln_2",
    attn_qkv="attn.c_attn",
    attn_output="attn.c_proj",
    ffn_up="mlp.c_fc",
    ffn_down="mlp.c_proj",
)
LFM = ENDS | ATTENTION | {"token_embd_norm": "model.embedding_norm"}
LFM |= in_blocks(
    attn_norm="operator_norm",
    ffn_norm="ffn_norm",
    attn_q_norm="self_attn.q_layernorm",
    attn_k_norm="self_attn.k_layernorm",
    attn_output="self_attn.out_proj",
    ffn_gate="feed_forward.w1",
    ffn_down="feed_forward.w2",
    ffn_up="feed_forward.w3",
    **{f"shortconv.{x}": f"conv.{x}" for x in ("conv", "in_proj", "out_proj")},
)
MAMBA = {"token_embd": "backbone.embeddings", "output_norm": "backbone.norm_f", "output": "lm_head"} | in_blocks(
    "backbone.layers.{layer}.",
    attn_norm="norm",
    ssm_in="mixer.in_proj",
    ssm_conv1d="mixer.conv1d",
    ssm_x="mixer.x_proj",
    ssm_dt="mixer.dt_proj",
    ssm_a="mixer.A_log",
    ssm_d="mixer.D",
    ssm_out="mixer.out_proj",
)

TURNED = {"attn_q": turn("num_attention_heads"), "attn_k": turn("num_key_value_heads")}
GAINS = {name: minus_one for name in (*AFTER, "attn_norm", "ffn_norm", "attn_q_norm", "attn_k_norm", "output_norm")}
LAYOUTS = {
    "llama": Layout("llama", DECODER, SIZES, changes=TURNED),
    "smollm3": Layout("smollm3", DECODER, SIZES, changes=TURNED),
    "qwen2": Layout("qwen2", DECODER, SIZES),
    "qwen3": Layout("qwen3", DECODER, SIZES),
    "qwen2moe": Layout(
        "qwen2_moe",
        ENDS | ATTENTION | EXPERTS | SHARED,
        WITH_EXPERTS,
        changes={"ffn_gate_inp_shexp": as_row},
    ),
    "qwen3moe": Layout("qwen3_moe", ENDS | ATTENTION | EXPERTS, WITH_EXPERTS, fixed={"norm_topk_prob": True}),
    "gemma": Layout("gemma", DECODER, SIZES, changes=GAINS),
    "gemma2": Layout("gemma2", SANDWICH, CAPPED, changes=GAINS),
    "gemma3": Layout("gemma3_text", SANDWICH, CAPPED, changes=GAINS),
    "olmo2": Layout("olmo2", DECODER | AFTER, WINDOWED | NEAR_BASE),
    "phi3": Layout("phi3", PHI, WINDOWED),
    "gpt-oss": Layout("gpt_oss", GPT_OSS, WINDOWED | FEW_EXPERTS | {"expert_feed_forward_length": "intermediate_size"}),
    "gpt2": Layout(
        "gpt2",
        GPT2,
        {
            "context_length": "n_positions",
            "block_count": "n_layer",
            "embedding_length": "n_embd",
            "feed_forward_length": "n_inner",
            "attention.head_count": "n_head",
            "attention.layer_norm_epsilon": "layer_norm_epsilon",
        },
        changes={f"{name}.weight": transposed for name in ("attn_qkv", "attn_output", "ffn_up", "ffn_down")},
    ),
    "lfm2": Layout(
        "lfm2",
        LFM,
        SIZES | {"attention.layer_norm_rms_epsilon": "norm_eps", "shortconv.l_cache": "conv_L_cache"},
        fixed={"block_auto_adjust_ff_dim": False},
        changes={"shortconv.conv": with_channel},
    ),
    "mamba": Layout(
        "mamba",
        MAMBA,
        {
            "context_length": "max_position_embeddings",
            "block_count": "num_hidden_layers",
            "embedding_length": "hidden_size",
            "attention.layer_norm_rms_epsilon": "layer_norm_epsilon",
            "ssm.conv_kernel": "conv_kernel",
            "ssm.inner_size": "intermediate_size",
            "ssm.state_size": "state_size",
            "ssm.time_step_rank": "time_step_rank",
        },
        changes={"ssm_conv1d.weight": with_channel, "ssm_a": log_of_negative},
    ),
}
MIXTRAL = Layout(
    "mixtral",
    ENDS | ATTENTION | MIXTRAL_EXPERTS,
    SIZES | FEW_EXPERTS,
    changes=TURNED,
)
"""A file of `llama` with experts."""
