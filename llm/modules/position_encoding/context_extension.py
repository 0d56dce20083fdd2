"""Longer contexts: how a model trained with RoPE up to some length reads texts `factor` times as long.

RoPE rotates a pair of channels by f radians per token. A pair that does not complete a turn within the trained length L
meets new angles beyond L. Each method below replaces f by f' (d is the number of rotated channels):

| method               | f'                                                                                          |
|----------------------|---------------------------------------------------------------------------------------------|
| linear interpolation | f / factor: no new angles, but the angles of neighbouring tokens differ less                |
| NTK-aware            | theta' = theta factor^(d / (d - 2)): the slowest pair f / factor, the fastest f             |
| dynamic NTK          | the same with growth(n) in place of factor for a text of n > L tokens; f up to L            |
| YaRN                 | f above beta_fast turns in L tokens, f / factor below beta_slow, a ramp in between;         |
|                      | scores times (0.1 ln(factor) + 1)^2, since the softmax over a longer text is flatter        |
| Llama 3              | f above high_freq_factor turns, f / factor below low_freq_factor, linear in turns between   |
| LongRoPE             | f / a searched number for each pair: one list up to L tokens, another one beyond            |

A scaling is called with (rotary_dim, theta, positions). It returns the frequencies (.., rotary_dim / 2) in fp32 and a
number by which cosines and sines are multiplied: `RoPE(head_dim, theta, scaling=YaRN(factor=4, original_length=512))`.
No scaling has weights: to read longer texts, a trained model is built again with a scaling. Blog: Position encoding,
longer context.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from llm.modules.position_encoding.rope import inverse_frequencies


@dataclass(frozen=True)
class LinearInterpolation:
    """Extending Context Window of Large Language Models via Positional Interpolation, arXiv 2306.15595."""

    factor: float

    def __post_init__(self):
        check(self, "factor")

    def __call__(self, dim: int, theta: float, positions: Tensor) -> tuple[Tensor, float]:
        return inverse_frequencies(dim, theta, positions.device) / self.factor, 1.0


@dataclass(frozen=True)
class NTKAware:
    """A larger base. Described in section 3.1 of YaRN, arXiv 2309.00071, after posts by bloc97 on Reddit."""

    factor: float

    def __post_init__(self):
        check(self, "factor")

    def __call__(self, dim: int, theta: float, positions: Tensor) -> tuple[Tensor, float]:
        return inverse_frequencies(dim, larger_base(theta, self.factor, dim), positions.device), 1.0


@dataclass(frozen=True)
class DynamicNTK:
    """NTKAware for the length n of each text, which is its largest position in the call + 1:

        growth = factor n / L - (factor - 1) for n > L, else 1        theta' = theta growth^(d / (d - 2))

    With factor 1 that is max(1, n / L), the form of the paper: YaRN, arXiv 2309.00071, section 3.3, after a post by
    emozilla on Reddit. Other factors are the form of transformers and its checkpoints (rope_type "dynamic"), which grow
    faster: with factor 4 a text of 4 L has growth 13, not 4.

    With positions (B, T), each row has its own length and frequencies (B, 1, 1, rotary_dim / 2), so no text depends on
    the others in its batch. transformers uses the longest row for all; a batch of one text gives the same in both.

    Beyond L, a cached text differs from the same text computed at once. Each new token is rotated for the length up to
    itself, and the keys in the cache keep the rotation of the length at which they were computed. transformers does the
    same, so cached text is equal to its cached text.
    """

    factor: float
    original_length: int

    def __post_init__(self):
        check(self, "factor", "original_length")

    def __call__(self, dim: int, theta: float, positions: Tensor) -> tuple[Tensor, float]:
        length = (positions.amax(-1) + 1).clamp(min=self.original_length)  # a tensor: the host does not wait for it
        if positions.dim() == 2:
            length = length[:, None, None, None]
        growth = self.factor * length / self.original_length - (self.factor - 1)
        return inverse_frequencies(dim, larger_base(theta, growth, dim), positions.device), 1.0


@dataclass(frozen=True)
class YaRN:
    """YaRN: Efficient Context Window Extension of Large Language Models, arXiv 2309.00071, sections 3.2 and 3.4.

    truncate                round the ends of the ramp outwards to whole pairs; GPT-OSS does not
    attention_factor        multiplies cosines and sines, so scores by its square; 0.1 ln(factor) + 1 if not given
    mscale, mscale_all_dim  DeepSeek's two settings. With both, attention_factor is the ratio of their `yarn_mscale`.
                            DeepSeek's attention also multiplies scores by yarn_mscale(factor, mscale_all_dim)^2
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None

    def __post_init__(self):
        check(self, "factor", "original_length")
        if not 0 < self.beta_slow <= self.beta_fast:
            raise ValueError(
                f"beta_slow = {self.beta_slow} must lie above 0 and not above beta_fast = {self.beta_fast}"
            )

    def __call__(self, dim: int, theta: float, positions: Tensor) -> tuple[Tensor, float]:
        pair = torch.arange(dim // 2, device=positions.device, dtype=torch.float32)
        first, last = self.ramp(dim, theta)
        kept = 1 - ((pair - first) / (last - first)).clamp(0, 1)
        wavelengths = theta ** (2 * pair / dim)
        return 1 / (self.factor * wavelengths) * (1 - kept) + 1 / wavelengths * kept, self.temperature()

    def ramp(self, dim: int, theta: float) -> tuple[float, float]:
        """The pair indices at which the ramp starts and ends."""
        first = pair_that_turns(self.beta_fast, self.original_length, dim, theta)
        last = pair_that_turns(self.beta_slow, self.original_length, dim, theta)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, dim - 1)
        return first, last + 0.001 if first == last else last

    def temperature(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return yarn_mscale(self.factor, self.mscale) / yarn_mscale(self.factor, self.mscale_all_dim)
        return yarn_mscale(self.factor)


@dataclass(frozen=True)
class Llama3Bands:
    """Fast pairs kept, slow ones interpolated, from Llama 3.1 on: `apply_scaling` in Meta's own code (meta-llama/
    llama-models, models/llama3/model.py). The paper, The Llama 3 Herd of Models, arXiv 2407.21783, describes theta =
    500,000 in sections 3.2 and 3.4.2, but not the bands. Published values are factor 8 (32 in 3.2), low_freq_factor 1,
    high_freq_factor 4 and original_length 8192."""

    factor: float
    original_length: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def __post_init__(self):
        check(self, "factor", "original_length")
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor = {self.low_freq_factor} must lie between 0 and "
                f"high_freq_factor = {self.high_freq_factor}"
            )

    def __call__(self, dim: int, theta: float, positions: Tensor) -> tuple[Tensor, float]:
        frequencies = inverse_frequencies(dim, theta, positions.device)
        turns = self.original_length / (2 * math.pi / frequencies)  # within the trained length
        kept = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return (1 - kept) * frequencies / self.factor + kept * frequencies, 1.0


