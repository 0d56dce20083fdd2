"""Masked diffusion: the baseline without its causal mask, trained to fill in tokens that are hidden.

    mask:   token i sees every token j                              the baseline: j <= i
    loss:   hide k of T tokens, k uniform on 1..T; mean of -log p(x_i | the rest) over the hidden i
                                                                    the baseline: -log p(x_i | x_1 .. x_(i-1)), all i

The model changes by one mask and one vector, the embedding of a hidden token. Loss and writing are in denoiser.py. The
loss is a bound on the likelihood, so the model may be better than its number. In each step it learns from half of the
tokens, in any order instead of one, and so needs several times as many tokens as the baseline to write as well.

LLaDA, arXiv 2502.09992; MDLM, arXiv 2406.07524. Blog: Diffusion.
Gallery: docs/gallery/index.html#masked_diffusion
"""

from torch import nn

from llm.models.baseline import Baseline
from llm.models.denoiser import Denoiser
from llm.modules.attention.multi_head import MultiHeadAttention
from llm.modules.masks import everything


class MaskedDiffusion(Denoiser, Baseline):
    """The baseline that sees everything."""

    def make_mixer(self, layer: int) -> nn.Module:
        return MultiHeadAttention(d_model=self.config.d_model, n_heads=self.config.n_heads, mask=everything)
