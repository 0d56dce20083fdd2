"""Qwen3.5: Qwen3-Next's mixers in models of every size, with a dense feed-forward layer or with experts.

Qwen3.5 (Qwen Team, February 2026; no paper) keeps Qwen3-Next's three layers of Gated DeltaNet (arXiv 2412.06464) to one
of gated attention (arXiv 2505.06708). Its vocabulary has 248,320 entries, and all models see images; this is the part
that reads text. Dense models have up to 27 B parameters. 397B-A17B sends a token to 10 of 512 experts, the smaller ones
with experts to 8 of 256. The prediction module of its training is left out here.
Blog: Case studies, Qwen; Linear attention.
Gallery: docs/gallery/index.html#qwen3_5, #qwen3_5_moe
"""

from dataclasses import dataclass

from torch import nn

from llm.models.case_studies.qwen3_next import GatedHybridConfig, Qwen3Next
from llm.modules.ffn.glu import SwiGLU


class Qwen35(Qwen3Next):
    """One dense feed-forward layer in each block."""

    @dataclass(frozen=True)
    class Config(GatedHybridConfig):
        """17.7 M parameters by default, 5.1 M of them the embedding."""

    def make_ffn(self, layer: int) -> nn.Module:
        return SwiGLU(self.config.d_model, self.config.d_ff)


class Qwen35MoE(Qwen3Next):
    """Experts in each block, as in Qwen3-Next."""

    @dataclass(frozen=True)
    class Config(Qwen3Next.Config):
        """40.2 M parameters by default, 16.5 M of them active in a token."""
