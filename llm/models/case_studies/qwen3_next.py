"""Qwen3-Next: three layers of Gated DeltaNet to one of gated attention, over 512 narrow experts.

Qwen3-Next-80B-A3B (Qwen Team, September 2025; no paper) activates 3 B of 80 B parameters. Three of four layers keep a
state of fixed size (Gated Delta Networks, arXiv 2412.06464), so only every fourth layer has a cache, of two key heads.
Its attention has a norm on each query and key head, RoPE on a quarter of each head, of 256 channels, and a sigmoid gate
on every channel of the output (Gated Attention, arXiv 2505.06708), which does away with attention sinks. A token goes
to 10 experts and to a shared one with a gate of its own. All norms have a gain of 1 + w, but for that on the heads of
Gated DeltaNet. The prediction module of its training is left out here. Blog: Case studies, Qwen; Linear attention.
Gallery: docs/gallery/index.html#qwen3_next
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

from torch import nn

from llm.config import check_divides, check_layer_types, check_positive
from llm.models.case_studies.config import CaseStudyConfig, check_share, grouped_heads
from llm.models.case_studies.qwen3_moe import check_dense_layers
from llm.models.transformer import Transformer
from llm.modules.attention.gated import GatedAttention
from llm.modules.blocks import Block
from llm.modules.ffn.glu import SwiGLU
from llm.modules.ffn.moe import GatedExperts, GatedShared, MoE
from llm.modules.ffn.router import SoftmaxRouter, check_routing
from llm.modules.norms import ZeroCentredRMSNorm
from llm.modules.recurrent.delta import GatedDeltaNet

LayerType = Literal["linear_attention", "full_attention"]


@dataclass(frozen=True)
class GatedHybridConfig(CaseStudyConfig):
    """The sizes of the mixers that Qwen3-Next and Qwen3.5 have."""

    n_heads: int = 8
    """Query heads of the attention layers."""
    n_kv_heads: int = 2
    """Key and value heads of the attention layers; must divide n_heads."""
    head_dim: int | None = 64
    """Width of a head of the attention layers; where it is not given, d_model / n_heads."""
    partial_rotary_factor: float = 0.25
    """The share of each head that RoPE turns."""
    attention_bias: bool = False
    """Biases in attention, in checkpoints that have them."""
    layer_types: tuple[LayerType, ...] = ("linear_attention", "linear_attention", "linear_attention", "full_attention")
    """The mixers of the layers, in turn: Gated DeltaNet or gated attention."""
    n_linear_heads: int = 8
    """Value heads of Gated DeltaNet."""
    n_linear_k_heads: int = 4
    """Query and key heads of Gated DeltaNet; must divide n_linear_heads."""
    linear_head_dim: int = 64
    """Width of a query and key head of Gated DeltaNet."""
    linear_v_head_dim: int = 64
    """Width of a value head of Gated DeltaNet."""
    d_conv: int = 4
    """Tokens that the short convolution before the delta rule sees."""

    small: ClassVar[dict[str, Any]] = {
        **CaseStudyConfig.small,
        **dict(layer_types=("linear_attention", "full_attention"), head_dim=32, n_linear_heads=4, n_linear_k_heads=2),
        **dict(linear_head_dim=32, linear_v_head_dim=32),
    }

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "n_linear_heads", "n_linear_k_heads", "linear_head_dim", "linear_v_head_dim", "d_conv")
        check_divides(self, "n_linear_k_heads", "n_linear_heads")
        check_share(self, "partial_rotary_factor")
        check_layer_types(self, LayerType.__args__)

    def layer_type(self, layer: int) -> LayerType:
        return self.layer_types[layer % len(self.layer_types)]


class Qwen3Next(Transformer):
    @dataclass(frozen=True)
    class Config(GatedHybridConfig):
        """40.2 M parameters by default, 16.5 M of them active in a token."""

        d_ff: int = 1184
        """Width of the dense layers, if there are any."""
        d_expert: int = 296
        """Width of an expert."""
        d_shared: int = 296
        """Width of the expert that every token uses."""
        n_experts: int = 16
        """Experts in each layer among which the router chooses."""
        top_k: int = 3
        """Experts that each token goes to."""
        normalize_weights: bool = True
        """Scale the weights of the chosen experts to sum to 1 (norm_topk_prob)."""
        dense_layers: tuple[int, ...] = ()
        """Layers, counted from 0, that have one dense feed-forward layer instead of experts."""
        aux_loss_coef: float = 0.01
        """Weight of the loss that balances the load of the experts."""

        small: ClassVar[dict[str, Any]] = {**GatedHybridConfig.small, "d_ff": 288, "d_expert": 72, "d_shared": 72}

        def __post_init__(self):
            super().__post_init__()
            check_positive(self, "d_expert", "d_shared")
            check_routing(self.n_experts, self.top_k)
            check_dense_layers(self)

    def make_norm(self) -> nn.Module:
        return ZeroCentredRMSNorm(self.config.d_model, self.config.norm_eps)

    def make_block(self, layer: int) -> Block:
        return Block(self.make_mixer(layer), self.make_ffn(layer), self.make_norm)

    def make_mixer(self, layer: int) -> nn.Module:
        c = self.config
        if c.layer_type(layer) == "full_attention":
            norm = partial(ZeroCentredRMSNorm, eps=c.norm_eps)
            biases = dict(qkv_bias=c.attention_bias, o_bias=c.attention_bias)
            return GatedAttention(**grouped_heads(c, c.partial_rotary_factor), **biases, qk_norm=norm)
        heads = dict(n_heads=c.n_linear_heads, n_k_heads=c.n_linear_k_heads)
        widths = dict(head_dim=c.linear_head_dim, v_head_dim=c.linear_v_head_dim, d_conv=c.d_conv)
        return GatedDeltaNet(d_model=c.d_model, **heads, **widths, norm_eps=c.norm_eps)

    def make_ffn(self, layer: int) -> nn.Module:
        c = self.config
        if layer in c.dense_layers:
            return SwiGLU(c.d_model, c.d_ff)
        weights = {"normalize": c.normalize_weights, "aux_loss_coef": c.aux_loss_coef}
        router = SoftmaxRouter(c.d_model, c.n_experts, c.top_k, **weights)
        return MoE(router, GatedExperts(c.d_model, c.d_expert, c.n_experts), GatedShared(c.d_model, c.d_shared))
