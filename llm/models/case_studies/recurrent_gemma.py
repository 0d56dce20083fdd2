"""RecurrentGemma: Griffin's layers, two recurrences to one attention with a window, in Gemma's recipe.

    recurrent:   x = x + W_o (RG-LRU(conv(norm(x) W_x)) * GELU(norm(x) W_y))
    attention:   one key head for all queries, a window of 2,048 tokens, RoPE on half of each head

Griffin: Mixing Gated Linear Recurrences with Local Attention for Efficient Language Models, arXiv 2402.19427;
RecurrentGemma: Moving Past Transformers for Efficient Open Language Models (Google DeepMind, April 2024, arXiv
2404.07839), with 2 B and 9 B parameters. Neither kind of layer has a cache that grows beyond the window, so a text may
be of any length if max_seq_len is. From Gemma come scaled embeddings, gains of 1 + w, tanh GeGLU (here with biases) and
logits within 30 tanh(x / 30). The embeddings' factor sqrt(d_model) is rounded to bf16, whatever the dtype of the
weights.
Blog: Case studies, Gemma; State-space models, hybrids.
Gallery: docs/gallery/index.html#recurrent_gemma
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from llm.config import check_divides, check_layer_types, check_positive
from llm.models.case_studies.config import CaseStudyConfig, check_share, grouped_heads
from llm.models.case_studies.gemma import Gemma
from llm.modules.attention.core import cap
from llm.modules.attention.multi_head import MultiHeadAttention
from llm.modules.ffn.activations import gelu_tanh
from llm.modules.ffn.glu import GLU
from llm.modules.masks import Window
from llm.modules.recurrent.rg_lru import GriffinRecurrence

LayerType = Literal["recurrent", "attention"]


class RecurrentGemma(Gemma):
    @dataclass(frozen=True)
    class Config(CaseStudyConfig):
        """17.7 M parameters by default, 5.1 M of them the embedding: six layers, so that two are attention."""

        n_layers: int = 6
        """Number of blocks."""
        n_heads: int = 8
        """Query heads; the gates of the recurrence have as many blocks, so this must divide d_rnn."""
        n_kv_heads: int = 1
        """Key and value heads; must divide n_heads."""
        d_ff: int = 864
        """Width of the gated feed-forward layer."""
        norm_eps: float = 1e-6
        """Added to the mean square in every normalisation."""
        layer_types: tuple[LayerType, ...] = ("recurrent", "recurrent", "attention")
        """The mixer of each block; a pattern shorter than n_layers is repeated."""
        d_rnn: int = 512
        """Channels of the recurrence."""
        d_conv: int = 4
        """Tokens that the convolution before the recurrence sees, the current one among them."""
        window_size: int = 128
        """Tokens that a token sees in an attention layer, itself among them."""
        partial_rotary_factor: float = 0.5
        """The share of each head that RoPE turns."""
        attention_bias: bool = False
        """Biases on queries, keys and values; the output has one in any case."""
        logit_soft_cap: float = 30.0
        """Logits stay between -logit_soft_cap and logit_soft_cap."""

        small: ClassVar[dict[str, Any]] = {
            **CaseStudyConfig.small,
            **dict(n_kv_heads=1, d_ff=216, d_rnn=128, window_size=16, layer_types=("recurrent", "attention")),
        }

        def __post_init__(self):
            super().__post_init__()
            check_layer_types(self, LayerType.__args__)
            check_positive(self, "d_rnn", "d_conv", "window_size", "logit_soft_cap")
            check_share(self, "partial_rotary_factor")
            check_divides(self, "n_heads", "d_rnn", " or another width (--model.d-rnn)")

        def layer_type(self, layer: int) -> LayerType:
            return self.layer_types[layer % len(self.layer_types)]

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x = self.tok_embed(tokens)
        factor = x.new_full((), x.shape[-1] ** 0.5, dtype=torch.bfloat16)  # bf16(sqrt(2,560)) = 50.5, not 50.6
        return x * factor.to(x.dtype)

    def make_ffn(self) -> nn.Module:
        return GLU(self.config.d_model, self.config.d_ff, gelu_tanh, bias=True)

    def make_mixer(self, layer: int) -> nn.Module:
        c = self.config
        if c.layer_type(layer) == "recurrent":
            return GriffinRecurrence(d_model=c.d_model, d_rnn=c.d_rnn, n_heads=c.n_heads, d_conv=c.d_conv)
        heads = grouped_heads(c, c.partial_rotary_factor)
        return MultiHeadAttention(**heads, mask=Window(c.window_size), qkv_bias=c.attention_bias, o_bias=True)

    def unembed(self, x: Tensor) -> Tensor:
        return cap(super().unembed(x), self.config.logit_soft_cap)
