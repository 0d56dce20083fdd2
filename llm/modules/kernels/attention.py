"""Fast attention: one function that picks an implementation by device, dtype, length and mask.

Each implementation gives the result of `explicit_attention` (llm/modules/attention/core.py). The first row that fits
is taken:

| queries, keys        | device | dtype       | mask, and what is added        | implementation                      |
|----------------------|--------|-------------|--------------------------------|-------------------------------------|
| one text, T <= 512   | CPU    | bf16        | looks back, hides none; no cap | `blocked_attention`                 |
| one text             | any    | any         | hides none; nothing added      | `fused_attention`, without a mask   |
| one text             | any    | any         | causal; a sink, channels, none | `fused_..attention`, without a mask |
| one text             | CUDA   | not float64 | any, no cap; long: no bias     | `flex_attention`, where it compiles |
| one text, T > 512    | any    | any         | every n-th token               | n texts side by side                |
| one text, T > 512    | CPU    | not bf16 *  | few keys; nothing added        | `gathered_attention`                |
| one text, T > 512    | any    | any         | few keys; no bias, no cap      | `blocked_attention`                 |
| one text, T > 512    | any    | any         | looks back                     | `recomputed_attention`              |
| with a cap           | any    | any         | any                            | `explicit_attention`                |
| with sinks           | any    | any         | any; several queries           | `fused_sink_attention`              |
| cache, <= 64 queries | any    | any         | any                            | `few_queries_attention`             |
| any                  | any    | any         | any                            | `fused_attention`, mask written out |

* A CPU that only emulates bf16 computes long texts in fp32 (precision.py). "Long" is decided by `is_long`. None of the
implementations for one long text holds T x T numbers. Those that compute blocks of queries stay outside an enclosing
torch.compile.

A bias is a function (q_pos, k_pos) -> numbers added to the scores, (H, T, S) or (B, H, T, S). A kernel may call it for
a part of the positions. If the bias has weights, its method `parameters` gives them, as that of a module does. If it is
a product of one vector for each head and one for each key, `channels` gives both (alibi.py).
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from llm.modules.attention.core import explicit_attention, share_heads
from llm.modules.cache import Places
from llm.modules.kernels.gathered import gathered_attention, gathering_serves
from llm.modules.kernels.precision import without_slow_bf16
from llm.modules.kernels.query_blocks import blocked_attention, blocks_serve, is_long
from llm.modules.kernels.recomputed import recomputed_attention
from llm.modules.kernels.seen_blocks import FEWEST_QUERIES, LONGEST, QUERIES
from llm.modules.masks import Causal, Everything, Mask, causal, visibility

FEW_QUERIES = 64  # T of one text; in absorbed MLA T times n_heads, since heads become queries
Bias = Callable[[Tensor, Tensor], Tensor]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    places: Places,
    mask: Mask = causal,
    *,
    bias: Bias | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """q (B, H, T, D), k (B, H_kv, S, D), v (B, H_kv, S, D_v) -> (B, H, T, D_v): each query attends to the keys that
    `mask` shows it. sinks (H,). Raises ValueError for a bias beside sinks."""
    if bias is not None and sinks is not None:
        raise ValueError("attend takes a bias or sinks, not both: no kernel here computes them together")
    q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast some norms leave them in fp32
    if places.whole_text:
        heads = attend_to_text(q, k, v, places, mask, bias, scale, soft_cap, sinks)
        if heads is not None:
            return heads
    shown = visibility(mask, places.q, places.k)
    if soft_cap is not None or (sinks is not None and q.shape[2] == 1):
        return explicit_attention(q, k, v, shown, scale, bias=written(bias, places), soft_cap=soft_cap, sinks=sinks)
    if sinks is not None:
        return fused_sink_attention(q, k, v, sinks, shown, scale)
    added = shown if bias is None else bias(places.q, places.k).masked_fill(~shown, -torch.inf).to(q.dtype)
    if places.q.dim() == 2 and q.shape[2] <= FEW_QUERIES:
        return few_queries_attention(q, k, v, added, scale)
    return fused_attention(q, k, v, added, scale)


def attend_to_text(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    places: Places,
    mask: Mask,
    bias: Bias | None,
    scale: float | None,
    soft_cap: float | None,
    sinks: Tensor | None,
) -> Tensor | None:
    """The implementations that need no positions, for a text from its first token on; None where none fits."""
    long, plain = is_long(q, mask), bias is None and soft_cap is None
    if not long and soft_cap is None and blocks_serve(q, mask):
        return blocked_attention(q, share_heads(q, k), share_heads(q, v), mask, scale, written(bias, places), sinks)
    if isinstance(mask, Everything) and plain and sinks is None:
        return fused_attention(q, k, v, scale=scale)
    if isinstance(mask, Causal) and soft_cap is None:
        if plain and sinks is None:
            return fused_attention(q, k, v, scale=scale, is_causal=True)
        if plain and long:
            return causal_sink_attention(q, k, v, sinks, scale)
        if hasattr(bias, "channels") and sinks is None:
            return channel_attention(q, k, v, *bias.channels(places.k), scale)
    if q.is_cuda and (plain or not long):
        from llm.modules.kernels.flex import flex_attention, flex_serves  # takes seconds to import

        added = written(bias, places)
        if flex_serves(q, k, added, sinks):
            return flex_attention(q, k, v, mask, scale, soft_cap, added, sinks)
    if not long:
        return None
    inputs = q, k, v, mask, bias, scale, soft_cap, sinks
    if torch.compiler.is_compiling():  # the blocks would be as many copies of one piece of code
        from llm.modules.kernels.uncompiled import call_uncompiled  # takes seconds to import

        return call_uncompiled(attend_to_long_text, *inputs)
    return attend_to_long_text(*inputs)


def attend_to_long_text(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    bias: Bias | None,
    scale: float | None,
    soft_cap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """The implementations that compute a block of queries at a time."""
    plain, dtype = bias is None and soft_cap is None, v.dtype
    q, k, v = without_slow_bf16(q, k, v)
    n, inner = mask.by_remainder()
    if n > 1 and plain:
        return attend_by_remainder(q, k, v, n, inner, scale, sinks).to(dtype)
    if plain and blocks_serve(q, mask) and gathering_serves(q, mask, sinks):
        return gathered_attention(q, k, v, mask, scale).to(dtype)
    k, v = share_heads(q, k), share_heads(q, v)
    if plain and blocks_serve(q, mask):
        return blocked_attention(q, k, v, mask, scale, sinks=sinks).to(dtype)
    return recomputed_attention(q, k, v, mask, scale, bias, soft_cap, sinks).to(dtype)


def written(bias: Bias | None, places: Places) -> Tensor | None:
    """The bias of all scores at once."""
    return None if bias is None else bias(places.q, places.k)


def attend_by_remainder(
    q: Tensor, k: Tensor, v: Tensor, n: int, mask: Mask, scale: float | None, sinks: Tensor | None
) -> Tensor:
    """Attention within each of the n texts of every n-th token: (B, H, T, D) -> (B n, H, T / n, D) and back.

    A block of queries has as many as elsewhere in all n texts together, so that it has few that see other keys.
    """
    length = q.shape[2]

    def split(x: Tensor) -> Tensor:  # the end is padded: no query of the text sees a later key
        return F.pad(x, (0, 0, 0, -length % n)).unflatten(2, (-1, n)).movedim(3, 1).flatten(0, 1)

    q, k, v = split(q), split(k), split(v)
    if q.shape[2] <= LONGEST or blocks_serve(q, mask):
        k, v, n_queries = share_heads(q, k), share_heads(q, v), max(FEWEST_QUERIES // 2, QUERIES // n)
        heads = blocked_attention(q, k, v, mask, scale, sinks=sinks, n_queries=n_queries)
    else:
        positions = torch.arange(q.shape[2], device=q.device)
        heads = attend(q, k, v, Places(positions, positions, whole_text=True), mask, scale=scale, sinks=sinks)
    return heads.unflatten(0, (-1, n)).movedim(1, 3).flatten(2, 3)[:, :, :length]


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


def causal_sink_attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, scale: float | None = None) -> Tensor:
    """`fused_sink_attention` for a whole text under a causal mask, without a mask tensor.

    The sink's key comes first, so that all queries see it. An unused query is put before the others, so that query i
    still sees key i of the text.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    width, v_width = q.shape[-1], v.shape[-1]
    sink = F.pad((sinks / scale).to(q.dtype)[:, None, None], (0, 7))  # (H, 1, 8)
    q = F.pad(torch.cat([q, sink.expand(*q.shape[:3], 8)], -1), (0, 0, 1, 0))  # (B, H, 1 + T, D + 8)
    sink_key = F.pad(k.new_ones(*k.shape[:2], 1, 1), (width, 7))
    k = torch.cat([sink_key, F.pad(k, (0, 8))], -2)
    v = F.pad(v, (0, width + 8 - v_width, 1, 0))
    return fused_attention(q, k, v, scale=scale, is_causal=True)[:, :, 1:, :v_width]


