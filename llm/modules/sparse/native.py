"""Native Sparse Attention (NSA): a coarse look at everything, a close look at the few blocks it points to, and a
window.

    compressed   one key and value for each block of l tokens, every d tokens:  k~_c = W [k_t + e_t, t in block]
                 p = softmax(scale q . k~) over the blocks that are finished;  o_1 = sum_c p_c v~_c
    selected     blocks of l' tokens: the first, the query's own and the one before, and the best by
                 importance_j = sum over the heads that share a key head, and over c, of p_c times the strides that
                 block j and c have in common;  o_2 = attention to the tokens of the n selected
    window       o_3 = attention to the last w tokens
    head         g_1 o_1 + g_2 o_2 + g_3 o_3       g = sigmoid(x W_g), for each head; keys and values per branch

The choice has no gradient. What teaches it is the compressed branch, whose probabilities are the importance. In a text
shorter than a compressed block, W and e have no gradient either. Heads that share keys share the choice, so that keys
are read once for all of them.

Native Sparse Attention: Hardware-Aligned and Natively Trainable Sparse Attention, arXiv 2502.11089, section 3. There W
is an MLP; a matrix does here. Blog: Attention, learned sparse attention.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llm.modules.cache import Places, empty_slots, store
from llm.modules.kernels.attention import attend
from llm.modules.masks import Window, mean_keys
from llm.modules.sparse.chosen import QUERIES, attend_to_chosen, compute, mean_chosen, tokens_of
from llm.modules.sparse.summaries import all_blocks, finished, mean_summaries, n_summaries, tokens_in, write


class Compress(nn.Module):
    """Blocks of keys or values (B, n, size, H_kv, D) -> one for each block, (B, n, H_kv, D)."""

    no_weight_decay = ("place",)

    def __init__(self, size: int, stride: int, n_kv_heads: int, head_dim: int):
        super().__init__()
        self.place = nn.Parameter(torch.zeros(size, head_dim))
        self.block_proj = BlockProjection(size, stride, n_kv_heads, head_dim)

    def forward(self, blocks: Tensor) -> Tensor:
        placed = blocks + self.place[:, None].to(blocks.dtype)
        return self.block_proj(placed.transpose(2, 3).flatten(3))


class BlockProjection(nn.Linear):
    """size head_dim -> head_dim, once for each block and key head, while other linear layers run once a token."""

    def __init__(self, size: int, stride: int, n_kv_heads: int, head_dim: int):
        super().__init__(size * head_dim, head_dim, bias=False)
        self.size, self.stride, self.n_kv_heads = size, stride, n_kv_heads

    def flops(self, context: int) -> float:
        """FLOPs per token of a text that is read at once; decoding computes one block a token, finished or not."""
        n_blocks = n_summaries(context, self.size, self.stride)
        return 2 * self.weight.numel() * self.n_kv_heads * n_blocks / context


class NativeSparseAttention(nn.Module):
    """(B, T, d_model) -> (B, T, d_model).

    compress_size, compress_stride   tokens in a compressed block, and from one to the next
    select_size, n_selected          tokens in a selected block, and how many of them a query sees
    window_size                      tokens that the window shows, the query's own among them
    rope                             rotates queries and keys (B, T, H, D); keys are rotated before they are compressed

    Raises ValueError where compress_stride does not divide the two sizes, or fewer than 3 blocks are selected.
    """

    def __init__(
        self,
        *,
        d_model: int,
        n_heads: int,
        n_kv_heads: int,
        compress_size: int,
        compress_stride: int,
        select_size: int,
        n_selected: int,
        window_size: int,
        rope: nn.Module | None = None,
    ):
        super().__init__()
        if compress_size % compress_stride or select_size % compress_stride:
            raise ValueError(
                f"compress_stride = {compress_stride} must divide compress_size = {compress_size} and select_size = "
                f"{select_size} (--model.compress-stride)"
            )
        if n_selected < 3:
            raise ValueError(f"n_selected = {n_selected} must be at least 3: three are fixed (--model.n-selected)")
        self.n_heads, self.n_kv_heads, self.head_dim = n_heads, n_kv_heads, d_model // n_heads
        self.size, self.stride, self.select_size, self.n_selected = (
            compress_size,
            compress_stride,
            select_size,
            n_selected,
        )
        self.mask, self.rope, self.scale = Window(window_size), rope, self.head_dim**-0.5
        self.q_proj = nn.Linear(d_model, n_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(d_model, 3 * n_kv_heads * self.head_dim, bias=False)  # for each branch
        self.v_proj = nn.Linear(d_model, 3 * n_kv_heads * self.head_dim, bias=False)
        self.gate_proj = nn.Linear(d_model, 3 * n_heads, bias=False)
        blocks = (compress_size, compress_stride, n_kv_heads, self.head_dim)
        self.compress_k, self.compress_v = Compress(*blocks), Compress(*blocks)
        self.o_proj = nn.Linear(n_heads * self.head_dim, d_model, bias=False)

    def forward(self, x: Tensor, positions: Tensor, cache: dict | None = None) -> Tensor:
        q = self.rotate(self.q_proj(x).unflatten(-1, (-1, self.head_dim)), positions).transpose(1, 2)  # (B, H, T, D)
        k = self.rotate(self.k_proj(x).unflatten(-1, (-1, self.head_dim)), positions).chunk(3, 2)  # 3 (B, T, H_kv, D)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim)).chunk(3, 2)
        if cache is None:
            summaries = (
                self.compress_k(all_blocks(k[0], self.size, self.stride)),
                self.compress_v(all_blocks(v[0], self.size, self.stride)),
            )
            near = k[2], v[2], Places(positions, positions, whole_text=True)
            chosen, positions = (k[1], v[1]), positions.expand(len(x), -1)
        else:
            summaries, chosen, near = self.update(cache, positions, k, v)
        n_keys, keep = chosen[0].shape[1], q.shape[2] <= QUERIES or not torch.is_grad_enabled()
        parts = []  # the scores of all queries at once would be T x N
        for n, (q_i, p) in enumerate(zip(q.split(QUERIES, 2), positions.split(QUERIES, 1), strict=True), 1):
            end = None if cache is not None else n_summaries(n * QUERIES, self.size, self.stride)
            earlier = (x[:, :end] for x in summaries)
            parts.append(compute(self.look_and_select, q_i, *earlier, p, n_keys, keep=keep))
        compressed, index, shown = (torch.cat(part, 2) for part in zip(*parts, strict=True))
        selected = attend_to_chosen(q, *chosen, index.clamp(max=n_keys - 1), shown, self.scale)
        k, v, places = near
        window = attend(q, k.transpose(1, 2), v.transpose(1, 2), places, self.mask)
        gates = self.gate_proj(x).sigmoid().unflatten(-1, (3, -1)).permute(2, 0, 3, 1)[..., None]  # (3, B, H, T, 1)
        heads = gates[0] * compressed + gates[1] * selected + gates[2] * window
        return self.o_proj(heads.transpose(1, 2).flatten(2))

    def rotate(self, heads: Tensor, positions: Tensor) -> Tensor:
        return heads if self.rope is None else self.rope(heads, positions)

    def look_and_select(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, n_keys: int) -> tuple[Tensor, ...]:
        """o_1 of `look_at_summaries`, and the tokens that it lets each query `select`."""
        compressed, importance = self.look_at_summaries(q, k, v, positions)
        return compressed, *self.select(importance, positions, n_keys)

    def look_at_summaries(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """q (B, H, T, D), summaries k and v (B, N, H_kv, D) -> o_1 (B, H, T, D) and the importance of all blocks of
        select_size tokens, (B, H_kv, T, J). A query before the end of the first block sees no summary: zeros."""
        k, v = k.transpose(1, 2)[:, :, None], v.transpose(1, 2)[:, :, None]  # (B, H_kv, 1, N, D)
        last = torch.arange(k.shape[3], device=q.device) * self.stride + self.size - 1
        seen = (last <= positions[..., None])[:, None, None]  # (B, 1, 1, T, N)
        q = q.unflatten(1, (self.n_kv_heads, -1))  # (B, H_kv, R, T, D)
        scores = (q @ k.mT * self.scale).masked_fill(~seen, torch.finfo(q.dtype).min)
        p = scores.softmax(-1) * seen  # (B, H_kv, R, T, N)
        with torch.no_grad():
            importance = self.share(p.sum(2))
        return (p @ v).flatten(1, 2), importance

    def share(self, p: Tensor) -> Tensor:
        """Probabilities (.., N) of compressed blocks -> importance (.., J) of the blocks to select from."""
        spread, per_block = self.size // self.stride, self.select_size // self.stride
        # by stride, (.., N + spread): one more than the blocks have, for a text that is too short for any block
        strides = F.pad(p, (spread - 1, spread)).unfold(-1, spread, 1).sum(-1)
        return F.pad(strides, (0, -strides.shape[-1] % per_block)).unflatten(-1, (-1, per_block)).sum(-1)

    @torch.no_grad()
    def select(self, importance: Tensor, positions: Tensor, n_keys: int) -> tuple[Tensor, Tensor]:
        """Importance (B, H_kv, T, J), positions (B, T) -> the tokens that each query may see, and whether it does,
        both (B, H_kv, T, n_selected select_size). The blocks of the last tokens have no importance yet."""
        position = positions[:, None, :, None]
        own = position // self.select_size
        n_blocks = max(self.n_selected, -(-n_keys // self.select_size))
        importance = F.pad(importance, (0, n_blocks - importance.shape[-1]))
        number = torch.arange(n_blocks, device=positions.device)
        fixed = (number == 0) | (number == own) | (number == own - 1)
        best, blocks = importance.masked_fill(fixed, torch.inf).masked_fill(number > own, -1).topk(self.n_selected, -1)
        index = tokens_of(blocks, self.select_size)
        return index, (index <= position) & (best >= 0).repeat_interleave(self.select_size, -1)

    def update(self, cache: dict, positions: Tensor, k: tuple, v: tuple) -> tuple[tuple, tuple, tuple]:
        """Put the keys and values of the three branches into the cache -> all summaries, all slots to choose from, and
        what the window attends to, with its places."""
        names = ("k", "v", "chosen_k", "chosen_v")
        store(cache, positions, **dict(zip(names, (k[0], v[0], k[1], v[1]), strict=True)))
        numbers, done = finished(positions, self.size, self.stride)
        for name, compress in (("k", self.compress_k), ("v", self.compress_v)):
            new = compress(tokens_in(cache[name], numbers, self.size, self.stride))
            write(cache[f"summary_{name}"], numbers, done, new)
        ring = {name: cache[f"near_{name}"] for name in ("k", "v", "pos")}
        near = store(ring, positions, k=k[2], v=v[2])
        return (cache["summary_k"], cache["summary_v"]), (cache["chosen_k"], cache["chosen_v"]), near

    def make_cache(self, batch_size: int, length: int) -> dict[str, Tensor]:
        """Slots for `length` tokens to compress and to choose from, a ring for the window, and the summaries."""
        shape, weight = (self.n_kv_heads, self.head_dim), self.k_proj.weight
        slots = empty_slots(batch_size, length, weight, k=shape, v=shape, chosen_k=shape, chosen_v=shape)
        ring = empty_slots(batch_size, min(length, self.mask.size), weight, k=shape, v=shape)
        n = n_summaries(length, self.size, self.stride) + 1
        summaries = {f"summary_{name}": slots["k"].new_zeros(batch_size, n, *shape) for name in "kv"}
        return slots | summaries | {f"near_{name}": tensor for name, tensor in ring.items()}

    def flops(self, context: int) -> float:
        """FLOPs per token, without the projections: the three branches, on the keys that a query sees in each."""
        compressed, near = mean_summaries(context, self.size, self.stride), mean_keys(self.mask, context)
        selected = mean_chosen(context, self.select_size, self.n_selected)
        return 4 * self.q_proj.out_features * (compressed + selected + near)
