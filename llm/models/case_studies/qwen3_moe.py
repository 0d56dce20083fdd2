"""Qwen3-MoE: many narrow experts, of which a token uses eight, under Qwen3's attention with a norm on each head.

Qwen3 Technical Report (Qwen Team, May 2025, arXiv 2505.09388): 30B-A3B and 235B-A22B have 128 experts a layer, each 3/8
as wide as the residual stream: fine-grained, after DeepSeekMoE, but none is shared. Qwen balances them by a loss over
the global batch, so that experts may specialise in kinds of text; here the loss is per sequence
(llm/modules/ffn/balance.py). Attention is Qwen3's: grouped heads 128 wide whatever d_model / n_heads is, queries and
keys normalised head by head before RoPE. Checkpoints of this format may have dense layers, and weights of experts that
do not sum to 1. Blog: Case studies, Qwen; FFN and MoE.
Gallery: docs/gallery/index.html#qwen3_moe
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import nn

from llm.config import check_positive
from llm.models.case_studies.config import CaseStudyConfig, grouped_heads
from llm.models.transformer import Transformer
from llm.modules.attention.multi_head import MultiHeadAttention
from llm.modules.blocks import Block
from llm.modules.ffn.glu import SwiGLU
from llm.modules.ffn.moe import GatedExperts, MoE
from llm.modules.ffn.router import SoftmaxRouter, check_routing
from llm.modules.masks import Window, causal
from llm.modules.norms import RMSNorm


def check_dense_layers(config: CaseStudyConfig) -> None:
    """Make `dense_layers` a tuple, since JSON knows lists only. Raises ValueError where it names a layer that is not
    there."""
    object.__setattr__(config, "dense_layers", tuple(config.dense_layers))
    outside = [layer for layer in config.dense_layers if not 0 <= layer < config.n_layers]
    if outside:
        raise ValueError(
            f"dense_layers names {outside}, but layers are 0 to {config.n_layers - 1} (--model.dense-layers)"
        )


class Qwen3MoE(Transformer):
    @dataclass(frozen=True)
    class Config(CaseStudyConfig):
        """39.5 M parameters by default, 17.7 M of them active in a token."""

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
        window_size: int | None = None
        """Tokens that a token sees in each layer, itself among them; None: all."""
        attention_bias: bool = False
        """Biases in attention, in checkpoints that have them."""
        aux_loss_coef: float = 0.01
        """Weight of the loss that balances the load of the experts."""

        small: ClassVar[dict[str, Any]] = {**CaseStudyConfig.small, "head_dim": 64, "d_ff": 288, "d_expert": 72}

        def __post_init__(self):
            super().__post_init__()
            check_positive(self, "d_expert", "window_size")
            check_routing(self.n_experts, self.top_k)
            check_dense_layers(self)

    def make_block(self, layer: int) -> Block:
        c = self.config
        ffn = SwiGLU(c.d_model, c.d_ff) if layer in c.dense_layers else self.make_experts()
        return Block(self.make_mixer(layer), ffn, self.make_norm)

    def make_mixer(self, layer: int) -> nn.Module:
        c = self.config
        mask = causal if c.window_size is None else Window(c.window_size)
        options = dict(mask=mask, qkv_bias=c.attention_bias, o_bias=c.attention_bias)
        return MultiHeadAttention(**grouped_heads(c), **options, qk_norm=partial(RMSNorm, eps=c.norm_eps))

    def make_experts(self) -> nn.Module:
        c = self.config
        weights = {"normalize": c.normalize_weights, "aux_loss_coef": c.aux_loss_coef}
        router = SoftmaxRouter(c.d_model, c.n_experts, c.top_k, **weights)
        return MoE(router, GatedExperts(c.d_model, c.d_expert, c.n_experts))
