"""Qwen3-MoE: many narrow experts, of which a token uses eight, under Qwen3's attention with a norm on each head.

Qwen3 Technical Report (Qwen Team, May 2025, arXiv 2505.09388): 30B-A3B and 235B-A22B have 128 experts a layer, each
3/8 as wide as the residual stream: fine-grained, after DeepSeekMoE, but none is shared. A loss over the whole
batch, not over each text, balances them, so that experts may specialise. Attention is Qwen3's: grouped heads 128 wide
whatever d_model / n_heads is, queries and keys normalised head by head before RoPE. Checkpoints of this format may also
weigh experts without making the weights sum to 1, and have dense layers between.
Blog: Case studies, Qwen; FFN and MoE.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import nn

from llm.config import check_positive
from llm.models.case_study import CaseStudyConfig
from llm.models.transformer import Transformer
from llm.modules.attention.multi_head import MultiHeadAttention
from llm.modules.blocks import Block
from llm.modules.ffn.glu import SwiGLU
from llm.modules.ffn.moe import GatedExperts, MoE
from llm.modules.ffn.router import SoftmaxRouter, check_routing
from llm.modules.norms import RMSNorm
from llm.modules.position_encoding.rope import RoPE
from llm.modules.position_encoding.rope_settings import make_scaling, read_rope, write_rope
from llm.name_table import Published, check_count, check_kind, join, same


@dataclass(frozen=True)
class Qwen3MoEConfig(CaseStudyConfig):
    """39.5 M parameters by default, 17.7 M of them active in a token; `sizes` has the published ones."""

    head_dim: int | None = 64
    """Width of a head; where it is not given, d_model / n_heads."""
    d_ff: int = 1184
    """Width of the dense layers, if there are any."""
    d_expert: int = 296
    """Width of an expert."""
    n_experts: int = 16
    """Experts in each layer among which the router chooses."""
    top_k: int = 4
    """Experts that each token goes to."""
    normalize_weights: bool = True
    """Scale the weights of the chosen experts to sum to 1 (norm_topk_prob)."""
    dense_layers: tuple[int, ...] = ()
    """Layers, counted from 0, that have one dense feed-forward layer instead of experts."""
    aux_loss_coef: float = 0.01
    """Weight of the loss that balances the load of the experts."""

    small: ClassVar[dict[str, Any]] = {**CaseStudyConfig.small, "head_dim": 64, "d_ff": 288, "d_expert": 72}

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "d_expert")
        check_routing(self.n_experts, self.top_k)
        object.__setattr__(self, "dense_layers", tuple(self.dense_layers))  # JSON knows lists only
        outside = [layer for layer in self.dense_layers if not 0 <= layer < self.n_layers]
        if outside:
            raise ValueError(
                f"dense_layers names {outside}, but layers are 0 to {self.n_layers - 1} (--model.dense-layers)"
            )


base = dict(vocab_size=151_936, max_seq_len=40_960, rope_theta=1e6, norm_eps=1e-6, tie_embeddings=False)
qwen3 = dict(base, n_kv_heads=4, head_dim=128, n_experts=128, top_k=8)
sizes = {
    "qwen3-30b-a3b": dict(qwen3, d_model=2048, n_layers=48, n_heads=32, d_ff=6144, d_expert=768),
    "qwen3-235b-a22b": dict(qwen3, d_model=4096, n_layers=94, n_heads=64, d_ff=12_288, d_expert=1536),
}
sizes = {name: Qwen3MoEConfig(**size) for name, size in sizes.items()}

GATE_UP, DOWN = "blocks.{layer}.ffn.experts.gate_up_proj", "blocks.{layer}.ffn.experts.down_proj"
MLP = "model.layers.{layer}.mlp."
EXPERT = MLP + "experts.{expert}."
NAMES = (
    ("tok_embed.weight", "model.embed_tokens.weight", same),
    ("norm.weight", "model.norm.weight", same),
    ("lm_head.weight", "lm_head.weight", same),
    ("blocks.{layer}.mixer_norm.weight", "model.layers.{layer}.input_layernorm.weight", same),
    ("blocks.{layer}.ffn_norm.weight", "model.layers.{layer}.post_attention_layernorm.weight", same),
    ("blocks.{layer}.mixer.*", "model.layers.{layer}.self_attn.*", same),  # with q_norm and k_norm
    ("blocks.{layer}.ffn.router.weight", MLP + "gate.weight", same),
    (GATE_UP + "[{expert}]", (EXPERT + "gate_proj.weight", EXPERT + "up_proj.weight"), join(2)),
    (DOWN + "[{expert}]", EXPERT + "down_proj.weight", same),
    ("blocks.{layer}.ffn.*", MLP + "*", same),  # a dense layer's, or experts as transformers 5 holds them in memory
)
FIELDS = (
    ("vocab_size", "vocab_size", 151_936),
    ("max_seq_len", "max_position_embeddings", 32_768),
    ("d_model", "hidden_size", 2048),
    ("n_layers", "num_hidden_layers", 24),
    ("n_heads", "num_attention_heads", 32),
    ("n_kv_heads", "num_key_value_heads", 4),
    ("head_dim", "head_dim", None),
    ("d_ff", "intermediate_size", 6144),
    ("d_expert", "moe_intermediate_size", 768),
    ("n_experts", "num_experts", 128),
    ("top_k", "num_experts_per_tok", 8),
    ("normalize_weights", "norm_topk_prob", False),
    ("norm_eps", "rms_norm_eps", 1e-6),
    ("tie_embeddings", "tie_word_embeddings", False),
)


def read(left: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """Experts stand in the layers whose number, counted from 1, is a multiple of `decoder_sparse_step`, those in
    `mlp_only_layers` (counted from 0) excepted; transformers 5 writes the number of experts under a name of its own."""
    step, dense = left.pop("decoder_sparse_step", 1), left.pop("mlp_only_layers", None) or []
    n_experts = left.pop("num_local_experts", ours["n_experts"])
    check_count("decoder_sparse_step", step)
    check_kind("mlp_only_layers", dense, list)
    check_count("num_local_experts", n_experts)
    sparse = [layer for layer in range(ours["n_layers"]) if layer not in dense and (layer + 1) % step == 0]
    dense_layers = tuple(layer for layer in range(ours["n_layers"]) if layer not in sparse)
    return {"n_experts": n_experts, "dense_layers": dense_layers, **read_rope(left, ours)}


def write(config: Qwen3MoEConfig) -> dict[str, Any]:
    dense = {"decoder_sparse_step": 1, "mlp_only_layers": list(config.dense_layers)}
    return {**write_rope(config), **dense, "head_dim": config.head_width}


class Qwen3MoE(Transformer):
    published = Published(
        model_type="qwen3_moe",
        architecture="Qwen3MoeForCausalLM",
        names=NAMES,
        fields=FIELDS,
        required={
            "hidden_act": ("silu",),
            "attention_bias": (False,),
            "use_qk_norm": (True,),
            "use_sliding_window": (False,),
        },
        ignored=frozenset({"sliding_window", "max_window_layers"}),  # no window is in use
        read=read,
        write=write,
    )

    def make_block(self, layer: int) -> Block:
        c = self.config
        attention = MultiHeadAttention(
            d_model=c.d_model,
            n_heads=c.n_heads,
            n_kv_heads=c.n_kv_heads,
            head_dim=c.head_width,
            qk_norm=partial(RMSNorm, eps=c.norm_eps),
            rope=RoPE(c.head_width, c.rope_theta, scaling=make_scaling(c.rope_scaling)),
        )
        return Block(attention, SwiGLU(c.d_model, c.d_ff) if layer in c.dense_layers else self.moe(), self.make_norm)

    def moe(self) -> nn.Module:
        c = self.config
        router = SoftmaxRouter(
            c.d_model, c.n_experts, c.top_k, normalize=c.normalize_weights, aux_loss_coef=c.aux_loss_coef
        )
        return MoE(router, GatedExperts(c.d_model, c.d_expert, c.n_experts))
