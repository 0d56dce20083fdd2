"""MiniMax-01: seven layers of Lightning attention to one of softmax attention, under a weighted post-norm.

    y = norm(x)        y = norm(alpha y + beta mixer(y))        x = alpha y + beta ffn(y)

MiniMax-01: Scaling Foundation Models with Lightning Attention (January 2025, arXiv 2501.08313) was the first hybrid of
linear attention at this scale: 456 B parameters, 46 B of them active, and texts of up to 4 M tokens. Lightning
attention forgets at a rate fixed by head and layer. Its softmax layers have grouped heads, and RoPE turns half of each
head. The stream is normalised before it is added to, so it keeps its size; alpha = (2 n_layers)^(1/4) after DeepNorm
(arXiv 2203.00555) keeps the deep layers trainable. A token goes to 2 of 32 experts. Blog: Case studies; Linear
attention.
Gallery: docs/gallery/index.html#minimax
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from llm.config import check_layer_types, check_positive
from llm.models.case_studies.config import CaseStudyConfig, check_share, grouped_heads
from llm.models.transformer import Transformer
from llm.modules.attention.multi_head import MultiHeadAttention
from llm.modules.blocks import Block
from llm.modules.ffn.moe import GatedExperts, MoE
from llm.modules.ffn.router import SoftmaxRouter, check_routing
from llm.modules.masks import Window, causal
from llm.modules.recurrent.retention import LightningAttention

LayerType = Literal["linear_attention", "full_attention"]


class WeightedPostNormBlock(Block):
    """Normalise the stream, then add to it: alpha norm(x) + beta f(norm(x)), with a pair (alpha, beta) for the mixer
    and one for the feed-forward layer."""

    title = "Weighted post-norm"

    def __init__(
        self,
        mixer: nn.Module,
        ffn: nn.Module,
        norm: Callable[[], nn.Module],
        mixer_weights: tuple[float, float],
        ffn_weights: tuple[float, float],
    ):
        super().__init__(mixer, ffn, norm)
        self.mixer_weights, self.ffn_weights = mixer_weights, ffn_weights

    def forward(self, x: Tensor, positions: Tensor, cache: dict | None = None) -> Tensor:
        x, (alpha, beta) = self.mixer_norm(x), self.mixer_weights
        x = alpha * x + beta * self.mixer(x, positions, cache)
        x, (alpha, beta) = self.ffn_norm(x), self.ffn_weights
        return alpha * x + beta * self.ffn(x)


class MiniMax(Transformer):
    @dataclass(frozen=True)
    class Config(CaseStudyConfig):
        """49.1 M parameters by default, 14.7 M of them active in a token."""

        n_heads: int = 8
        """Heads of Lightning attention, and query heads of softmax attention."""
        n_kv_heads: int = 2
        """Key and value heads of softmax attention; must divide n_heads."""
        head_dim: int | None = 64
        """Width of a head; where it is not given, d_model / n_heads."""
        partial_rotary_factor: float = 0.5
        """The share of each head of softmax attention that RoPE turns."""
        layer_types: tuple[LayerType, ...] = ("linear_attention",) * 3 + ("full_attention",)
        """The mixers of the layers, in turn: Lightning or softmax attention; published 7 to 1."""
        window_size: int | None = None
        """Tokens that a token sees in softmax attention, itself among them; None: all."""
        d_ff: int = 400
        """Width of each expert."""
        n_experts: int = 16
        """Experts in each layer among which the router chooses."""
        top_k: int = 2
        """Experts that each token goes to."""
        linear_attention_alpha: float = 1.68
        """Weight of the stream at Lightning attention; (2 n_layers)^(1/4) as published."""
        linear_attention_beta: float = 1.0
        """Weight of its output."""
        full_attention_alpha: float = 1.68
        """Weight of the stream at softmax attention."""
        full_attention_beta: float = 1.0
        """Weight of its output."""
        ffn_alpha: float = 1.68
        """Weight of the stream at the experts."""
        ffn_beta: float = 1.0
        """Weight of their output."""
        aux_loss_coef: float = 0.01
        """Weight of the loss that balances the load of the experts."""

        small: ClassVar[dict[str, Any]] = {
            **CaseStudyConfig.small,
            **dict(layer_types=("linear_attention", "full_attention"), head_dim=32, d_ff=104),
        }

        def __post_init__(self):
            super().__post_init__()
            check_share(self, "partial_rotary_factor")
            check_layer_types(self, LayerType.__args__)
            check_positive(self, "window_size")
            check_routing(self.n_experts, self.top_k)

        def layer_type(self, layer: int) -> LayerType:
            return self.layer_types[layer % len(self.layer_types)]

    def make_block(self, layer: int) -> Block:
        c = self.config
        kind = c.layer_type(layer)
        weights = (getattr(c, f"{kind}_alpha"), getattr(c, f"{kind}_beta")), (c.ffn_alpha, c.ffn_beta)
        router = SoftmaxRouter(c.d_model, c.n_experts, c.top_k, aux_loss_coef=c.aux_loss_coef)
        experts = MoE(router, GatedExperts(c.d_model, c.d_ff, c.n_experts))
        return WeightedPostNormBlock(self.make_mixer(layer), experts, self.make_norm, *weights)

    def make_mixer(self, layer: int) -> nn.Module:
        c = self.config
        if c.layer_type(layer) == "full_attention":
            mask = causal if c.window_size is None else Window(c.window_size)
            return MultiHeadAttention(**grouped_heads(c, c.partial_rotary_factor), mask=mask)
        depth = layer / (c.n_layers - 1 + 1e-5)  # defined for a single layer, too
        heads = dict(n_heads=c.n_heads, head_dim=c.head_width)
        return LightningAttention(d_model=c.d_model, **heads, depth=depth, norm_eps=1e-6)  # whatever c.norm_eps is
