"""FlexAttention: a mask and a change of the scores become one CUDA kernel, which skips the blocks that no query sees.

A mask that is written out computes all T x T scores and discards most. This kernel computes only the blocks that some
query sees, so a window costs T x window. Flex Attention: A Programming Model for Generating Optimized Attention
Kernels, arXiv 2412.05496. Blog: Attention, sparse attention.

It is used in training on CUDA only. Elsewhere, and where this GPU cannot compile it, the mask gives the same result.
Both functions stay outside an enclosing torch.compile, so that whether a kernel compiles can be tried beforehand.

Each mask, shape and gradient mode is compiled to its own kernel. After eight of them torch would silently continue
without compiling, with T x T scores. Here up to KERNELS are allowed, and one more is an error.
"""

import warnings
from collections.abc import Callable
from functools import cache, lru_cache

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex

from llm.modules.attention.core import cap
from llm.modules.masks import Mask, causal

KERNELS = 256  # as many as torch allows in all; BigBird has a mask in each layer, for training and for evaluation


@torch.compiler.disable
@torch._dynamo.config.patch(recompile_limit=KERNELS)  # for this call only, and in whichever thread it is made
def flex_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    scale: float | None = None,
    soft_cap: float | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """`explicit_attention` for positions 0..T-1: q (B, H, T, D), k and v (B, H_kv, T, ..), bias (H, T, T) or
    (B, H, T, T), sinks (H,)."""

    def score_mod(score: Tensor, batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        score = score if soft_cap is None else cap(score, soft_cap)
        if bias is None:
            return score
        return score + (bias[head, i, j] if bias.dim() == 3 else bias[batch, head, i, j])

    if bias is not None:
        bias = bias.float().contiguous()  # its gradient is summed where it lies
    attend = compiled() if q.is_cuda else torch_flex.flex_attention
    heads, aux = attend(
        q,
        k,
        v,
        None if soft_cap is None and bias is None else score_mod,
        block_mask(mask, q.shape[2], q.device),
        scale,
        enable_gqa=q.shape[1] != k.shape[1],
        return_aux=torch_flex.AuxRequest(lse=sinks is not None),
    )
    if sinks is None:
        return heads
    share = torch.sigmoid(aux.lse - sinks[:, None])  # the keys' weight, exp(lse) / (exp(lse) + exp(sink)), (B, H, T)
    return heads * share[..., None].to(heads.dtype)


@torch.compiler.disable
def flex_serves(q: Tensor, k: Tensor, bias: Tensor | None = None, sinks: Tensor | None = None) -> bool:
    """Whether q (B, H, T, D) and k (B, H_kv, T, D) can go through `flex_attention`: on CUDA, where kernels compile."""
    if not q.is_cuda or q.dtype == torch.float64:
        return False
    shared, biased = q.shape[1] != k.shape[1], 0 if bias is None else bias.dim()
    return compiles(q.device, q.dtype, q.shape[-1], shared, biased, sinks is not None)


@cache
def compiles(
    device: torch.device, dtype: torch.dtype, head_dim: int, shared: bool, biased: int = 0, with_sinks: bool = False
) -> bool:
    """Try both kernels, forward and backward, once for each of these settings: small GPUs lack shared memory for some.
    `biased` is the number of axes of the bias, 0 without one."""
    try:
        with torch.inference_mode(False), torch.enable_grad():
            k = torch.zeros(1, 1, 128, head_dim, device=device, dtype=dtype, requires_grad=True)
            q = k.repeat(1, 2 if shared else 1, 1, 1)
            scores = torch.zeros(1, q.shape[1], 128, 128, device=device, requires_grad=True)
            bias = (scores[0] if biased == 3 else scores) if biased else None
            sinks = scores[0, :, 0, 0] if with_sinks else None
            flex_attention(q, k, k, causal, bias=bias, sinks=sinks).sum().backward()
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
def block_mask(mask: Mask, length: int, device: torch.device) -> torch_flex.BlockMask:
    """Which blocks of 128 x 128 scores are seen in full, in part or not at all."""
    with torch.inference_mode(False):  # else a mask made while evaluating could not be used in training
        return torch_flex.create_block_mask(
            lambda batch, head, i, j: mask.visible(i, j), None, None, length, length, device=device
        )
