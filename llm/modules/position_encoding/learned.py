"""Learned positions: a table with one vector for each position, which is added to the token embedding.

    x_p = E[token_p] + P[p]

The table has max_seq_len rows, so later positions have no vector. Its standard deviation at initialisation is 0.02.
Convolutional Sequence to Sequence Learning, arXiv 1705.03122, section 3.1; GPT-2. Blog: Position encoding, learned.
"""

from torch import Tensor, nn

from llm.modules.kernels.precision import is_remote


class LearnedPosition(nn.Module):
    """Positions (T,) or (B, T) -> (.., T, d_model). Padding (negative positions) gets the vector of position 0; masks
    hide it. Raises ValueError on a CPU for a position beyond the table, elsewhere for more tokens than rows.
    """

    def __init__(self, max_seq_len: int, d_model: int):
        super().__init__()
        self.table = nn.Embedding(max_seq_len, d_model)
        nn.init.normal_(self.table.weight, std=0.02)

    def forward(self, positions: Tensor) -> Tensor:
        self.check(positions.shape[-1] if is_remote(positions) else int(positions.max()) + 1)
        return self.table(positions.clamp(min=0))

    def check(self, n_tokens: int) -> None:
        """Raises ValueError if the table has fewer than `n_tokens` positions."""
        if n_tokens > self.table.num_embeddings:
            raise ValueError(
                f"{n_tokens} tokens do not fit: learned positions end at max_seq_len = {self.table.num_embeddings}; "
                "use a shorter text or train with more (--model.max-seq-len)"
            )
