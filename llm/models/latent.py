"""The baseline with multi-head latent attention: a cache of one short vector a token instead of all keys and values.

    c = norm(x W_kv_a)     k_h = [c W_uk^h | RoPE(x W_kr)]     v_h = c W_uv^h

The one change is the attention; its positions come with it. MLA keeps a rotated slice in queries and keys, apart from
the latent, because a rotated latent could no longer be absorbed into the query: the sinusoidal table would be a second
position signal, so it goes, and its scaling of the embeddings stays.

DeepSeek-V2, arXiv 2405.04434, section 2.1. Blog: Attention, MLA.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from llm.config import DecoderConfig, check_positive
from llm.models.transformer import Transformer
from llm.modules.attention.latent import LatentAttention
from llm.modules.blocks import Block
from llm.modules.ffn.mlp import MLP
from llm.modules.position_encoding.rope import RoPE


@dataclass(frozen=True)
class LatentConfig(DecoderConfig):
    """Cached per token and layer: kv_lora_rank + qk_rope_head_dim = 144 numbers by default; the baseline's 1,024.

    As in DeepSeek-V2 the latent is four heads wide and the rotated slice half a head. Values are as wide as queries:
    that spends what the low rank saves, so this model is as large as the baseline within 1 %.
    """

    kv_lora_rank: int = 128
    """Width of the latent that keys and values are rebuilt from."""
    q_lora_rank: int | None = None
    """Width of a latent for queries, too, which saves memory in training; not given: one full projection."""
    qk_nope_head_dim: int = 32
    """Width of a query and key head without position."""
    qk_rope_head_dim: int = 16
    """Width of its rotated slice, whose key is shared by all heads; must be even."""
    v_head_dim: int = 48
    """Width of a value head."""
    rope_theta: float = 10_000.0
    """Base of the rotation's wavelengths."""

    small: ClassVar[dict[str, Any]] = {**DecoderConfig.small, "kv_lora_rank": 32}

    def __post_init__(self):
        super().__post_init__()
        for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "rope_theta"):
            check_positive(self, name)
        if self.q_lora_rank is not None:
            check_positive(self, "q_lora_rank")
        if self.qk_rope_head_dim % 2:
            raise ValueError(
                f"qk_rope_head_dim = {self.qk_rope_head_dim} must be even: RoPE turns pairs (--model.qk-rope-head-dim)"
            )


class Latent(Transformer):
    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.tok_embed(tokens) * self.config.d_model**0.5

    def make_block(self, layer: int) -> Block:
        c = self.config
        attention = LatentAttention(
            d_model=c.d_model,
            n_heads=c.n_heads,
            q_lora_rank=c.q_lora_rank,
            kv_lora_rank=c.kv_lora_rank,
            qk_nope_head_dim=c.qk_nope_head_dim,
            qk_rope_head_dim=c.qk_rope_head_dim,
            v_head_dim=c.v_head_dim,
            rope=RoPE(c.qk_rope_head_dim, c.rope_theta, interleaved=True),
        )
        return Block(attention, MLP(c.d_model, c.d_ff), self.make_norm)
