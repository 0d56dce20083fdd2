"""OLMo 2: LLaMA's parts with the norms moved to where they keep training stable.

2 OLMo 2 Furious (Team OLMo, December 2024, arXiv 2501.00656; models of 1B and 32B followed in 2025) is open in weights,
data, code and logs. Its predecessor's loss had spikes, and the report says step by step what helped. RMSNorm is applied
to what each layer adds instead of to what it reads, so that no layer can add more than its gain. RMSNorm on queries and
keys, over the full width of all heads and before RoPE, bounds the scores. The rest is SwiGLU, RoPE with a base of
500,000 and no biases. The 32B model shares keys in groups of five heads, the others do not share them.
Blog: Case studies; Normalization, QK-norm.
Gallery: docs/gallery/index.html#olmo2
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from llm.models.case_studies.config import CaseStudyConfig, grouped_heads
from llm.models.transformer import Transformer
from llm.modules.attention.qk_norm import FullWidthQKNormAttention
from llm.modules.blocks import OutputNormBlock
from llm.modules.ffn.glu import SwiGLU
from llm.modules.norms import OnceRoundedRMSNorm


class OLMo2(Transformer):
    @dataclass(frozen=True)
    class Config(CaseStudyConfig):
        """17.8 M parameters by default, 5.1 M of them the embedding."""

        n_kv_heads: int = 16
        """Key and value heads; must divide n_heads."""

        attention_bias: bool = False
        """Biases in attention, in checkpoints that have them."""

        small: ClassVar[dict[str, Any]] = {**CaseStudyConfig.small, "n_kv_heads": 4}

    def make_norm(self) -> OnceRoundedRMSNorm:
        return OnceRoundedRMSNorm(self.config.d_model, self.config.norm_eps)

    def make_block(self, layer: int) -> OutputNormBlock:
        c = self.config
        attention = FullWidthQKNormAttention(
            **self.heads(layer),
            qk_norm=partial(OnceRoundedRMSNorm, eps=c.norm_eps),
            qkv_bias=c.attention_bias,
            o_bias=c.attention_bias,
        )
        return OutputNormBlock(attention, SwiGLU(c.d_model, c.d_ff), self.make_norm)

    def heads(self, layer: int) -> dict[str, Any]:
        """The arguments of the attention of a layer."""
        return grouped_heads(self.config)
