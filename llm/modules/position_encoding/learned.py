"""Learned positions: a table with one vector for each position, added to the token's.

    x_p = E[token_p] + P[p]

The table ends at the trained length: later positions have no vector. Its numbers are drawn with a deviation of 0.02.
Convolutional Sequence to Sequence Learning, arXiv 1705.03122, section 3.1; GPT-2. Blog: Position encoding, learned.
"""

from torch import Tensor, nn

from llm.modules.kernels.precision import is_remote


class LearnedPosition(nn.Module):
    """Positions (T,) or (B, T) -> (.., T, d_model). Padding (negative positions) gets the first vector, which no mask
    shows. Raises ValueError for more tokens than the table has positions, on a CPU also for a position beyond its end.
    """

    def __init__(self, max_seq_len: int, d_model: int):
        super().__init__()
        self.table = nn.Embedding(max_seq_len, d_model)
        nn.init.normal_(self.table.weight, std=0.02)

    def forward(self, positions: Tensor) -> Tensor:
        self.check(positions.shape[-1] if is_remote(positions) else int(positions.max()) + 1)
        return self.table(positions.clamp(min=0))

    def check(self, n_tokens: int) -> None:
        """Raises ValueError where a text of `n_tokens` tokens does not fit."""
        if n_tokens > self.table.num_embeddings:
            raise ValueError(
                f"{n_tokens} tokens do not fit: learned positions end at max_seq_len = {self.table.num_embeddings}; "
                "use a shorter text or train with more (--model.max-seq-len)"
            )
