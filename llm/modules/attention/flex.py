"""FlexAttention: a mask and a change of scores, given as functions, become one CUDA kernel that skips unseen blocks.

A boolean mask computes all T x T scores and throws most away; this computes only the blocks that some query sees, so a
window costs T x window. Flex Attention: A Programming Model for Generating Optimized Attention Kernels,
arXiv 2412.05496. Blog: Attention, sparse attention.

It serves training on CUDA only. Everywhere else, and where this GPU cannot compile it, the mask gives the same result.
Both functions stay outside an enclosing torch.compile: a kernel that does not fit can then be found out beforehand.

Each mask, shape and gradient mode gets a kernel of its own. After eight of them torch would go on without compiling,
T x T scores and all, and tell only its log: here there may be KERNELS, and one more is an error.
"""

import warnings
from collections.abc import Callable
from functools import cache, lru_cache

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex

from llm.modules.masks import Visible, causal

KERNELS = 256  # as many as torch allows in all; BigBird has a mask in each layer, and each is used in evaluation, too


@torch.compiler.disable
@torch._dynamo.config.patch(recompile_limit=KERNELS)  # for this call only, and in whichever thread it is made
def flex_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Visible,
    scale: float | None = None,
    change: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """softmax(change(q k^T * scale)) v over the visible keys, for positions 0..T-1: q (B, H, T, D), k and v
    (B, H_kv, T, ..)."""
    attend = compiled() if q.is_cuda else torch_flex.flex_attention
    score_mod = None if change is None else lambda score, batch, head, i, j: change(score)
    mask = block_mask(visible, q.shape[2], q.device)
    return attend(q, k, v, score_mod, mask, scale, enable_gqa=q.shape[1] != k.shape[1])


@torch.compiler.disable
def flex_serves(q: Tensor, k: Tensor) -> bool:
    """Whether q (B, H, T, D) and k (B, H_kv, T, D) can go through `flex_attention`: on CUDA, where kernels compile."""
    if not q.is_cuda or q.dtype == torch.float64:
        return False
    return compiles(q.device, q.dtype, q.shape[-1], shared=q.shape[1] != k.shape[1])


@cache
def compiles(device: torch.device, dtype: torch.dtype, head_dim: int, shared: bool) -> bool:
    """Try both kernels, forward and backward, once for each width of head, and once more where query heads share a key
    head: small GPUs lack shared memory for some."""
    try:
        with torch.inference_mode(False), torch.enable_grad():
            k = torch.zeros(1, 1, 128, head_dim, device=device, dtype=dtype, requires_grad=True)
            q = k.repeat(1, 2 if shared else 1, 1, 1)
            flex_attention(q, k, k, causal).sum().backward()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler raises: the mask does the same, more slowly
        warnings.warn(f"FlexAttention does not compile here, masks are used instead: {error}", stacklevel=2)
        return False
    return True


@cache
def compiled() -> Callable[..., Tensor]:
    return torch.compile(torch_flex.flex_attention, dynamic=False, fullgraph=True)  # fullgraph: or else an error


@lru_cache(maxsize=64)
def block_mask(visible: Visible, length: int, device: torch.device) -> torch_flex.BlockMask:
    """Which blocks of 128 x 128 scores are seen in full, in part or not at all."""
    with torch.inference_mode(False):  # else a mask made while evaluating could not be used in training
        return torch_flex.create_block_mask(
            lambda batch, head, i, j: visible(i, j), None, None, length, length, device=device
        )
