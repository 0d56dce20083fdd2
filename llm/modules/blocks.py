"""How a mixer, a feed-forward layer and their norms are wired around the residual stream.

    pre-norm         x + f(norm(x))              the stream is never normalised: its gradient reaches every layer
    post-norm        norm(x + f(x))              the original Transformer: each layer rescales stream and gradient
    output norm      x + norm(f(x))              OLMo 2: no layer can add more than its gain
    sandwich norm    x + norm'(f(norm(x)))       Gemma 2 to 4: both
    parallel         x + f(norm(x)) + g(norm(x))       GPT-J, PaLM: attention and feed-forward read the same input

with f the mixer and then the feed-forward layer. Every block has the same constructor and the same forward.
On Layer Normalization in the Transformer Architecture, arXiv 2002.04745. Blog: Normalization, pre- and post-norm.
"""

from collections.abc import Callable

from torch import Tensor, nn


class Block(nn.Module):
    """Pre-norm block: (B, T, D) -> (B, T, D). `norm` makes a fresh normalisation layer each time it is called."""

    def __init__(self, mixer: nn.Module, ffn: nn.Module, norm: Callable[[], nn.Module]):
        super().__init__()
        self.mixer_norm = norm()
        self.mixer = mixer
        self.ffn_norm = norm()
        self.ffn = ffn

    def forward(self, x: Tensor, positions: Tensor, cache: dict | None = None) -> Tensor:
        x = x + self.mixer(self.mixer_norm(x), positions, cache)
        return x + self.ffn(self.ffn_norm(x))


class PostNormBlock(Block):
    """Normalise the stream after each addition. Attention Is All You Need, arXiv 1706.03762, section 3.1.

    The output of the last block is normalised already, so the model needs no final norm. Gradients near the output are
    large at the start, so it needs a longer warm-up than the other blocks (arXiv 2002.04745).
    """

    def forward(self, x: Tensor, positions: Tensor, cache: dict | None = None) -> Tensor:
        x = self.mixer_norm(x + self.mixer(x, positions, cache))
        return self.ffn_norm(x + self.ffn(x))


class OutputNormBlock(Block):
    """Normalise what each sublayer adds, and nothing else. 2 OLMo 2 Furious, arXiv 2501.00656."""

    def forward(self, x: Tensor, positions: Tensor, cache: dict | None = None) -> Tensor:
        x = x + self.mixer_norm(self.mixer(x, positions, cache))
        return x + self.ffn_norm(self.ffn(x))


class SandwichBlock(Block):
    """Normalise what each sublayer reads and what it adds.

    CogView: Mastering Text-to-Image Generation via Transformers, arXiv 2105.13290; Gemma 2, arXiv 2408.00118.
    """

    def __init__(self, mixer: nn.Module, ffn: nn.Module, norm: Callable[[], nn.Module]):
        super().__init__(mixer, ffn, norm)
        self.mixer_output_norm = norm()
        self.ffn_output_norm = norm()

    def forward(self, x: Tensor, positions: Tensor, cache: dict | None = None) -> Tensor:
        x = x + self.mixer_output_norm(self.mixer(self.mixer_norm(x), positions, cache))
        return x + self.ffn_output_norm(self.ffn(self.ffn_norm(x)))


class ParallelBlock(nn.Module):
    """Mixer and feed-forward layer read the same normalised input, so that their products can be fused.

    PaLM: Scaling Language Modeling with Pathways, arXiv 2204.02311, section 2; first in GPT-J.
    """

    def __init__(self, mixer: nn.Module, ffn: nn.Module, norm: Callable[[], nn.Module]):
        super().__init__()
        self.norm = norm()
        self.mixer = mixer
        self.ffn = ffn

    def forward(self, x: Tensor, positions: Tensor, cache: dict | None = None) -> Tensor:
        normed = self.norm(x)
        return x + self.mixer(normed, positions, cache) + self.ffn(normed)


class TwoNormParallelBlock(Block):
    """The parallel block with a norm of its own for each branch. GPT-NeoX-20B, arXiv 2204.06745."""

    def forward(self, x: Tensor, positions: Tensor, cache: dict | None = None) -> Tensor:
        return x + self.mixer(self.mixer_norm(x), positions, cache) + self.ffn(self.ffn_norm(x))
