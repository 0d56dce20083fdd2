"""Qwen2-MoE: Qwen2's attention over narrow experts, beside one expert that every token uses, through a gate of its own.

Qwen1.5-MoE-A2.7B (March 2024; no paper) and Qwen2-57B-A14B (Qwen2 Technical Report, July 2024, arXiv 2407.10671) choose
4 of 60 and 8 of 64 experts a token. The weights of the chosen do not sum to 1. A shared expert, four and more times as
wide, is added to their sum, multiplied by a sigmoid of the token: a token can do without it. Qwen3-MoE dropped it.
Blog: Case studies, Qwen; FFN and MoE.
Gallery: docs/gallery/index.html#qwen2_moe
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from llm.config import check_positive
from llm.models.case_studies.config import grouped_heads
from llm.models.case_studies.qwen3_moe import Qwen3MoE
from llm.modules.attention.multi_head import MultiHeadAttention
from llm.modules.ffn.moe import GatedShared


class Qwen2MoE(Qwen3MoE):
    """Biases on queries, keys and values instead of a norm, and a shared expert."""

    @dataclass(frozen=True)
    class Config(Qwen3MoE.Config):
        """40.5 M parameters by default, 18.7 M of them active in a token."""

        head_dim: int | None = None
        """Width of a head; where it is not given, d_model / n_heads."""
        d_shared: int = 592
        """Width of the expert that every token uses."""
        normalize_weights: bool = False
        """Scale the weights of the chosen experts to sum to 1 (norm_topk_prob)."""
        qkv_bias: bool = True
        """Biases on queries, keys and values."""

        small: ClassVar[dict[str, Any]] = {**Qwen3MoE.Config.small, "head_dim": None, "d_shared": 144}

        def __post_init__(self):
            super().__post_init__()
            check_positive(self, "d_shared")

    def make_mixer(self, layer: int) -> nn.Module:
        c = self.config
        return MultiHeadAttention(**grouped_heads(c), qkv_bias=c.qkv_bias)

    def make_experts(self) -> nn.Module:
        c = self.config
        experts = super().make_experts()
        experts.shared = GatedShared(c.d_model, c.d_shared)
        return experts
