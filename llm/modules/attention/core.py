"""Scaled dot-product attention, twice: as the equation says it, and as the fused kernel that training uses.

    Attention(q, k, v) = softmax(q k^T / sqrt(d) + bias) v

Attention Is All You Need, arXiv 1706.03762, section 3.2.1. Blog: Attention, multi-head attention and its cost.

Shapes: q (B, H, T, D); k (B, H_kv, S, D); v (B, H_kv, S, D_v); the result is (B, H, T, D_v). With H_kv < H, consecutive
query heads share a key head. `mask` broadcasts to (B, H, T, S): booleans (True: attend) or numbers added to the scores.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from llm.modules.attention.query_blocks import blocked_attention, blocks_serve
from llm.modules.masks import Visible, causal, visibility

FEW_QUERIES = 64  # of a text; where heads share one key and are told apart as queries (MLA), of all its heads


def explicit_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """The equation, line by line: T x S scores are held in memory. `scale` replaces 1 / sqrt(D)."""
    k, v = share_heads(q, k), share_heads(q, v)
    scores = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)  # (B, H, T, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else scores + mask
    return scores.softmax(-1) @ v


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None, is_causal: bool = False
) -> Tensor:
    """The same in one kernel, which never holds all the scores. `is_causal` needs T = S: query i sees keys 0..i.

    The CPU's kernel shares heads itself, which is faster and keeps k and v small for the backward pass; on a GPU the
    kernels that take a mask want as many key heads as query heads.
    """
    if q.device.type != "cpu":
        k, v = share_heads(q, k), share_heads(q, v)
    shared = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, is_causal=is_causal, enable_gqa=shared)


def few_queries_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None = None) -> Tensor:
    """The explicit products for a step of decoding: few scores, which a kernel made for many tiles at a loss.

    `mask` (B, 1 or H, T, S). With one query a text, the heads that share a key head become that head's queries: so no
    key is repeated.
    """
    if q.shape[2] > 1 or mask.shape[1] > 1:
        return explicit_attention(q, k, v, mask, scale)
    heads = q.squeeze(2).unflatten(1, (k.shape[1], -1))  # (B, H_kv, H / H_kv, D)
    return explicit_attention(heads, k, v, mask, scale).flatten(1, 2)[:, :, None]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_pos: Tensor,
    k_pos: Tensor,
    visible: Visible = causal,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Fused attention of queries at `q_pos` to the keys at `k_pos` that `visible` shows them; `bias` adds to scores.

    q_pos (T,) or (B, T); k_pos (S,) or (B, S); bias (H, T, S) or (B, H, T, S). Without a cache q_pos is k_pos, 0..T-1,
    and the mask need not be written out. Which way the numbers take, the first that fits:

    | cache, bias | device | dtype       | visible                  | way                                              |
    |-------------|--------|-------------|--------------------------|--------------------------------------------------|
    | no cache    | CPU    | bf16        | with a reach; T <= 512   | `blocked_attention`: in blocks of queries        |
    | neither     | any    | any         | causal                   | fused kernel, without a mask                     |
    | no cache    | CUDA   | not float64 | any                      | `flex_attention` where it compiles: skips blocks |
    | a cache     | any    | any         | any; at most 64 queries  | `few_queries_attention`: two plain products      |
    | any         | any    | any         | any                      | fused kernel, with the mask written out          |
    """
    q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast the gain of a norm leaves them in fp32
    if uncached(q_pos, k_pos) and blocks_serve(q, visible):
        return blocked_attention(q, share_heads(q, k), share_heads(q, v), visible, scale, bias)
    if uncached(q_pos, k_pos) and bias is None and visible is causal:
        return fused_attention(q, k, v, scale=scale, is_causal=True)
    if uncached(q_pos, k_pos) and q.is_cuda:
        from llm.modules.attention.flex import flex_attention, flex_serves  # costs seconds, so only where it serves

        if flex_serves(q, k, bias):
            return flex_attention(q, k, v, visible, scale, bias=bias)
    mask = visibility(visible, q_pos, k_pos)
    if bias is not None:
        mask = bias.masked_fill(~mask, -torch.inf).to(q.dtype)
    if q_pos.dim() == 2 and q.shape[2] <= FEW_QUERIES:
        return few_queries_attention(q, k, v, mask, scale)
    return fused_attention(q, k, v, mask, scale)


def uncached(q_pos: Tensor, k_pos: Tensor) -> bool:
    """Queries and keys are the same whole text, from position 0 on: so it is in training."""
    return q_pos is k_pos and q_pos.dim() == 1


def share_heads(q: Tensor, k: Tensor) -> Tensor:
    """Repeat each of the H_kv key heads for the H / H_kv query heads that share it: (B, H_kv, S, D) -> (B, H, S, D)."""
    n_shared = q.shape[1] // k.shape[1]
    return k if n_shared == 1 else k.repeat_interleave(n_shared, 1)
