"""NoPE decoder: no position encoding at all. The causal mask alone tells a token how much came before it.

    x_p = sqrt(d_model) E[token_p]        the baseline: sqrt(d_model) E[token_p] + PE(p)

The Impact of Positional Encoding on Length Generalization in Transformers, arXiv 2305.19466.
Blog: Position encoding, none.
Gallery: docs/gallery/index.html#nope
"""

from torch import Tensor

from llm.models.baseline import Baseline


class NoPEDecoder(Baseline):
    """The baseline without positions: models whose attention knows positions start from here."""

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.tok_embed(tokens) * self.config.d_model**0.5
