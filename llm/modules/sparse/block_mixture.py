"""Mixture of Block Attention (MoBA): each query attends to a few blocks of keys, as a token goes to a few experts.

    s_j = q . mean(keys of block j)          the router, without a parameter of its own
    the query's own block, up to itself, and the top k - 1 of the finished blocks by s_j; softmax over all their tokens

The choice has no gradient: keys learn to be found because what is found is attended to. With k at least the number of
blocks this is full attention. MoBA: Mixture of Block Attention for Long-Context LLMs, arXiv 2502.13189.
Blog: Attention, learned sparse attention.
"""

import torch
from torch import Tensor

from llm.modules.attention.core import share_heads
from llm.modules.attention.multi_head import MultiHeadAttention
from llm.modules.cache import empty_slots
from llm.modules.kernels.precision import without_autocast
from llm.modules.recurrent.state import widen
from llm.modules.sparse.chosen import attend_to_chosen, mean_chosen, tokens_of
from llm.modules.sparse.summaries import all_blocks, finished, n_summaries, tokens_in, write


class BlockMixtureAttention(MultiHeadAttention):
    """Multi-head attention to `top_k` blocks of `block_size` tokens, the query's own among them.

    `options` are those of MultiHeadAttention, except mask and score_bias: the chosen blocks are all that a query sees.
    Raises ValueError for a size below 1, and where a mask or score_bias is given.
    """

    def __init__(self, *, block_size: int, top_k: int, **options):
        if given := options.keys() & {"mask", "score_bias"}:
            raise ValueError(f"block mixture attention has no {' and no '.join(sorted(given))}: leave them out")
        super().__init__(**options)
        if block_size < 1 or top_k < 1:
            raise ValueError(
                f"block_size = {block_size} and top_k = {top_k} must be at least 1 (--model.block-size, --model.top-k)"
            )
        self.block_size, self.top_k = block_size, top_k

    def forward(self, x: Tensor, positions: Tensor, cache: dict | None = None) -> Tensor:
        q, k, v = self.project(x, positions)
        if cache is None:
            positions, means = positions.expand(len(x), -1), all_blocks(k, self.block_size, self.block_size).mean(2)
        else:
            self.store(cache, positions, k, v)
            k, v = cache["k"], cache["v"]  # token p is in slot p, since the slots suffice for the text
            means = self.update_means(cache, positions)
        q = q.transpose(1, 2)
        means, k, v = (share_heads(q, y.transpose(1, 2)) for y in (means, k, v))
        index, shown = self.choose(q, means, positions)
        scale = self.head_dim**-0.5 if self.scale is None else self.scale
        index = index.clamp(max=k.shape[2] - 1)
        return self.output(attend_to_chosen(q, k.transpose(1, 2), v.transpose(1, 2), index, shown, scale), x)

    def update_means(self, cache: dict, positions: Tensor) -> Tensor:
        """The means of all blocks (B, N + 1, H_kv, D), with those that the new tokens finish."""
        numbers, done = finished(positions, self.block_size, self.block_size)
        blocks = tokens_in(cache["k"], numbers, self.block_size, self.block_size)
        write(cache["means"], numbers, done, blocks.mean(2))
        return cache["means"]

    @torch.no_grad()
    def choose(self, q: Tensor, means: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """q (B, H, T, D), means (B, H, N, D), positions (B, T) -> the tokens that each query may see, and whether it
        does, both (B, H, T, top_k block_size)."""
        position = positions[:, None, :, None]  # (B, 1, T, 1)
        own = position // self.block_size
        number = torch.arange(means.shape[2], device=q.device)
        with without_autocast(q):  # in bf16 other blocks would be the best
            scores = (widen(q) @ widen(means).mT).masked_fill(number >= own, -torch.inf)  # (B, H, T, N)
        best, chosen = scores.topk(min(self.top_k - 1, len(number)), -1)
        blocks = torch.cat([own.expand(*q.shape[:3], 1), chosen], -1)
        found = torch.cat([(own >= 0).expand(*q.shape[:3], 1), best > -torch.inf], -1)
        index = tokens_of(blocks, self.block_size)
        shown = (index <= position) & found.repeat_interleave(self.block_size, -1)
        return index.clamp(min=0), shown

    def make_cache(self, batch_size: int, length: int) -> dict[str, Tensor]:
        """Slots for `length` tokens, and the mean key of each of their blocks."""
        shape = (self.n_kv_heads, self.head_dim)
        slots = empty_slots(batch_size, length, self.k_proj.weight, k=shape, v=shape)
        n_blocks = n_summaries(length, self.block_size, self.block_size)
        return slots | {"means": slots["k"].new_zeros(batch_size, n_blocks + 1, *shape)}

    def flops(self, context: int) -> float:
        """FLOPs per token: queries times the means of earlier blocks, and attention to the chosen keys."""
        means = sum(token // self.block_size for token in range(context)) / context
        return self.q_proj.out_features * (2 * means + 4 * mean_chosen(context, self.block_size, self.top_k))
