"""DeepSeek-V2 and V3: a small cache by latent attention, many parameters at little work by fine-grained experts.

DeepSeek-V2 (May 2024, arXiv 2405.04434) brought multi-head latent attention, which caches one short vector a token, and
put it beside the experts of DeepSeekMoE: many narrow ones, two that every token goes to, a dense first layer. On many
machines a token may use the experts of a few groups only, and losses keep the experts equally busy.
DeepSeek-V3 (December 2024, arXiv 2412.19437) balances by a bias that moves the choice and never a weight, scores each
expert by a sigmoid of its own, and learns to foresee more than one token; its weights were trained and are published in
FP8. DeepSeek-R1 is the same model trained further. Blog: Case studies, DeepSeek.

Both reach 128K tokens by YaRN, whose temperature DeepSeek moves from RoPE into the scale of the scores.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from llm.config import ModelConfig, check_positive
from llm.models.transformer import Transformer
from llm.modules.attention.latent import LatentAttention
from llm.modules.blocks import Block
from llm.modules.cross_entropy import linear_cross_entropy
from llm.modules.ffn.glu import SwiGLU
from llm.modules.ffn.moe import GatedExperts, MoE
from llm.modules.ffn.router import Router, SigmoidRouter, SoftmaxRouter, check_routing
from llm.modules.initialization import initialize
from llm.modules.multi_token_prediction import PredictionModule
from llm.modules.position_encoding.context_extension import yarn_mscale
from llm.modules.position_encoding.rope import RoPE
from llm.modules.position_encoding.rope_settings import Settings, make_scaling, read_rope, write_rope
from llm.name_table import Operation, PretrainedError, Published, check_count, check_kind, join, require, same


@dataclass(frozen=True)
class DeepseekConfig(ModelConfig):
    """What both have. By default 37 M parameters, of which a token uses 16 M; `sizes` has the published ones."""

    n_heads: int = 16
    """Attention heads."""
    kv_lora_rank: int = 128
    """Width of the latent that keys and values are rebuilt from: with the rotated slice, all that is cached."""
    q_lora_rank: int | None = 192
    """Width of a latent for queries, too, which saves memory in training; None: one full projection."""
    qk_nope_head_dim: int = 32
    """Width of a query and key head without position."""
    qk_rope_head_dim: int = 16
    """Width of its rotated slice, whose key is shared by all heads; must be even."""
    v_head_dim: int = 32
    """Width of a value head."""
    rope_theta: float = 10_000.0
    """Base of the rotation; raise it for longer contexts."""
    rope_scaling: Settings = field(default_factory=dict)
    """How longer contexts are reached: rope_type (yarn, linear, dynamic, llama3) and its settings. Empty: not."""
    n_dense_layers: int = 1
    """The first layers, which have one wide feed-forward layer instead of experts."""
    d_ff: int = 1376
    """Width of that layer."""
    n_experts: int = 16
    """Experts in each other layer among which the router chooses."""
    top_k: int = 3
    """Experts that each token goes to."""
    n_shared_experts: int = 1
    """Experts that every token goes through, too: computed as one, as wide as all of them."""
    d_expert: int = 344
    """Width of an expert."""
    n_groups: int = 4
    """Groups into which the experts are divided, in training on many machines one for each machine."""
    top_k_groups: int = 2
    """Groups whose experts a token may use."""

    small: ClassVar[dict[str, Any]] = {
        **ModelConfig.small,
        **dict(n_heads=4, kv_lora_rank=32, q_lora_rank=48, d_ff=352, d_expert=88),
    }

    def __post_init__(self):
        super().__post_init__()
        for name in ("n_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "rope_theta"):
            check_positive(self, name)
        for name in ("d_ff", "n_experts", "top_k", "n_shared_experts", "d_expert", "n_groups", "top_k_groups"):
            check_positive(self, name)
        if self.q_lora_rank is not None:
            check_positive(self, "q_lora_rank")
        if self.n_dense_layers < 0:
            raise ValueError(f"n_dense_layers = {self.n_dense_layers} must not be negative (--model.n-dense-layers)")
        if self.qk_rope_head_dim % 2:
            raise ValueError(
                f"qk_rope_head_dim = {self.qk_rope_head_dim} must be even: RoPE turns pairs (--model.qk-rope-head-dim)"
            )
        check_routing(self.n_experts, self.top_k, self.n_groups, self.top_k_groups)
        make_scaling(self.rope_scaling)

    @property
    def attention_scale(self) -> float:
        """1 / sqrt(width of a head), and with YaRN times mscale^2, since longer texts flatten the softmax."""
        scale = (self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5
        mscale = self.rope_scaling.get("mscale_all_dim")
        return scale * yarn_mscale(self.rope_scaling["factor"], mscale) ** 2 if mscale else scale


@dataclass(frozen=True)
class DeepseekV2Config(DeepseekConfig):
    """Weights are not scaled to sum to 1, so that they depend on how many experts there are; a factor answers that."""

    routed_scaling_factor: float = 4.0
    """Factor of the weights of the chosen experts."""
    aux_loss_coef: float = 0.01
    """Weight of the loss that balances the load of the experts."""


@dataclass(frozen=True)
class DeepseekV3Config(DeepseekConfig):
    """The prediction module adds 10 M parameters to those above, 3.4 M of them active, in training only."""

    routed_scaling_factor: float = 2.5
    """What the weights of the chosen experts sum to."""
    bias_update_speed: float = 0.001
    """How far the bias of an expert moves after each step, up where it had too little to do."""
    n_mtp: int = 1
    """How many tokens beyond the next one are predicted in training, by a module each; 0: none."""
    mtp_loss_coef: float = 0.3
    """Weight of the mean of their losses; V3 lowers it to 0.1 for the last third of its training."""

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.n_mtp < self.max_seq_len:
            raise ValueError(
                f"n_mtp = {self.n_mtp} must lie between 0 and max_seq_len - 1 = {self.max_seq_len - 1} (--model.n-mtp)"
            )
        if self.n_groups > 1 and self.n_experts // self.n_groups < 2:
            raise ValueError(
                f"n_groups = {self.n_groups} leaves 1 of n_experts = {self.n_experts} to a group, which is judged by "
                "its best two: choose fewer groups (--model.n-groups)"
            )


def deepseek_block(
    c: DeepseekConfig, layer: int, router: Callable[..., Router], norm: Callable[[], nn.Module]
) -> Block:
    """The block at depth `layer`; V2 and V3 differ in the router."""
    attention = LatentAttention(
        d_model=c.d_model,
        n_heads=c.n_heads,
        q_lora_rank=c.q_lora_rank,
        kv_lora_rank=c.kv_lora_rank,
        qk_nope_head_dim=c.qk_nope_head_dim,
        qk_rope_head_dim=c.qk_rope_head_dim,
        v_head_dim=c.v_head_dim,
        rope=RoPE(c.qk_rope_head_dim, c.rope_theta, interleaved=True, scaling=make_scaling(c.rope_scaling)),
        scale=c.attention_scale,
    )
    if layer < c.n_dense_layers:
        return Block(attention, SwiGLU(c.d_model, c.d_ff), norm)
    groups = dict(n_groups=c.n_groups, top_k_groups=c.top_k_groups)
    chosen = router(c.d_model, c.n_experts, c.top_k, scale=c.routed_scaling_factor, **groups)
    experts = GatedExperts(c.d_model, c.d_expert, c.n_experts)
    return Block(attention, MoE(chosen, experts, SwiGLU(c.d_model, c.n_shared_experts * c.d_expert)), norm)


ATTENTION, EXPERTS = "model.layers.{layer}.self_attn.", "model.layers.{layer}.mlp."
NAMES = (
    ("tok_embed.weight", "model.embed_tokens.weight", same),
    ("norm.weight", "model.norm.weight", same),
    ("lm_head.weight", "lm_head.weight", same),
    ("blocks.{layer}.mixer_norm.weight", "model.layers.{layer}.input_layernorm.weight", same),
    ("blocks.{layer}.ffn_norm.weight", "model.layers.{layer}.post_attention_layernorm.weight", same),
    ("blocks.{layer}.mixer.q_a_norm.weight", ATTENTION + "q_a_layernorm.weight", same),
    ("blocks.{layer}.mixer.kv_a_norm.weight", ATTENTION + "kv_a_layernorm.weight", same),
    ("blocks.{layer}.mixer.kv_a_proj.weight", ATTENTION + "kv_a_proj_with_mqa.weight", same),
    ("blocks.{layer}.mixer.*", ATTENTION + "*", same),  # q_proj or q_a_proj and q_b_proj, kv_b_proj, o_proj
    ("blocks.{layer}.ffn.router.weight", EXPERTS + "gate.weight", same),
    ("blocks.{layer}.ffn.router.expert_bias", EXPERTS + "gate.e_score_correction_bias", same),
    (
        "blocks.{layer}.ffn.experts.gate_up_proj[{expert}]",
        (EXPERTS + "experts.{expert}.gate_proj.weight", EXPERTS + "experts.{expert}.up_proj.weight"),
        join(2),
    ),
    ("blocks.{layer}.ffn.experts.down_proj[{expert}]", EXPERTS + "experts.{expert}.down_proj.weight", same),
    ("blocks.{layer}.ffn.experts.*", EXPERTS + "experts.*", same),  # stacked, as transformers 5 has them in memory
    ("blocks.{layer}.ffn.shared.*", EXPERTS + "shared_experts.*", same),
    ("blocks.{layer}.ffn.*", EXPERTS + "*", same),
)
dropped = Operation(lambda theirs: [], lambda ours: [])
FIELDS = (  # ours, theirs, and what transformers takes for V2 and for V3 where config.json leaves it out
    ("vocab_size", "vocab_size", 102_400, 129_280),
    ("max_seq_len", "max_position_embeddings", 2048, 4096),
    ("d_model", "hidden_size", 4096, 7168),
    ("n_layers", "num_hidden_layers", 32, 61),
    ("n_heads", "num_attention_heads", 32, 128),
    ("q_lora_rank", "q_lora_rank", 1536, 1536),
    ("kv_lora_rank", "kv_lora_rank", 512, 512),
    ("qk_nope_head_dim", "qk_nope_head_dim", 128, 128),
    ("qk_rope_head_dim", "qk_rope_head_dim", 64, 64),
    ("v_head_dim", "v_head_dim", 128, 128),
    ("n_dense_layers", "first_k_dense_replace", 0, 3),
    ("d_ff", "intermediate_size", 11_008, 18_432),
    ("n_experts", "n_routed_experts", 64, 256),
    ("top_k", "num_experts_per_tok", None, 8),
    ("n_shared_experts", "n_shared_experts", 2, 1),
    ("d_expert", "moe_intermediate_size", 1407, 2048),
    ("n_groups", "n_group", None, 8),
    ("top_k_groups", "topk_group", None, 4),
    ("routed_scaling_factor", "routed_scaling_factor", 1.0, 2.5),
    ("norm_eps", "rms_norm_eps", 1e-6, 1e-6),
    ("tie_embeddings", "tie_word_embeddings", False, False),
)
NULLABLE = frozenset({"q_lora_rank"})
REQUIRED = {"hidden_act": ("silu",), "attention_bias": (False,), "moe_layer_freq": (1,)}
# how experts were balanced and spread over machines; widths that transformers writes and does not read
IGNORED = frozenset({"aux_loss_alpha", "seq_aux", "ep_size", "head_dim", "qk_head_dim"})


def read_common(left: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """Every head has its own keys, which a config.json may say, too."""
    require("num_key_value_heads", left.pop("num_key_value_heads", None), (ours["n_heads"], None))
    return read_rope(left, ours)


def read_v2(left: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    check_count("num_experts_per_tok", ours["top_k"])  # transformers knows no default
    method = left.pop("topk_method", "greedy")
    require("topk_method", method, ("greedy", "group_limited_greedy"))
    if method == "greedy":
        return read_common(left, ours) | {"n_groups": 1, "top_k_groups": 1}
    if None in (ours["n_groups"], ours["top_k_groups"]):
        raise PretrainedError(f"config.json sets topk_method = {method!r}, but not both of n_group and topk_group")
    return read_common(left, ours)


def write_v2(config: DeepseekV2Config) -> dict[str, Any]:
    method = "greedy" if config.n_groups == 1 else "group_limited_greedy"
    return write_rope(config) | {"num_key_value_heads": config.n_heads, "topk_method": method}


def read_v3(left: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    for name in ("num_nextn_predict_layers", "num_mtp_layers"):  # transformers has two names for it, too
        check_kind(name, left.pop(name, None), nullable=True)
    return read_common(left, ours) | {"n_mtp": 0}


def write_v3(config: DeepseekV3Config) -> dict[str, Any]:
    return write_rope(config) | {"num_key_value_heads": config.n_heads, "num_nextn_predict_layers": 0}


def prediction_modules(config: Mapping[str, Any]) -> str:
    """What the tensors of V3's prediction modules are called: as if they were layers after the last one."""
    n_layers, n_modules = config.get("num_hidden_layers", 61), config.get("num_nextn_predict_layers", 1)
    return "|".join(rf"model\.layers\.{n_layers + k}\..*" for k in range(n_modules or 0))


