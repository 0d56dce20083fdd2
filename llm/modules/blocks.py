"""Blocks: how attention (or another mixer), a feed-forward layer and their norms connect to the residual stream.

    pre-norm         x + f(norm(x))              the stream is not normalised: gradients flow through the sums unchanged
    scaled           x + r f(norm(x))            Granite: r < 1, so that no layer changes the stream much
    post-norm        norm(x + f(x))              the original Transformer: each norm rescales the gradient
    output norm      x + norm(f(x))              OLMo 2: the norm's gain limits what a layer adds
    sandwich norm    x + norm'(f(norm(x)))       Gemma 2 and 3: a norm before f and one after it
    parallel         x + f(norm(x)) + g(norm(x))       GPT-J, PaLM: attention and feed-forward read the same input

f is the mixer, then the feed-forward layer (parallel: g). All blocks have the same constructor and forward arguments,
but `MixerBlock` and `FFNBlock`, which have only one of the two. On Layer Normalization in the Transformer Architecture,
arXiv 2002.04745. Blog: Normalization, pre- and post-norm.
"""

from collections.abc import Callable

from torch import Tensor, nn


class Block(nn.Module):
    """Pre-norm block: (B, T, D) -> (B, T, D). `norm` returns a new normalisation layer at each call."""

    title = "Pre-norm"

    def __init__(self, mixer: nn.Module, ffn: nn.Module, norm: Callable[[], nn.Module]):
        super().__init__()
        self.mixer_norm = norm()
        self.mixer = mixer
        self.ffn_norm = norm()
        self.ffn = ffn

    def forward(self, x: Tensor, positions: Tensor, cache: dict | None = None) -> Tensor:
        x = x + self.mixer(self.mixer_norm(x), positions, cache)
        return x + self.ffn(self.ffn_norm(x))


class MixerBlock(nn.Module):
    """Pre-norm block of a mixer alone, for mixers that widen and gate the stream themselves, such as Mamba's."""

    def __init__(self, mixer: nn.Module, norm: Callable[[], nn.Module]):
        super().__init__()
        self.mixer_norm = norm()
        self.mixer = mixer

    def forward(self, x: Tensor, positions: Tensor, cache: dict | None = None) -> Tensor:
        return x + self.mixer(self.mixer_norm(x), positions, cache)


class FFNBlock(nn.Module):
    """Pre-norm block of a feed-forward layer alone, as in Nemotron-H. It keeps nothing, so its cache is empty."""

    def __init__(self, ffn: nn.Module, norm: Callable[[], nn.Module]):
        super().__init__()
        self.ffn_norm = norm()
        self.ffn = ffn

    def forward(self, x: Tensor, positions: Tensor, cache: dict | None = None) -> Tensor:
        return x + self.ffn(self.ffn_norm(x))


class ScaledBlock(Block):
    """Pre-norm block that multiplies what each sublayer adds by a constant `scale`, so that deep models train stably at
    a learning rate chosen for others. Tensor Programs VI: Feature Learning in Infinite-Depth Neural Networks, arXiv
    2310.02244; Granite."""

    title = "Pre-norm, scaled"

    def __init__(self, mixer: nn.Module, ffn: nn.Module, norm: Callable[[], nn.Module], scale: float):
        super().__init__(mixer, ffn, norm)
        self.scale = scale

    def forward(self, x: Tensor, positions: Tensor, cache: dict | None = None) -> Tensor:
        x = x + self.scale * self.mixer(self.mixer_norm(x), positions, cache)
        return x + self.scale * self.ffn(self.ffn_norm(x))


class PostNormBlock(Block):
    """Normalise the stream after each addition. Attention Is All You Need, arXiv 1706.03762, section 3.1.

    The output of the last block is normalised already, so the model needs no final norm. At the start, gradients near
    the output are large, so training needs a longer warm-up than with other blocks (arXiv 2002.04745).
    """

    title = "Post-norm"

    def forward(self, x: Tensor, positions: Tensor, cache: dict | None = None) -> Tensor:
        x = self.mixer_norm(x + self.mixer(x, positions, cache))
        return self.ffn_norm(x + self.ffn(x))


class OutputNormBlock(Block):
    """Normalise the output of each sublayer, not its input. 2 OLMo 2 Furious, arXiv 2501.00656."""

    title = "Output norm"

    def forward(self, x: Tensor, positions: Tensor, cache: dict | None = None) -> Tensor:
        x = x + self.mixer_norm(self.mixer(x, positions, cache))
        return x + self.ffn_norm(self.ffn(x))


class SandwichBlock(Block):
    """Normalise both the input and the output of each sublayer.

    CogView: Mastering Text-to-Image Generation via Transformers, arXiv 2105.13290; Gemma 2, arXiv 2408.00118.
    """

    title = "Sandwich norm"

    def __init__(self, mixer: nn.Module, ffn: nn.Module, norm: Callable[[], nn.Module]):
        super().__init__(mixer, ffn, norm)
        self.mixer_output_norm = norm()
        self.ffn_output_norm = norm()

    def forward(self, x: Tensor, positions: Tensor, cache: dict | None = None) -> Tensor:
        x = x + self.mixer_output_norm(self.mixer(self.mixer_norm(x), positions, cache))
        return x + self.ffn_output_norm(self.ffn(self.ffn_norm(x)))


class ParallelBlock(nn.Module):
    """Mixer and feed-forward layer read the same normalised input, so their input projections could be fused.

    PaLM: Scaling Language Modeling with Pathways, arXiv 2204.02311, section 2; GPT-J used it first.
    """

    title = "Parallel"

    def __init__(self, mixer: nn.Module, ffn: nn.Module, norm: Callable[[], nn.Module]):
        super().__init__()
        self.norm = norm()
        self.mixer = mixer
        self.ffn = ffn

    def forward(self, x: Tensor, positions: Tensor, cache: dict | None = None) -> Tensor:
        normed = self.norm(x)
        return x + self.mixer(normed, positions, cache) + self.ffn(normed)


class TwoNormParallelBlock(Block):
    """The parallel block with a separate norm for each branch. GPT-NeoX-20B, arXiv 2204.06745."""

    title = "Parallel, two norms"

    def forward(self, x: Tensor, positions: Tensor, cache: dict | None = None) -> Tensor:
        return x + self.mixer(self.mixer_norm(x), positions, cache) + self.ffn(self.ffn_norm(x))