def channel_attention(
    q: Tensor, k: Tensor, v: Tensor, by_head: Tensor, by_key: Tensor, scale: float | None = None
) -> Tensor:
    """Causal attention with the bias by_head (H, C) times by_key (T, C), computed as C more channels of q and k.

    The rounding error of `by_head` in bf16 is given C channels of its own; by_key must be exact in bf16. Widths are
    padded to a multiple of 8, which the kernels need, and v to the width of q and k.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    by_head = by_head.to(torch.promote_types(q.dtype, torch.float32)) / scale
    coarse = by_head.to(q.dtype)
    by_head = torch.cat([coarse, (by_head - coarse).to(q.dtype)], -1)[:, None]  # (H, 1, 2 C)
    by_key = torch.cat([by_key, by_key], -1).to(k.dtype)  # (T, 2 C)
    v_width, width = v.shape[-1], q.shape[-1] + by_key.shape[-1]
    q = torch.cat([q, by_head.expand(*q.shape[:3], -1)], -1)
    k = torch.cat([k, by_key.expand(*k.shape[:3], -1)], -1)
    q, k = (F.pad(x, (0, -width % 8)) for x in (q, k))
    v = F.pad(v, (0, q.shape[-1] - v_width))
    return fused_attention(q, k, v, scale=scale, is_causal=True)[..., :v_width]
