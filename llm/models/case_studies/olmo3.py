"""OLMo 3: OLMo 2 with a window in three of four layers, and YaRN in the fourth.

Olmo 3 (Team Olmo, December 2025, arXiv 2512.13961) trains OLMo 2's blocks for contexts of 65,536 tokens. Three of four
layers see the last 4,096 tokens only, with RoPE as it was trained. The fourth sees everything: YaRN extends its RoPE
from 8,192 tokens by a factor of 8, and only there. Blog: Case studies; Attention, sliding window.
Gallery: docs/gallery/index.html#olmo3
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from llm.models.case_studies.config import LayerType, WindowedConfig, grouped_heads
from llm.models.case_studies.olmo2 import OLMo2
from llm.modules.position_encoding.rope import RoPE


class OLMo3(OLMo2):
    @dataclass(frozen=True)
    class Config(WindowedConfig):
        """17.8 M parameters by default, 5.1 M of them the embedding."""

        n_kv_heads: int = 16
        """Key and value heads; must divide n_heads."""
        layer_types: tuple[LayerType, ...] = ("sliding_attention",) * 3 + ("full_attention",)
        """What the layers see, in turn: the window or everything. rope_scaling is for the latter only."""
        attention_bias: bool = False
        """Biases in attention, in checkpoints that have them."""

        small: ClassVar[dict[str, Any]] = {**WindowedConfig.small, "n_kv_heads": 4, "window_size": 64}

    def heads(self, layer: int) -> dict[str, Any]:
        c = self.config
        options = grouped_heads(c) | {"mask": c.mask(layer)}
        if c.layer_type(layer) == "sliding_attention":
            options["rope"] = RoPE(c.head_width, c.rope_theta)
        return options
