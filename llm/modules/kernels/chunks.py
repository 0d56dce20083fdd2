"""The recurrences of llm/modules/recurrent/core.py in chunks of 64 tokens, as matrix products.

With total_t the sum of the log decays from the start of the chunk to token t, and S the state before the chunk:

    p[t, j]  = sum_c q_t k_j exp(total_t - total_j), j <= t          what token t reads of what token j wrote
    linear     o = p v + (q exp(total)) S                            S' = exp(end) S + (k exp(end - total))^T v
    delta      (I + own) new = beta (v - (k exp(total)) S)           own: p with k for q, j < t, times beta_t
               o and S' as above, with `new` for v                   `new`: what is written, once the state is read
    low rank   (I - p_ab) z = p_ak v + (a exp(total)) S              z_t = S_{t-1}^T a_t
               o = p_qk v + p_qb z + ..                              a reads before its token's decay: rows shifted by 1

`end` is the last total. p: decayed_products.py. A text is filled up with zeros: no input, no decay, no correction.
Parallelizing Linear Transformers with the Delta Rule over Sequence Length, arXiv 2406.06484; Gated Linear Attention,
arXiv 2312.06635, section 4; Kimi Linear, arXiv 2510.26692, section 3. Blog: State-space models.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from llm.modules.kernels.decayed_products import DecayedByHead, decayed_products
from llm.modules.kernels.precision import product_dtype

CHUNK = 64


def chunked_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """`explicit_linear_attention`, with products in v's dtype or autocast's, and the state in its own.

    With a decay by head, q and k may have fewer heads than v. Heads that share them are computed side by side, in one
    product, and the decay scales v and o instead of k and q.
    """
    n_tokens, dtype = q.shape[1], product_dtype(v)
    q, k, v, log_decay = (in_chunks(x) for x in (q, k, v, log_decay))
    total = log_decay.cumsum(-2)
    end, by_head = total[..., -1:, :], log_decay.shape[-1] == 1
    n_heads, n_shared = v.shape[1], v.shape[1] // q.shape[1]
    if by_head:
        products = q.to(dtype) @ k.to(dtype).mT
        read = DecayedByHead.apply(products[:, :, None], total.unflatten(1, (-1, n_shared))).flatten(
            1, 2
        )  # (B, H, N, C, C)
        scaled = v.to(dtype) * (end - total).exp().to(dtype)
        writes = apart(k.to(dtype).mT @ together(scaled, n_shared), n_heads)  # (B, H, N, K, V)
    else:
        read = decayed_products(q.unsqueeze(-3), k.unsqueeze(-3), total, dtype)[..., 0, 0, :, :]
        writes = (k.to(dtype) * (end - total).exp().to(dtype)).mT @ v.to(dtype)
    before, after = [], state
    for decay, write in zip(end.exp().mT.unbind(2), writes.unbind(2), strict=True):
        before.append(after.to(dtype))
        after = decay * after + write
    states = torch.stack(before, 2)
    if by_head:
        carried = apart(q.to(dtype) @ together(states, n_shared), n_heads) * total.exp().to(dtype)
    else:
        carried = (q.to(dtype) * total.exp().to(dtype)) @ states
    return as_text(read @ v.to(dtype) + carried, n_tokens), after


def chunked_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """`explicit_delta_rule`, with products in v's dtype or autocast's, the inverse and the state in fp32."""
    n_tokens, dtype = q.shape[1], product_dtype(v)
    q, k, v, log_decay, beta = (in_chunks(x) for x in (q.to(dtype), k.to(dtype), v.to(dtype), log_decay, beta))
    total = log_decay.cumsum(-2)
    end, since_start = total[..., -1:, :], total.exp().to(dtype)
    read, own = decayed_products(torch.stack([q, k], -3), k.unsqueeze(-3), total, dtype)[..., 0, :, :].unbind(-3)
    right = beta.to(dtype) * torch.cat([v, k * since_start], -1)
    solved = Inverse.apply((beta * own).to(state.dtype)).to(dtype) @ right
    u, w = solved.split([v.shape[-1], k.shape[-1]], -1)
    keys = (k * (end - total).exp().to(dtype)).mT
    before, new, after = [], [], state
    for decay, key, u_n, w_n in zip(*(x.unbind(2) for x in (end.exp().mT, keys, u, w)), strict=True):
        before.append(after.to(dtype))
        new.append(u_n - w_n @ before[-1])
        after = decay * after + key @ new[-1]
    carried = (q * since_start) @ torch.stack(before, 2)
    return as_text(read @ torch.stack(new, 2) + carried, n_tokens), after


def chunked_low_rank(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, log_decay: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """`explicit_low_rank`, with products in v's dtype or autocast's, the inverse and the state in fp32."""
    n_tokens, dtype = q.shape[1], product_dtype(v)
    q, k, v, a, b = (in_chunks(x.to(dtype)) for x in (q, k, v, a, b))
    total = in_chunks(log_decay).cumsum(-2)
    end = total[..., -1:, :]
    reads = torch.stack([q, earlier(a, -1)], -3)  # a of the next token reads this token's state
    of_q, of_a = decayed_products(reads, torch.stack([k, b], -3), total, dtype).unbind(-4)
    (q_k, q_b), (a_k, a_b) = of_q.unbind(-3), earlier(of_a, 1).unbind(-3)
    right = torch.cat([a_k @ v, a * earlier(total, 1).exp().to(dtype)], -1)
    solved = Inverse.apply(-a_b.to(state.dtype)).to(dtype) @ right
    u, w = solved.split([v.shape[-1], k.shape[-1]], -1)
    to_end = (end - total).exp().to(dtype)
    keys, erased = ((x * to_end).mT for x in (k, b))
    writes = keys @ v
    before, z, after = [], [], state
    for decay, key, u_n, w_n, write in zip(*(x.unbind(2) for x in (end.exp().mT, erased, u, w, writes)), strict=True):
        before.append(after.to(dtype))
        z.append(u_n + w_n @ before[-1])
        after = decay * after + key @ z[-1] + write
    carried = (q * total.exp().to(dtype)) @ torch.stack(before, 2)
    return as_text(q_k @ v + q_b @ torch.stack(z, 2) + carried, n_tokens), after


class Inverse(torch.autograd.Function):
    """(I + A)^-1, where A (.., C, C) is read below its diagonal only: X of (I + A) X = I, and dA = -X^T dX X^T."""

    @staticmethod
    def forward(ctx, a: Tensor) -> Tensor:
        ones = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
        inverse = torch.linalg.solve_triangular(a, ones, upper=False, unitriangular=True)
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        return -(inverse.mT @ grad @ inverse.mT).tril(-1)


def together(x: Tensor, n_shared: int) -> Tensor:
    """Heads (B, H, N, C, V) that share their keys side by side: (B, H / n_shared, N, C, n_shared V)."""
    return x if n_shared == 1 else x.unflatten(1, (-1, n_shared)).movedim(2, -2).flatten(-2)


def apart(x: Tensor, n_heads: int) -> Tensor:
    """The inverse of `together`, for `n_heads` heads."""
    n_shared = n_heads // x.shape[1]
    return x if n_shared == 1 else x.unflatten(-1, (n_shared, -1)).movedim(-2, 2).flatten(1, 2)


def earlier(x: Tensor, n: int) -> Tensor:
    """Row t of x (.., C, K) moves to row t + n; zeros follow into the empty rows."""
    return F.pad(x, (0, 0, n, -n))


def in_chunks(x: Tensor) -> Tensor:
    """(B, T, H, K) -> (B, H, N, 64, K), filled up with zeros."""
    missing = -x.shape[1] % CHUNK
    filled = F.pad(x, (0, 0, 0, 0, 0, missing)) if missing else x
    return filled.unflatten(1, (-1, CHUNK)).permute(0, 3, 1, 2, 4).contiguous()


def as_text(o: Tensor, n_tokens: int) -> Tensor:
    """(B, H, N, 64, V) -> (B, T, H, V)."""
    return o.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :n_tokens]
