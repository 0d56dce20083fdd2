"""Hide tokens for a model to fill in, so that its mean loss bounds the likelihood of the text.

A text of S tokens, written one token at a time in a random order o, has

    -log p(x) <= E_o [ sum_i -log p(x_o(i) | x_o(1) .. x_o(i-1)) ]                        Jensen's inequality
               = S E_k E_hidden [ 1/k sum over the k hidden tokens of -log p(x_j | the others) ]

since the tokens that are still missing are k random ones, and k = 1..S occurs once in each order. So k is drawn
uniformly, exactly k tokens are hidden, and the mean of their cross-entropies is an unbiased estimate of the bound for
each token. LLaDA and MDLM hide each token with probability t and weight by 1 / t, which has the same mean; with k exact
t is k / S, and the estimate varies less. The k of a batch are spread evenly over 1..S, so that it varies less again.

Autoregressive Diffusion Models, arXiv 2110.02037, section 3 (the bound); Simple and Effective Masked Diffusion Language
Models (MDLM), arXiv 2406.07524; LLaDA, arXiv 2502.09992; even spread: Variational Diffusion Models, arXiv 2107.00630.
Blog: Diffusion.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def hide(like: Tensor, group_size: int, generator: torch.Generator | None = None) -> Tensor:
    """Weights for texts with the shape and device of `like` (B, T): 1 / t in the tokens to hide, 0 elsewhere.

    Each group of `group_size` consecutive tokens is a text of its own in the bound. The mean over all tokens of weight
    times cross-entropy is the bound for each token. Random numbers come from torch's global generator where none is
    given. Raises ValueError where a text is no whole number of groups.
    """
    n_groups, rest = divmod(like.shape[1], group_size)
    if rest:
        raise ValueError(
            f"a text of {like.shape[1]} tokens is no whole number of blocks of {group_size}: choose a divisor "
            "(--model.block-size)"
        )
    k = hidden_counts(len(like) * n_groups, group_size, like.device, generator)[:, None]
    order = torch.rand(len(k), group_size, device=like.device, generator=generator)
    place = order.argsort(-1).argsort(-1)  # in a random order of each group
    return ((place < k) * group_size / k).view(like.shape)


def hidden_counts(
    n_groups: int, group_size: int, device: torch.device | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """How many tokens to hide in each group: int64 (n_groups,), each uniform on 1..group_size, all evenly spread."""
    even = torch.arange(n_groups, device=device) / n_groups
    u = (torch.rand((), device=device, generator=generator) + even) % 1  # one random shift for all: low discrepancy
    return (u * group_size).long().clamp(max=group_size - 1) + 1


class MaskableEmbedding(nn.Embedding):
    """A token embedding with one more vector, for a hidden token: its number is V, one past the vocabulary.

    Takes over the weight (V, D) of an embedding. The head may share it and cannot predict the hidden token.
    """

    def __init__(self, embedding: nn.Embedding, std: float):
        super().__init__(*embedding.weight.shape, _weight=embedding.weight)
        self.hidden_token = nn.Parameter(nn.init.normal_(torch.empty(self.weight.shape[1]), std=std))

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 (..) -> (.., D)."""
        hidden = tokens == len(self.weight)
        x = F.embedding(tokens.masked_fill(hidden, 0), self.weight)
        return torch.where(hidden[..., None], self.hidden_token.to(x.dtype), x)
