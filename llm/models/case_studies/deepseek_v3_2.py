"""DeepSeek-V3.2: V3 whose attention reads only the tokens that a small indexer chooses.

DeepSeek-V3.2 (December 2025, arXiv 2512.02556) adds DeepSeek Sparse Attention to V3: an indexer of few narrow heads
scores all earlier tokens, and each layer's latent attention reads the best 2,048 of them. Training goes on from dense
attention: first only the indexer learns (`index_warmup`), then everything, with the choice in place. The commands of
the three stages: docs/training.md, Stages of DeepSeek-V3.2. Loading leaves out the prediction module of published
weights, as transformers does. Blog: Case studies, DeepSeek.
Gallery: docs/gallery/index.html#deepseek_v3_2
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from llm.config import check_positive
from llm.models.case_studies.deepseek_v2 import latent_options
from llm.models.case_studies.deepseek_v3 import DeepseekV3
from llm.modules.position_encoding.rope import RoPE
from llm.modules.position_encoding.rope_settings import make_scaling
from llm.modules.sparse.indexer import Indexer, SparseLatentAttention


class DeepseekV32(DeepseekV3):
    @dataclass(frozen=True)
    class Config(DeepseekV3.Config):
        """V3's sizes; a token reads 64 of the up to 512 before it."""

        index_n_heads: int = 8
        """Heads of the indexer."""
        index_head_dim: int = 32
        """Width of its heads; at least qk_rope_head_dim."""
        index_top_k: int = 64
        """Tokens that each token attends to; as many as max_seq_len: dense attention."""
        index_loss_coef: float = 1.0
        """Weight of the loss that teaches the indexer where attention looks; 0: it does not learn."""
        index_warmup: bool = False
        """The stage before the sparse one: attention is dense, and only the indexer learns."""

        small: ClassVar[dict[str, Any]] = {**DeepseekV3.Config.small, "index_top_k": 12}

        def __post_init__(self):
            super().__post_init__()
            check_positive(self, "index_n_heads", "index_head_dim", "index_top_k")
            if self.q_lora_rank is None:
                raise ValueError(
                    "q_lora_rank = None: the indexer reads the latent of the queries (--model.q-lora-rank)"
                )
            if self.index_head_dim < self.qk_rope_head_dim:
                raise ValueError(
                    f"index_head_dim = {self.index_head_dim} must be at least qk_rope_head_dim = "
                    f"{self.qk_rope_head_dim}, the channels that are rotated (--model.index-head-dim)"
                )
            if self.index_loss_coef < 0 or (self.index_warmup and self.index_loss_coef == 0):
                raise ValueError(
                    f"index_loss_coef = {self.index_loss_coef} must not be negative, and must be positive with "
                    "index_warmup = True, where only the indexer learns (--model.index-loss-coef)"
                )

    stage_fields = ("index_warmup", "index_top_k", "index_loss_coef")

    def __init__(self, config: Config):
        super().__init__(config)
        if config.index_warmup:
            for name, parameter in self.named_parameters():
                parameter.requires_grad_(".indexer." in name)
            for router in self.offering("rebalance"):  # moves the biases of its experts without a gradient
                router.bias_update_speed = 0.0

    def make_mixer(self, layer: int) -> nn.Module:
        c = self.config
        scaling = make_scaling(c.rope_scaling)
        rope = RoPE(c.index_head_dim, c.rope_theta, rotary_dim=c.qk_rope_head_dim, scaling=scaling)
        sizes = dict(d_model=c.d_model, q_lora_rank=c.q_lora_rank)
        return SparseLatentAttention(
            indexer=Indexer(**sizes, n_heads=c.index_n_heads, head_dim=c.index_head_dim, rope=rope),
            index_top_k=c.index_top_k,
            index_loss_coef=c.index_loss_coef,
            dense=c.index_warmup,
            **latent_options(c),
        )
