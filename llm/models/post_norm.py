"""Post-norm, as in the original Transformer: the norm stands on the residual stream, after each addition.

    x = norm(x + attention(x))        x = norm(x + ffn(x))

No path from embedding to head is free of norms, so the gradient's scale differs from layer to layer and the first
steps are delicate: give it a longer warm-up (`--warmup-steps`) than the pre-norm baseline.
Attention Is All You Need, arXiv 1706.03762; On Layer Normalization in the Transformer Architecture, arXiv 2002.04745.
Blog: Normalization, pre- and post-norm.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from llm.config import DecoderConfig
from llm.models.transformer import Transformer
from llm.modules.attention.multi_head import MultiHeadAttention
from llm.modules.blocks import PostNormBlock
from llm.modules.ffn.mlp import MLP
from llm.modules.position_encoding.sinusoidal import add_sinusoidal


@dataclass(frozen=True)
class PostNormConfig(DecoderConfig):
    """One norm fewer than the baseline: the last block's is the final one."""


class PostNorm(Transformer):
    def __init__(self, config: PostNormConfig):
        super().__init__(config)
        self.norm = nn.Identity()  # the last block has normalised already

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return add_sinusoidal(self.tok_embed(tokens), positions)

    def make_block(self, layer: int) -> PostNormBlock:
        c = self.config
        attention = MultiHeadAttention(d_model=c.d_model, n_heads=c.n_heads)
        return PostNormBlock(attention, MLP(c.d_model, c.d_ff), self.make_norm)
