"""Falcon-H1: attention heads and Mamba-2 heads side by side in every layer, and a constant on every path.

    h = norm(x)        x = x + m_1 attention(m_2 h) + m_3 mamba2(m_4 h)        x = x + m_5 SwiGLU(norm(x))

Falcon-H1: A Family of Hybrid-Head Language Models Redefining Efficiency and Performance (TII, July 2025, arXiv
2507.22448) has six sizes from 0.5 B to 34 B parameters. The two kinds of heads read the same input, and how many there
are of each is chosen freely. The constants are those of muP (arXiv 2203.03466): they let learning rates that were found
on a small model serve a large one. Here each is a factor of what a linear layer returns, which computes the same.
Most sizes have no norm between Mamba-2's gate and its output projection. RoPE's base is 1e11 without any extension.
Blog: Case studies; State-space models, hybrids.
Gallery: docs/gallery/index.html#falcon_h1
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from llm.config import check_divides, check_positive, flag
from llm.models.case_studies.config import CaseStudyConfig, grouped_heads
from llm.models.transformer import Transformer
from llm.modules.attention.multi_head import MultiHeadAttention
from llm.modules.blocks import Block
from llm.modules.ffn.glu import SwiGLU
from llm.modules.recurrent.mamba2 import Mamba2
from llm.modules.recurrent.parallel import ParallelMixers


class ScaledLinear(nn.Linear):
    """(.., d_in) -> (.., d_out), a linear layer without bias. `parts` are the widths of its outputs and their factors;
    the widths sum to d_out."""

    def __init__(self, d_in: int, *parts: tuple[int, float]):
        super().__init__(d_in, sum(width for width, _ in parts), bias=False)
        self.parts = parts

    def forward(self, x: Tensor) -> Tensor:
        outputs = super().forward(x).split([width for width, _ in self.parts], -1)
        return torch.cat([y * factor for y, (_, factor) in zip(outputs, self.parts, strict=True)], -1)


class FalconH1(Transformer):
    @dataclass(frozen=True)
    class Config(CaseStudyConfig):
        """19.9 M parameters by default, 5.1 M of them the embedding."""

        n_heads: int = 8
        """Query heads."""
        n_kv_heads: int = 2
        """Key and value heads; must divide n_heads."""
        n_mamba_heads: int = 8
        """Heads of Mamba-2."""
        mamba_head_dim: int = 64
        """Channels of a head of Mamba-2."""
        n_mamba_groups: int = 1
        """Pairs of B and C; must divide n_mamba_heads."""
        d_state: int = 128
        """Width of Mamba-2's keys (B) and queries (C)."""
        d_conv: int = 4
        """Tokens that the short convolution mixes."""
        mamba_norm: bool = False
        """Normalise between Mamba-2's gate and its output projection (34B)."""
        embedding_multiplier: float = 1.0
        """Factor of the embedding."""
        lm_head_multiplier: float = 1.0
        """Factor of the logits."""
        attention_in_multiplier: float = 1.0
        """Factor of what attention reads."""
        key_multiplier: float = 1.0
        """Factor of the keys."""
        attention_out_multiplier: float = 1.0
        """Factor of what attention writes."""
        ssm_in_multiplier: float = 1.0
        """Factor of what Mamba-2 reads."""
        ssm_multipliers: tuple[float, ...] = (1.0,) * 5
        """Factors of Mamba-2's gate z, x, B, C and dt."""
        ssm_out_multiplier: float = 1.0
        """Factor of what Mamba-2 writes."""
        mlp_multipliers: tuple[float, ...] = (1.0, 1.0)
        """Factors of the feed-forward layer's gate and of what it writes."""

        small: ClassVar[dict[str, Any]] = {**CaseStudyConfig.small, "n_mamba_heads": 4, "mamba_head_dim": 32} | {
            "d_state": 32
        }

        def __post_init__(self):
            super().__post_init__()
            check_positive(self, "n_mamba_heads", "mamba_head_dim", "n_mamba_groups", "d_state", "d_conv")
            check_divides(self, "n_mamba_groups", "n_mamba_heads")
            for name, n in (("ssm_multipliers", 5), ("mlp_multipliers", 2)):
                object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON knows lists only
                if len(getattr(self, name)) != n:
                    raise ValueError(f"{name} = {getattr(self, name)} must be {n} numbers ({flag(self, name)})")

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.tok_embed(tokens) * self.config.embedding_multiplier

    def unembed(self, x: Tensor) -> Tensor:
        return super().unembed(x) * self.config.lm_head_multiplier

    def make_block(self, layer: int) -> Block:
        mixer = ParallelMixers(attention=self.make_attention(), mamba=self.make_mamba())
        return Block(mixer, self.make_ffn(), self.make_norm)

    def make_attention(self) -> nn.Module:
        c = self.config
        attention = MultiHeadAttention(**grouped_heads(c))
        wide, narrow, m = c.n_heads * c.head_width, c.n_kv_heads * c.head_width, c.attention_in_multiplier
        attention.q_proj = ScaledLinear(c.d_model, (wide, m))
        attention.k_proj = ScaledLinear(c.d_model, (narrow, m * c.key_multiplier))
        attention.v_proj = ScaledLinear(c.d_model, (narrow, m))
        attention.o_proj = ScaledLinear(wide, (c.d_model, c.attention_out_multiplier))
        return attention

    def make_mamba(self) -> nn.Module:
        c = self.config
        heads = dict(n_heads=c.n_mamba_heads, head_dim=c.mamba_head_dim, n_groups=c.n_mamba_groups)
        norm_eps = c.norm_eps if c.mamba_norm else None
        mamba = Mamba2(d_model=c.d_model, **heads, d_state=c.d_state, d_conv=c.d_conv, norm_eps=norm_eps)
        widths = [mamba.widths[0], *mamba.widths, c.n_mamba_heads]
        factors = [c.ssm_in_multiplier * factor for factor in c.ssm_multipliers]
        mamba.in_proj = ScaledLinear(c.d_model, *zip(widths, factors, strict=True))
        mamba.o_proj = ScaledLinear(mamba.widths[0], (c.d_model, c.ssm_out_multiplier))
        return mamba

    def make_ffn(self) -> nn.Module:
        c = self.config
        ffn, (gate, down) = SwiGLU(c.d_model, c.d_ff), c.mlp_multipliers
        ffn.gate_proj = ScaledLinear(c.d_model, (c.d_ff, gate))
        ffn.down_proj = ScaledLinear(c.d_ff, (c.d_model, down))
        return ffn
