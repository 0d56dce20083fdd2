"""Write by filling in: all tokens of a block start hidden, and a few become text in each step.

    in each of `steps` steps:   p = model(block)        draw a token for every hidden place
                                keep the tokens that are the surest, hide the others again

This is LLaDA's low-confidence remasking: the confidence of a token is the probability that the model gives it. With
order "random", random places are kept instead, which is the process that training hides tokens by. Fewer steps write
more tokens at once, each without knowing the others: faster and less coherent.

Drawing with a temperature is the paper's Gumbel noise: argmax(logits + temperature * Gumbel) is a draw from
softmax(logits / temperature). LLaDA, arXiv 2502.09992, section 2.4; MaskGIT, arXiv 2202.04200. Blog: Diffusion.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from llm.config import check_finite


@dataclass(frozen=True)
class Unmasking:
    """How a diffusion model writes. Raises ValueError for settings that cannot work."""

    steps: int = 32
    """Steps for each block; fewer are faster, and more than the block has tokens change nothing."""
    block_size: int = 32
    """Tokens that are written before the next ones begin; block diffusion has the block of its training instead."""
    order: Literal["confidence", "random"] = "confidence"
    """Which tokens of a step are kept: those that the model is surest of, or random ones."""
    guidance: float = 0.0
    """Classifier-free guidance: (1 + guidance) logits - guidance logits without the prompt; masked diffusion only."""
    seed: int = 0
    """Draws the random order: another one for each block, the same in all texts."""

    def __post_init__(self):
        check_finite(self, "--unmasking.")
        if self.steps < 1 or self.block_size < 1:
            raise ValueError(
                f"steps = {self.steps} and block_size = {self.block_size} must be at least 1 (--unmasking.steps, "
                "--unmasking.block-size)"
            )
        if self.order not in ("confidence", "random"):
            raise ValueError(f"order = {self.order!r} must be confidence or random (--unmasking.order)")


def fill_in(
    block: Tensor,
    hidden: Tensor,
    predict: Callable[[Tensor], Tensor],
    sampler: Callable[[Tensor], Tensor],
    unmasking: Unmasking,
    number: int = 0,
) -> Tensor:
    """Write the `hidden` (B, n) tokens of a block (B, n), the `number`-th of its text; the others stay.

    `predict` turns the block into logits (B, n, V), `sampler` logits into tokens (B, n). The number of steps follows
    from n alone, so a text of a batch is written as it would be alone.
    """
    steps = min(unmasking.steps, block.shape[1])
    n_hidden = hidden.sum(-1)
    generator = torch.Generator().manual_seed(unmasking.seed + 1_000_003 * number)
    places = torch.rand(block.shape[1], generator=generator).to(block.device)
    for step in range(1, steps + 1):
        logits = predict(block)
        drawn = sampler(logits)
        score = places.expand(drawn.shape)
        if unmasking.order == "confidence":
            score = logits.float().log_softmax(-1).gather(-1, drawn[..., None])[..., 0]
        rank = score.masked_fill(~hidden, -torch.inf).argsort(dim=-1, descending=True, stable=True).argsort(-1)
        to_stay_hidden = n_hidden * (steps - step) // steps  # (B,): as many tokens are written in each step
        kept = hidden & (rank < (hidden.sum(-1) - to_stay_hidden)[:, None])
        block, hidden = torch.where(kept, drawn, block), hidden & ~kept
    return block
