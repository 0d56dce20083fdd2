"""Granite 4: nine layers of Mamba-2 to one of attention, without positions; experts beside a shared layer; multipliers.

    x = 12 E[token]        x = x + r mixer(norm(x))        x = x + r (experts(norm(x)) + shared(norm(x)))
    logits = norm(x) E^T / s        attention: softmax(a q k^T)

Granite 4.0 (IBM, October 2025; no paper) comes in 32 B with 9 B active, 7 B with 1 B active, and dense in 3 B and less.
Attention has no RoPE: the state of Mamba-2 knows the order of the tokens. A dense variant of 3 B has attention with
RoPE in all layers. The constants let one learning rate suit models of all sizes (Tensor Programs V, arXiv 2203.03466):
in each published model a = 1 / head_dim in place of 1 / sqrt(head_dim), s = d_model / 256, and r is about
1.4 / sqrt(n_layers). The router takes the k largest logits and a softmax over these, as Mixtral's.
Blog: Case studies; State-space models, hybrids.
Gallery: docs/gallery/index.html#granitemoehybrid
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from llm.config import check_divides, check_layer_types, check_not_negative, check_positive
from llm.models.case_studies.config import CaseStudyConfig, grouped_heads
from llm.models.transformer import Transformer
from llm.modules.attention.multi_head import MultiHeadAttention
from llm.modules.blocks import ScaledBlock
from llm.modules.ffn.glu import SwiGLU
from llm.modules.ffn.moe import GatedExperts, MoE
from llm.modules.ffn.router import SoftmaxRouter, check_routing
from llm.modules.recurrent.mamba2 import Mamba2

LayerType = Literal["mamba", "attention"]


class GraniteMoEHybrid(Transformer):
    @dataclass(frozen=True)
    class Config(CaseStudyConfig):
        """29.8 M parameters by default, 17.1 M of them active in a token."""

        d_ff: int = 344
        """Width of the layer that every token goes through."""
        layer_types: tuple[LayerType, ...] = ("mamba", "mamba", "mamba", "attention")
        """The mixer of each block; a pattern shorter than n_layers is repeated."""
        use_rope: bool = False
        """Whether attention layers turn queries and keys by their positions."""
        attention_bias: bool = False
        """Biases in attention, in checkpoints that have them."""
        n_mamba_heads: int = 16
        """Heads of Mamba-2."""
        mamba_head_dim: int = 64
        """Channels of such a head."""
        d_state: int = 64
        """Width of Mamba-2's keys (B) and queries (C)."""
        n_state_groups: int = 1
        """Pairs of B and C, shared by the heads of a group."""
        d_conv: int = 4
        """Tokens that Mamba-2's convolution sees, the current one among them."""
        conv_bias: bool = True
        """A bias in that convolution."""
        n_experts: int = 8
        """Experts in each layer beside the layer that every token goes through; 0: none."""
        top_k: int = 2
        """Experts that each token goes to."""
        d_expert: int = 344
        """Width of an expert."""
        aux_loss_coef: float = 0.01
        """Weight of the loss that balances the load of the experts."""
        embedding_multiplier: float = 12.0
        """Factor of the embeddings."""
        attention_multiplier: float | None = None
        """Factor of the scores; 1 / head_dim where it is not given."""
        residual_multiplier: float = 0.7
        """Factor of what each layer adds to the stream."""
        logits_scaling: float = 2.0
        """Divisor of the logits."""

        small: ClassVar[dict[str, Any]] = {
            **CaseStudyConfig.small,
            **dict(d_ff=88, d_expert=88, layer_types=("mamba", "attention")),
            **dict(n_mamba_heads=8, mamba_head_dim=32, d_state=32, logits_scaling=0.5),
        }

        def __post_init__(self):
            super().__post_init__()
            check_layer_types(self, LayerType.__args__)
            check_positive(self, "n_mamba_heads", "mamba_head_dim", "d_state", "n_state_groups", "d_conv")
            check_divides(self, "n_state_groups", "n_mamba_heads")
            check_positive(self, "attention_multiplier", "logits_scaling")
            check_not_negative(self, "n_experts")
            if self.n_experts:
                check_routing(self.n_experts, self.top_k)
                check_positive(self, "d_expert")

        @property
        def attention_scale(self) -> float:
            return self.attention_multiplier or 1 / self.head_width

        def layer_type(self, layer: int) -> LayerType:
            return self.layer_types[layer % len(self.layer_types)]

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.config.embedding_multiplier * self.tok_embed(tokens)

    def make_block(self, layer: int) -> ScaledBlock:
        return ScaledBlock(self.make_mixer(layer), self.make_ffn(), self.make_norm, self.config.residual_multiplier)

    def make_mixer(self, layer: int) -> nn.Module:
        c = self.config
        if c.layer_type(layer) == "attention":
            options = grouped_heads(c) | ({} if c.use_rope else {"rope": None})
            biases = dict(qkv_bias=c.attention_bias, o_bias=c.attention_bias)
            return MultiHeadAttention(**options, **biases, scale=c.attention_scale)
        sizes = dict(n_heads=c.n_mamba_heads, head_dim=c.mamba_head_dim, d_state=c.d_state, n_groups=c.n_state_groups)
        convolution = dict(d_conv=c.d_conv, conv_bias=c.conv_bias)
        return Mamba2(d_model=c.d_model, **sizes, **convolution, norm_eps=c.norm_eps)

    def make_ffn(self) -> nn.Module:
        c = self.config
        shared = SwiGLU(c.d_model, c.d_ff)
        if not c.n_experts:
            return shared
        router = SoftmaxRouter(c.d_model, c.n_experts, c.top_k, aux_loss_coef=c.aux_loss_coef)
        return MoE(router, GatedExperts(c.d_model, c.d_expert, c.n_experts), shared)

    @property
    def has_plain_head(self) -> bool:
        return self.config.logits_scaling == 1

    def unembed(self, x: Tensor) -> Tensor:
        return super().unembed(x) / self.config.logits_scaling
