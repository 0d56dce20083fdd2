"""Learned positions: a table with one vector for each position, added to the token's.

    x_p = E[token_p] + P[p]

The table ends at the trained length: there is no vector for what comes after.
Convolutional Sequence to Sequence Learning, arXiv 1705.03122, section 3.1; GPT-2. Blog: Position encoding, learned.
"""

from torch import Tensor, nn


class LearnedPosition(nn.Module):
    """Positions (T,) or (B, T) -> (.., T, d_model). Padding (negative positions) gets the first vector; nobody sees it.

    Raises ValueError for more tokens than the table has positions.
    """

    def __init__(self, max_seq_len: int, d_model: int):
        super().__init__()
        self.table = nn.Embedding(max_seq_len, d_model)
        nn.init.normal_(self.table.weight, std=0.02)  # as the token embedding

    def forward(self, positions: Tensor) -> Tensor:
        self.check(positions.shape[-1])
        return self.table(positions.clamp(min=0))

    def check(self, n_tokens: int) -> None:
        """By the length, not by the positions themselves: to look at those the host would wait for the device."""
        if n_tokens > self.table.num_embeddings:
            raise ValueError(
                f"{n_tokens} tokens do not fit: learned positions end at max_seq_len = {self.table.num_embeddings}; "
                "use a shorter text or train with more (--model.max-seq-len)"
            )