class DeepseekV2(Transformer):
    published = Published(
        model_type="deepseek_v2",
        architecture="DeepseekV2ForCausalLM",
        names=NAMES,
        fields=tuple((ours, theirs, v2) for ours, theirs, v2, _ in FIELDS),
        required=REQUIRED | {"mlp_bias": (False,), "scoring_func": ("softmax",), "norm_topk_prob": (False,)},
        nullable=NULLABLE,
        heads_divide_width=True,
        ignored=IGNORED,
        read=read_v2,
        write=write_v2,
    )

    def make_block(self, layer: int) -> Block:
        router = partial(SoftmaxRouter, normalize=False, aux_loss_coef=self.config.aux_loss_coef)
        return deepseek_block(self.config, layer, router, self.make_norm)


class DeepseekV3(Transformer):
    """`mtp` holds the prediction modules. They are for training: generation does not use them, and neither loading nor
    export carries them over, as transformers keeps them out of the model, too."""

    published = Published(
        model_type="deepseek_v3",
        architecture="DeepseekV3ForCausalLM",
        names=(*NAMES, ("mtp.*", (), dropped)),
        fields=tuple((ours, theirs, v3) for ours, theirs, _, v3 in FIELDS),
        required=REQUIRED
        | {
            "scoring_func": ("sigmoid",),
            "topk_method": ("noaux_tc",),
            "norm_topk_prob": (True,),
            "rope_interleave": (True,),
        },
        nullable=NULLABLE,
        ignored=IGNORED,
        ignored_weights=prediction_modules,
        read=read_v3,
        write=write_v3,
    )

    training_only = ("mtp",)

    def __init__(self, config: DeepseekV3Config):
        super().__init__(config)
        blocks = (self.make_block(config.n_layers + k) for k in range(config.n_mtp))
        self.mtp = nn.ModuleList(PredictionModule(config.d_model, block, self.make_norm) for block in blocks)
        initialize(self.mtp, config.initialization, config.n_layers)

    def make_block(self, layer: int) -> Block:
        router = partial(SigmoidRouter, bias_update_speed=self.config.bias_update_speed)
        return deepseek_block(self.config, layer, router, self.make_norm)

    def loss(self, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """As in every model; in training `aux` has the mean loss of the prediction modules, times mtp_loss_coef."""
        if not (self.training and self.mtp):
            return super().loss(tokens)
        x = self.norm(self.hidden(tokens[:, :-1]))
        losses = [self.head_loss(x, tokens[:, 1:])]
        for k, module in enumerate(self.mtp, 1):
            x = module(x[:, :-1], self.tok_embed(tokens[:, k:-1]))  # (B, T - k, D)
            losses.append(self.head_loss(x, tokens[:, k + 1 :]))
        ce, *later = losses
        aux = sum(self.pop_aux_losses(), start=self.config.mtp_loss_coef * torch.stack(later).mean())
        return ce + aux, {"ce": ce.detach(), "aux": aux.detach()}

    def head_loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """Normed x (B, T, D) and targets (B, T) -> the mean cross-entropy in nats."""
        return linear_cross_entropy(x.flatten(0, 1), self.head_weight(), targets.flatten())


def extended(mscale: float) -> dict[str, Any]:
    """From 4,096 tokens to 163,840."""
    lengths = {"factor": 40.0, "original_max_position_embeddings": 4096}
    ramp = {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": mscale, "mscale_all_dim": mscale}
    return {"max_seq_len": 163_840, "rope_scaling": {"rope_type": "yarn", **lengths, **ramp}}


heads = dict(kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, tie_embeddings=False)
v2 = dict(heads, vocab_size=102_400, norm_eps=1e-6, n_dense_layers=1, n_shared_experts=2, top_k=6) | extended(0.707)
v3 = dict(heads, vocab_size=129_280, norm_eps=1e-6, n_dense_layers=3, n_shared_experts=1, top_k=8) | extended(1.0)
sizes = {
    "deepseek-v2-lite": dict(
        **dict(v2, d_model=2048, n_layers=27, n_heads=16, q_lora_rank=None, d_ff=10_944),
        **dict(n_experts=64, d_expert=1408, n_groups=1, top_k_groups=1, routed_scaling_factor=1.0),
    ),
    "deepseek-v2": dict(
        **dict(v2, d_model=5120, n_layers=60, n_heads=128, q_lora_rank=1536, d_ff=12_288),
        **dict(n_experts=160, d_expert=1536, n_groups=8, top_k_groups=3, routed_scaling_factor=16.0),
    ),
    "deepseek-v3": dict(
        **dict(v3, d_model=7168, n_layers=61, n_heads=128, q_lora_rank=1536, d_ff=18_432),
        **dict(n_experts=256, d_expert=2048, n_groups=8, top_k_groups=4, n_mtp=0),
    ),
}
sizes = {
    n: (DeepseekV2Config if n.startswith("deepseek-v2") else DeepseekV3Config)(**size) for n, size in sizes.items()
}
