"""The baseline with multi-head latent attention: a cache of one short vector a token instead of all keys and values.

    c = norm(x W_kv_a)     k_h = [c W_uk^h | RoPE(x W_kr)]     v_h = c W_uv^h

MLA has its own position signal, a rotated slice of queries and keys beside the latent, since a rotated latent could not
be absorbed into the query. The sinusoids would be a second signal, so the model starts from `nope`.

DeepSeek-V2, arXiv 2405.04434, section 2.1. Blog: Attention, MLA.
Gallery: docs/gallery/index.html#latent
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from llm.config import check_even, check_positive
from llm.models.nope import NoPEDecoder
from llm.modules.attention.latent import LatentAttention
from llm.modules.position_encoding.rope import RoPE


class Latent(NoPEDecoder):
    @dataclass(frozen=True)
    class Config(NoPEDecoder.Config):
        """Cached per token and layer: kv_lora_rank + qk_rope_head_dim = 144 numbers by default; the baseline's 1,024.

        As in DeepSeek-V2 the latent is four heads wide and the rotated slice half a head. Values are as wide as
        queries, so this model is as large as the baseline within 1 %.
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

        small: ClassVar[dict[str, Any]] = {**NoPEDecoder.Config.small, "kv_lora_rank": 32}

        def __post_init__(self):
            super().__post_init__()
            check_positive(self, "kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
            check_positive(self, "rope_theta")
            check_even(self, "qk_rope_head_dim")

    def make_mixer(self, layer: int) -> nn.Module:
        c = self.config
        return LatentAttention(
            d_model=c.d_model,
            n_heads=c.n_heads,
            q_lora_rank=c.q_lora_rank,
            kv_lora_rank=c.kv_lora_rank,
            qk_nope_head_dim=c.qk_nope_head_dim,
            qk_rope_head_dim=c.qk_rope_head_dim,
            v_head_dim=c.v_head_dim,
            rope=RoPE(c.qk_rope_head_dim, c.rope_theta, interleaved=True),
        )
