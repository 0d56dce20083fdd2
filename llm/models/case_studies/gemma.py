"""Gemma 1, 2 and 3: scaled embeddings and GeGLU; from 2 on, layers with windows and two norms for each sublayer.

All scale the embeddings by sqrt(d_model), use tanh GeGLU, gains of 1 + w, their own head_dim and an output layer tied
to an embedding of 256,000 entries and more.

Gemma (March 2024, arXiv 2403.08295) is LLaMA's block with these; its 2B model has one key head for all queries. From
Gemma 2 on, a block has four norms.

Gemma 2 (July 2024, arXiv 2408.00118) alternates a window of 4,096 with full attention and caps scores and logits,
c tanh(x / c) with c = 50 and 30. Scores are divided by sqrt(query_width), which is the head's width except in the 27B
model, where it is d_model / n_heads.

Gemma 3 (March 2025, arXiv 2503.19786) is built for long contexts: five local layers with windows of 512 or 1,024 for
each global one, so that few layers cache every key. Local layers rotate by the old base of 10,000, global ones by
1,000,000, in the larger models interpolated by 8. A norm on each query and key head replaces the caps. The models from
4B on see images, too; text-only checkpoints are 270M and 1B. Blog: Case studies, Gemma.
Gallery: docs/gallery/index.html#gemma, #gemma2, #gemma3
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from llm.config import check_positive
from llm.models.case_studies.config import CaseStudyConfig, LayerType, WindowedConfig, grouped_heads
from llm.models.transformer import Transformer
from llm.modules.attention.core import cap
from llm.modules.attention.multi_head import MultiHeadAttention
from llm.modules.attention.soft_capping import SoftCappedAttention
from llm.modules.blocks import Block, SandwichBlock
from llm.modules.ffn.activations import gelu_tanh
from llm.modules.ffn.glu import GLU
from llm.modules.norms import ZeroCentredRMSNorm
from llm.modules.position_encoding.rope import RoPE


class Gemma(Transformer):
    """Gemma 1, and what Gemma 2 and 3 keep of it: scaled embeddings, gains of 1 + w, tanh GeGLU."""

    @dataclass(frozen=True)
    class Config(CaseStudyConfig):
        """16.2 M parameters by default, 5.1 M of them the embedding."""

        norm_eps: float = 1e-6
        """Added to the mean square in every normalisation."""

    def make_norm(self) -> ZeroCentredRMSNorm:
        return ZeroCentredRMSNorm(self.config.d_model, self.config.norm_eps)

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x = self.tok_embed(tokens)
        return x * x.new_full((), x.shape[-1] ** 0.5)  # the factor is rounded to x's dtype: bf16(33.94) = 34

    def make_ffn(self) -> nn.Module:
        return GLU(self.config.d_model, self.config.d_ff, gelu_tanh)

    def make_block(self, layer: int) -> Block:
        return Block(self.make_mixer(layer), self.make_ffn(), self.make_norm)

    def make_mixer(self, layer: int) -> nn.Module:
        return MultiHeadAttention(**grouped_heads(self.config))


class WindowedGemma(Gemma):
    """What Gemma 2 and 3 share: layers with windows, four norms a block, a scale of their own, ceilings."""

    @dataclass(frozen=True)
    class Config(WindowedConfig):
        """The sizes that both have."""

        norm_eps: float = 1e-6
        """Added to the mean square in every normalisation."""
        query_width: int | None = None
        """Scores are divided by its square root; default: the width of a head."""
        window_size: int = 256
        """Tokens that a token sees in a layer with a window, itself among them."""
        soft_cap: float | None = None
        """Scores stay between -soft_cap and soft_cap; None: they are not bounded."""
        logit_soft_cap: float | None = None
        """Logits stay between -logit_soft_cap and logit_soft_cap; None: they are not bounded."""

        small: ClassVar[dict[str, Any]] = {**WindowedConfig.small, "window_size": 16}

        def __post_init__(self):
            super().__post_init__()
            check_positive(self, "query_width", "soft_cap", "logit_soft_cap")

        @property
        def attention_scale(self) -> float:
            return (self.query_width or self.head_width) ** -0.5

    def make_block(self, layer: int) -> SandwichBlock:
        return SandwichBlock(self.make_mixer(layer), self.make_ffn(), self.make_norm)

    def make_mixer(self, layer: int) -> nn.Module:
        c = self.config
        options = self.heads(layer) | dict(mask=c.mask(layer), scale=c.attention_scale)
        if c.soft_cap is None:
            return MultiHeadAttention(**options)
        return SoftCappedAttention(soft_cap=c.soft_cap, **options)

    def heads(self, layer: int) -> dict[str, Any]:
        """The arguments of the attention of a layer, without its mask and its scale."""
        return grouped_heads(self.config)

    @property
    def has_plain_head(self) -> bool:
        return self.config.logit_soft_cap is None

    def unembed(self, x: Tensor) -> Tensor:
        logits = super().unembed(x)
        return logits if self.has_plain_head else cap(logits, self.config.logit_soft_cap)


class Gemma2(WindowedGemma):
    """Windows and full attention in turn; capped scores and logits."""

    @dataclass(frozen=True)
    class Config(WindowedGemma.Config):
        """16.2 M parameters by default, 5.1 M of them the embedding."""

        soft_cap: float | None = 50.0
        """Scores stay between -soft_cap and soft_cap; None: they are not bounded."""
        logit_soft_cap: float | None = 30.0
        """Logits stay between -logit_soft_cap and logit_soft_cap; None: they are not bounded."""


class Gemma3(WindowedGemma):
    """Five windowed layers per global one, each kind with its own RoPE base; a norm on query and key heads."""

    @dataclass(frozen=True)
    class Config(WindowedGemma.Config):
        """17.9 M parameters by default, 5.1 M of them the embedding: six layers, so that one is global."""

        n_layers: int = 6
        """Number of blocks."""
        d_ff: int = 960
        """Width of the gated feed-forward layer."""
        window_size: int = 64
        """Tokens that a token sees in a layer with a window, itself among them."""
        layer_types: tuple[LayerType, ...] = ("sliding_attention",) * 5 + ("full_attention",)
        """What the layers see, in turn: the window or everything."""
        rope_theta: float = 1_000_000.0
        """Base of the rotation in layers that see everything; rope_scaling is for these only."""
        local_rope_theta: float = 10_000.0
        """Base of the rotation in layers with a window."""

        small: ClassVar[dict[str, Any]] = {**WindowedGemma.Config.small, "d_ff": 240}

        def __post_init__(self):
            super().__post_init__()
            check_positive(self, "local_rope_theta")

    def heads(self, layer: int) -> dict[str, Any]:
        c = self.config
        options = grouped_heads(c) | dict(qk_norm=partial(ZeroCentredRMSNorm, eps=c.norm_eps))
        if c.layer_type(layer) == "sliding_attention":
            options["rope"] = RoPE(c.head_width, c.local_rope_theta)
        return options