@dataclass(frozen=True)
class LongRoPE:
    """LongRoPE: Extending LLM Context Window Beyond 2 Million Tokens, arXiv 2402.13753; in Phi-3 and Phi-4-mini.

    The wavelength of each pair is multiplied by a number that was found by a search: by those in `short_factor` for a
    text of at most `original_length` tokens, by those in `long_factor` for a longer one. Cosines and sines are
    multiplied by `attention_factor`, which is sqrt(1 + ln(factor) / ln(original_length)) where it is not given. The
    length of a text is its largest position of the call + 1.

    Keys in a cache were rotated by the numbers of an earlier length. So decoding a text across `original_length`
    differs from computing all of it at once.
    """

    factor: float
    original_length: int
    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    attention_factor: float | None = None

    def __post_init__(self):
        check(self, "factor", "original_length")
        object.__setattr__(self, "short_factor", tuple(self.short_factor))
        object.__setattr__(self, "long_factor", tuple(self.long_factor))

    def __call__(self, dim: int, theta: float, positions: Tensor) -> tuple[Tensor, float]:
        """The frequencies are (1, 1, dim / 2), or (B, 1, 1, dim / 2) where each text has its own positions."""
        if not len(self.short_factor) == len(self.long_factor) == dim // 2:
            lengths = f"{len(self.short_factor)} and {len(self.long_factor)}"
            raise ValueError(
                f"short_factor and long_factor have {lengths} numbers: {dim} channels need {dim // 2} each"
            )
        short, long = (positions.new_tensor(x, dtype=torch.float32) for x in (self.short_factor, self.long_factor))
        is_long = (positions.amax(-1) + 1 > self.original_length)[..., None, None, None]
        frequencies = inverse_frequencies(dim, theta, positions.device)
        return frequencies / torch.where(is_long, long, short), self.temperature()

    def temperature(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original_length))


def larger_base(theta: float, growth: float | Tensor, dim: int) -> float | Tensor:
    """The base whose slowest frequency is theta's divided by `growth`."""
    if dim < 4:
        raise ValueError(f"NTK scaling needs rotary_dim = {dim} to be at least 4: a single pair has no base")
    return theta * growth ** (dim / (dim - 2))


def pair_that_turns(n_turns: float, length: int, dim: int, theta: float) -> float:
    """The (fractional) index i of the pair that makes `n_turns` full turns in `length` tokens."""
    return dim * math.log(length / (n_turns * 2 * math.pi)) / (2 * math.log(theta))


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """0.1 mscale ln(factor) + 1, whose square is YaRN's factor of the scores; 1 where the context is not extended."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def check(scaling, *names: str) -> None:
    """Raises ValueError where one of these fields is below 1."""
    for name in names:
        if not getattr(scaling, name) >= 1:
            raise ValueError(f"{type(scaling).__name__}: {name} = {getattr(scaling, name)} must be at least 1")
