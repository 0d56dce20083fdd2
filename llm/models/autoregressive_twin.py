"""The autoregressive twin of block diffusion: blocks of one token, so that only the objective differs.

    -log p(x) = sum_i -log p(x_i | x_1 .. x_(i-1))        block diffusion: a bound for each block of several tokens

It has the same parameters, reads both copies of the text in training and computes the same products. A hidden token in
place i sees the tokens before it, so the loss is the exact likelihood. Beside it, a bound of block or masked diffusion
shows what writing in any order costs. Beside the baseline, it shows what it costs that a hidden token does not hold the
token before it and has to find it by attention.

Block Diffusion (BD3-LM), arXiv 2503.09573, section 3.1. Blog: Diffusion.
Gallery: docs/gallery/index.html#autoregressive_twin
"""

from dataclasses import dataclass

from llm.models.block_diffusion import BlockDiffusion


class AutoregressiveTwin(BlockDiffusion):
    @dataclass(frozen=True)
    class Config(BlockDiffusion.Config):
        """The sizes of `block_diffusion`."""

        block_size: int = 1
        """Tokens that are written together; 1 makes the loss exact."""
