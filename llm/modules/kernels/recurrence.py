"""The recurrences of llm/modules/recurrent/core.py at their fastest: one token by its step, a text in chunks.

| tokens     | device                                   | way                                              |
|------------|------------------------------------------|--------------------------------------------------|
| 1          | any                                      | the step of llm/modules/recurrent/core.py         |
| several    | CUDA, where `fla_kernel` finds one       | the Triton kernel of fla-core (fla.py)            |
| several    | any                                      | `chunked_..` of chunks.py                         |

q and k may have fewer heads than v: consecutive value heads share one. Without a state, a text begins with zeros.
"""

import torch
from torch import Tensor

from llm.modules.kernels import chunks
from llm.modules.kernels.fla import fla_kernel
from llm.modules.recurrent import core


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`explicit_linear_attention`: -> o (B, T, H, V) in v's dtype and the last state (B, H, K, V)."""
    return recur("linear_attention", (q, k, v, log_decay), state)


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`explicit_delta_rule`: -> o (B, T, H, V) in v's dtype and the last state (B, H, K, V)."""
    return recur("delta_rule", (q, k, v, log_decay, beta), state)


def low_rank(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, log_decay: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`explicit_low_rank`: -> o (B, T, H, V) in v's dtype and the last state (B, H, K, V)."""
    return recur("low_rank", (q, k, v, a, b, log_decay), state)


def recur(kind: str, inputs: tuple[Tensor, ...], state: Tensor | None) -> tuple[Tensor, Tensor]:
    """`inputs` begin with q, k and v."""
    q, k, v, *others = inputs
    one = q.shape[1] == 1
    kernel = None if one else fla_kernel(kind, inputs, others[0])
    n_shared = v.shape[2] // q.shape[2]
    chunks_share = kind == "linear_attention" and others[0].shape[-1] == 1  # a decay by head
    if n_shared > 1 and (one or kernel or not chunks_share):
        q, k = q.repeat_interleave(n_shared, 2), k.repeat_interleave(n_shared, 2)
    if state is None:
        wide = torch.promote_types(v.dtype, torch.float32)
        state = torch.zeros(len(v), v.shape[2], k.shape[3], v.shape[3], dtype=wide, device=v.device)
    inputs = (q, k, v, *others)
    if one:
        o, state = getattr(core, f"{kind}_step")(*(x[:, 0].to(state.dtype) for x in inputs), state)
        return o[:, None].to(v.dtype), state
    o, state = (kernel or getattr(chunks, f"chunked_{kind}"))(*inputs, state)
    return o.to(v.dtype), state
