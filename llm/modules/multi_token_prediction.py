"""Multi-token prediction (MTP): predict tokens beyond the next one in training, so that each position teaches more.

    h_i^k = norm(block(W [norm(embed(t_(i+k))) | norm(h_i^(k-1))]))        logits of t_(i+k+1) = W_head h_i^k

h^0 is what the model's head reads. Module k combines h^(k-1) with the embedding of token i + k and predicts token
i + k + 1. So each prediction depends on all tokens before it, which independent heads do not give (arXiv 2404.19737).
Embedding and head are the model's own.

DeepSeek-V3 Technical Report, arXiv 2412.19437, section 2.2. Blog: Case studies, DeepSeek.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class PredictionModule(nn.Module):
    """h^(k-1) and the embeddings of the tokens k further on, both (B, T, D) -> h^k (B, T, D), ready for the head.

    `block` is one of the model's, `norm` makes a fresh normalisation layer. W reads the embedding first, as in the
    published weights; the report writes it second.
    """

    def __init__(self, d_model: int, block: nn.Module, norm: Callable[[], nn.Module]):
        super().__init__()
        self.embed_norm, self.hidden_norm = norm(), norm()
        self.in_proj = nn.Linear(2 * d_model, d_model, bias=False)
        self.block = block
        self.norm = norm()

    def forward(self, hidden: Tensor, embedded: Tensor) -> Tensor:
        x = self.in_proj(torch.cat([self.embed_norm(embedded), self.hidden_norm(hidden)], -1))
        return self.norm(self.block(x, torch.arange(x.shape[1], device=x.device)))
