"""SmolLM3: LLaMA's recipe without any position in every fourth layer.

SmolLM3 (Hugging Face, July 2025; no paper) has 3 B parameters, grouped heads and a tied head. Every fourth layer has no
RoPE: its tokens find each other by content alone, whatever their distance, which helps where the context grows.
Rope to Nope and Back Again: A New Hybrid Attention Strategy, January 2025, arXiv 2501.18795.
Blog: Case studies; Position encoding, none.
Gallery: docs/gallery/index.html#smollm3
"""

from dataclasses import dataclass

from torch import nn

from llm.models.case_studies.config import grouped_heads
from llm.models.case_studies.llama import Llama
from llm.modules.attention.multi_head import MultiHeadAttention


class SmolLM3(Llama):
    @dataclass(frozen=True)
    class Config(Llama.Config):
        """16.2 M parameters by default, 5.1 M of them the embedding."""

        rope_layers: tuple[bool, ...] = (True, True, True, False)
        """Whether the layers have RoPE, in turn."""

        def __post_init__(self):
            super().__post_init__()
            object.__setattr__(self, "rope_layers", tuple(map(bool, self.rope_layers)))  # JSON knows lists only
            if not self.rope_layers:
                raise ValueError(
                    "rope_layers = () must say at least of one layer whether it turns (--model.rope-layers)"
                )

    def make_mixer(self, layer: int) -> nn.Module:
        c = self.config
        options = grouped_heads(c) | dict(qkv_bias=c.attention_bias, o_bias=c.attention_bias)
        if not c.rope_layers[layer % len(c.rope_layers)]:
            options["rope"] = None
        return MultiHeadAttention(**options)
