"""Learned positions: a table with one vector for each position, added to the token's.

    x_p = E[token_p] + P[p]

The table ends at the trained length: there is no vector for what comes after. Its numbers are drawn with a deviation
of 0.02, as token embeddings mostly are. Those of the ladder are not, they have 1 / sqrt(d_model) (0.044 at width 512):
there a position is at first the softer part of the sum.
Convolutional Sequence to Sequence Learning, arXiv 1705.03122, section 3.1; GPT-2. Blog: Position encoding, learned.
"""

import torch
from torch import Tensor, nn


class LearnedPosition(nn.Module):
    """Positions (T,) or (B, T) -> (.., T, d_model). Padding (negative positions) gets the first vector; nobody sees it.

    Raises ValueError for more tokens than the table has positions, on a CPU also for a position behind its end.
    """

    def __init__(self, max_seq_len: int, d_model: int):
        super().__init__()
        self.table = nn.Embedding(max_seq_len, d_model)
        nn.init.normal_(self.table.weight, std=0.02)

    def forward(self, positions: Tensor) -> Tensor:
        self.check(self.end_of(positions))
        return self.table(positions.clamp(min=0))

    def end_of(self, positions: Tensor) -> int:
        """One more than the last position, or the least that it may be: to look at positions themselves the host would
        wait for a GPU, and a compiled graph would break."""
        if positions.device.type != "cpu" or torch.compiler.is_compiling():
            return positions.shape[-1]
        return int(positions.max()) + 1

    def check(self, n_tokens: int) -> None:
        if n_tokens > self.table.num_embeddings:
            raise ValueError(
                f"{n_tokens} tokens do not fit: learned positions end at max_seq_len = {self.table.num_embeddings}; "
                "use a shorter text or train with more (--model.max-seq-len)"
            )
