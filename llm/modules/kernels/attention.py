"""Fast attention: one function that picks an implementation by device, dtype, length and mask.

Each computes `explicit_attention` of llm/modules/attention/core.py. The first that fits is taken; "plain" means without
bias, cap and sinks:

| queries and keys | device | dtype       | mask                 | way                                            |
|------------------|--------|-------------|----------------------|------------------------------------------------|
| whole, no cap    | CPU    | bf16        | looks back, T <= 512 | `blocked_attention`: in blocks of queries      |
| whole, plain     | any    | any         | causal               | `fused_attention`, which needs no mask         |
| whole            | CUDA   | not float64 | any                  | `flex_attention`, where it compiles            |
| cap; sinks, T = 1| any    | any         | any                  | `explicit_attention`: no fused kernel has tanh |
| sinks, T > 1     | any    | any         | any                  | `fused_sink_attention`                         |
| a cache; T <= 64 | any    | any         | any                  | `few_queries_attention`: two plain products    |
| any              | any    | any         | any                  | `fused_attention`, with the mask written out   |
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from llm.modules.attention.core import explicit_attention, share_heads
from llm.modules.cache import Places
from llm.modules.kernels.query_blocks import blocked_attention, blocks_serve
from llm.modules.masks import Causal, Mask, causal, visibility

FEW_QUERIES = 64  # T of one text; in absorbed MLA T times n_heads, since heads become queries


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    places: Places,
    mask: Mask = causal,
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """q (B, H, T, D), k (B, H_kv, S, D), v (B, H_kv, S, D_v) -> (B, H, T, D_v): each query attends to the keys that
    `mask` shows it. bias (H, T, S) or (B, H, T, S) adds to the scores; sinks (H,). Raises ValueError for a bias beside
    sinks."""
    if bias is not None and sinks is not None:
        raise ValueError("attend takes a bias or sinks, not both: no kernel here computes them together")
    q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast the gain of a norm leaves them in fp32
    if places.whole_text:
        if soft_cap is None and blocks_serve(q, mask):
            return blocked_attention(q, share_heads(q, k), share_heads(q, v), mask, scale, bias, sinks)
        if isinstance(mask, Causal) and bias is None and soft_cap is None and sinks is None:
            return fused_attention(q, k, v, scale=scale, is_causal=True)
        if q.is_cuda:
            from llm.modules.kernels.flex import flex_attention, flex_serves  # takes seconds to import

            if flex_serves(q, k, bias, sinks):
                return flex_attention(q, k, v, mask, scale, soft_cap, bias, sinks)
    shown = visibility(mask, places.q, places.k)
    if soft_cap is not None or (sinks is not None and q.shape[2] == 1):
        return explicit_attention(q, k, v, shown, scale, bias=bias, soft_cap=soft_cap, sinks=sinks)
    if sinks is not None:
        return fused_sink_attention(q, k, v, sinks, shown, scale)
    added = shown if bias is None else bias.masked_fill(~shown, -torch.inf).to(q.dtype)
    if places.q.dim() == 2 and q.shape[2] <= FEW_QUERIES:
        return few_queries_attention(q, k, v, added, scale)
    return fused_attention(q, k, v, added, scale)


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None, is_causal: bool = False
) -> Tensor:
    """PyTorch's SDPA, whose fused kernels never hold all the scores. `mask` holds booleans (True: attend) or numbers
    added to the scores. `is_causal` needs T = S: query i sees keys 0..i.

    The CPU's kernel shares heads itself, which is faster and keeps k and v small for the backward pass. On a GPU the
    kernels that take a mask want as many key heads as query heads.
    """
    if q.device.type != "cpu":
        k, v = share_heads(q, k), share_heads(q, v)
    shared = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, is_causal=is_causal, enable_gqa=shared)


def few_queries_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None = None) -> Tensor:
    """Plain products for a step of decoding: for few scores they are faster than a tiled kernel.

    `mask` (B, 1 or H, T, S), booleans or numbers. With T = 1 and one mask for all heads, the heads that share a
    key head become its queries, so no key is repeated.
    """
    grouped = q.shape[2] == 1 and mask.shape[1] == 1
    heads = q.squeeze(2).unflatten(1, (k.shape[1], -1)) if grouped else q  # (B, H_kv, H / H_kv, D)
    shown, bias = (mask, None) if mask.dtype is torch.bool else (None, mask)
    out = explicit_attention(heads, k, v, shown, scale, bias=bias)
    return out.flatten(1, 2)[:, :, None] if grouped else out


def fused_sink_attention(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, shown: Tensor, scale: float | None = None
) -> Tensor:
    """Sinks with a fused kernel that has none: an extra channel and an extra key have the same effect.

    q' = [q, sink_h / scale], k' = [k, 0], and a last key [0, 1] with value 0 that every query sees: its score is
    q' k' * scale = sink_h, and the other scores do not change. Key heads stay shared. The width grows by 8, not by 1,
    since kernels want multiples of 8; v is padded to it and the result is cut back.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    width, v_width = q.shape[-1], v.shape[-1]
    sink = F.pad((sinks / scale).to(q.dtype)[:, None, None], (0, 7))  # (H, 1, 8)
    q = torch.cat([q, sink.expand(*q.shape[:3], 8)], -1)  # (B, H, T, D + 8)
    sink_key = F.pad(k.new_ones(*k.shape[:2], 1, 1), (width, 7))  # (B, H_kv, 1, D + 8)
    k = torch.cat([F.pad(k, (0, 8)), sink_key], -2)
    v = F.pad(v, (0, width + 8 - v_width, 0, 1))
    return fused_attention(q, k, v, F.pad(shown, (0, 1), value=True), scale)[..., :v_width]
