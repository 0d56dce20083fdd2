"""GPT-OSS: OpenAI's first open weights since GPT-2. Clamped experts, windows, and heads that may add nothing.

gpt-oss-120b & gpt-oss-20b Model Card (OpenAI, August 2025, arXiv 2508.10925): 116.8 B and 20.9 B parameters, 5.1 B and
3.6 B of them active in a token. Every second layer sees the last 128 tokens only, as in GPT-3. The others see
everything, by YaRN up to 131,072 tokens from 4,096, with a ramp that is not rounded to whole channels. New is a learned
sink in each head's softmax, which takes the weight where a head has nothing to add. Four of 32 or 128 experts serve a
token: SwiGLU clamped at 7, with biases, which attention and router have, too. The experts are published in 4 bits
(MXFP4), so that the large model fits one GPU of 80 GB. Blog: Case studies, GPT-OSS; Attention, attention sinks.
Gallery: docs/gallery/index.html#gpt_oss
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from llm.models.case_studies.config import WindowedConfig, grouped_heads
from llm.models.transformer import Transformer
from llm.modules.attention.sinks import SinkAttention
from llm.modules.blocks import Block
from llm.modules.ffn.clamped_experts import ClampedExperts
from llm.modules.ffn.moe import MoE
from llm.modules.ffn.router import SoftmaxRouter, check_routing
from llm.modules.norms import OnceRoundedRMSNorm


class GPTOSS(Transformer):
    @dataclass(frozen=True)
    class Config(WindowedConfig):
        """41.4 M parameters by default, 17.8 M of them active in a token."""

        n_kv_heads: int = 2
        """Key and value heads; must divide n_heads."""
        head_dim: int | None = 64
        """Width of a head; where it is not given, d_model / n_heads."""
        d_ff: int = 320
        """Width of each expert."""
        n_experts: int = 16
        """Experts in each layer among which the router chooses."""
        top_k: int = 4
        """Experts that each token goes to."""
        aux_loss_coef: float = 0.01
        """Weight of the loss that balances the load of the experts."""

        small: ClassVar[dict[str, Any]] = {**WindowedConfig.small, "head_dim": 64, "d_ff": 80, "window_size": 64}

        def __post_init__(self):
            super().__post_init__()
            check_routing(self.n_experts, self.top_k)

    def make_norm(self) -> OnceRoundedRMSNorm:
        return OnceRoundedRMSNorm(self.config.d_model, self.config.norm_eps)

    def make_block(self, layer: int) -> Block:
        c = self.config
        attention = SinkAttention(**grouped_heads(c), mask=c.mask(layer), qkv_bias=True, o_bias=True)
        router = SoftmaxRouter(c.d_model, c.n_experts, c.top_k, bias=True, aux_loss_coef=c.aux_loss_coef)
        return Block(attention, MoE(router, ClampedExperts(c.d_model, c.d_ff, c.n_experts)), self.make_norm)
