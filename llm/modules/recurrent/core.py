"""One recurrence under every model of this folder: a state that decays and is written to, instead of a cache.

    S_t = decay(S_{t-1}) + write        o_t = S_t^T q_t        S (K, V) for each head, of a size that never grows

| model                  | decay(S)                       | write                            | arXiv                  |
|------------------------|--------------------------------|----------------------------------|------------------------|
| linear attention       | S                              | k v^T                            | 2006.16236             |
| RetNet, Lightning      | d S, d fixed for each head     | k v^T                            | 2307.08621, 2501.08313 |
| Mamba-2                | d_t S, d_t read from the token | k v^T, k = B, v = dt x           | 2405.21060             |
| gated linear attention | diag(d_t) S, d_t per channel   | k v^T                            | 2312.06635             |
| DeltaNet               | S                              | beta k (v - S^T k)^T             | 2406.06484             |
| Gated DeltaNet         | d_t S                          | beta k (v - (d_t S)^T k)^T       | 2412.06464             |
| Kimi Delta Attention   | diag(d_t) S                    | beta k (v - (diag(d_t) S)^T k)^T | 2510.26692             |
| RWKV-7                 | diag(d_t) S                    | k v^T + b (S^T a)^T              | 2503.14456             |
| Mamba                  | exp(dt_t A) * S, per entry     | B_t (dt_t x_t)^T                 | 2312.00752             |
| RG-LRU                 | a_t * S, S a vector            | sqrt(1 - a_t^2) i_t x_t          | 2402.19427             |

Linear attention, Mamba and RG-LRU add what they are given. The delta rule first reads what the key already stores and
writes only the difference, so that a key can be overwritten. RWKV-7 erases along one key and writes along another: the
a here is -c in rwkv7.py, and b is c times the a there. Mamba's S is the transpose of mamba.py's h; x is u in mamba.py
and rg_lru.py.

The functions here are the definitions, one token after the other. llm/modules/kernels/recurrence.py computes the same
in chunks. Shapes: q, k, a, b (B, T, H, K), v (B, T, H, V), log_decay <= 0 (B, T, H, 1 or K), beta (B, T, H, 1), state
(B, H, K, V). A step takes the same without T. Blog: State-space models; linear attention.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def read(state: Tensor, q: Tensor) -> Tensor:
    """S^T q: state (B, H, K, V), q (B, H, K) -> (B, H, V). A product and a sum, which autocast leaves in fp32."""
    return (state * q[..., None]).sum(-2)


def linear_attention_step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """S = diag(d) S + k v^T and o = S^T q: -> (o, S)."""
    state = log_decay.exp()[..., None] * state + k[..., None] * v[..., None, :]
    return read(state, q), state


def delta_rule_step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """S = diag(d) S, then S = S + beta k (v - S^T k)^T and o = S^T q: -> (o, S)."""
    state = log_decay.exp()[..., None] * state
    state = state + k[..., None] * (beta * (v - read(state, k)))[..., None, :]
    return read(state, q), state


def low_rank_step(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, log_decay: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """S = diag(d) S + b (S^T a)^T + k v^T, where a reads S before its decay, and o = S^T q: -> (o, S)."""
    correction = b[..., None] * read(state, a)[..., None, :]
    state = log_decay.exp()[..., None] * state + correction + k[..., None] * v[..., None, :]
    return read(state, q), state


def over_time(step: Callable[..., tuple[Tensor, Tensor]], state: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    """`step` on each token of inputs (B, T, ..), in turn: -> outputs (B, T, ..) and the last state."""
    outputs = []
    for token in zip(*(x.unbind(1) for x in inputs), strict=True):
        o, state = step(*token, state)
        outputs.append(o)
    return torch.stack(outputs, 1), state


def explicit_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """-> o (B, T, H, V) and the state after the last token."""
    return over_time(linear_attention_step, state, q, k, v, log_decay)


def explicit_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """-> o (B, T, H, V) and the state after the last token."""
    return over_time(delta_rule_step, state, q, k, v, log_decay, beta)


def explicit_low_rank(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, log_decay: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """-> o (B, T, H, V) and the state after the last token."""
    return over_time(low_rank_step, state, q, k, v, a, b, log_decay)
