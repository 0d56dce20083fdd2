"""A hybrid: three layers of Gated DeltaNet to one of attention.

    layer_types = gated_delta_net, gated_delta_net, gated_delta_net, attention        the baseline: attention four times

A state of fixed size forgets details that attention can still look up. A few attention layers are enough for that, and
a fourth of the layers keeps a fourth of the cache. The recurrent layers know the order of the tokens, so nothing is
added to the embedding. The ratio is that of Qwen3-Next and Kimi Linear (arXiv 2510.26692).
Gated Delta Networks: Improving Mamba2 with Delta Rule, arXiv 2412.06464, section 3.4.
Blog: State-space models, hybrids.
Gallery: docs/gallery/index.html#hybrid
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import nn

from llm.config import check_divides, check_layer_types, check_positive
from llm.models.gated_delta_net import GatedDeltaNetDecoder
from llm.modules.attention.multi_head import MultiHeadAttention

LayerType = Literal["gated_delta_net", "attention"]


class Hybrid(GatedDeltaNetDecoder):
    @dataclass(frozen=True)
    class Config(GatedDeltaNetDecoder.Config):
        """17.7 M parameters by default, 5.1 M of them the embedding."""

        layer_types: tuple[LayerType, ...] = ("gated_delta_net", "gated_delta_net", "gated_delta_net", "attention")
        """The mixer of each block; a pattern shorter than n_layers is repeated."""
        n_attention_heads: int = 16
        """Heads of the attention layers; must divide d_model."""

        small: ClassVar[dict[str, Any]] = {**GatedDeltaNetDecoder.Config.small, "n_attention_heads": 4}

        def __post_init__(self):
            super().__post_init__()
            check_positive(self, "n_attention_heads")
            check_divides(self, "n_attention_heads", "d_model", " or another width (--model.d-model)")
            check_layer_types(self, LayerType.__args__)

    def make_mixer(self, layer: int) -> nn.Module:
        c = self.config
        if c.layer_types[layer % len(c.layer_types)] == "attention":
            return MultiHeadAttention(d_model=c.d_model, n_heads=c.n_attention_heads)
        return super().make_mixer(layer)
