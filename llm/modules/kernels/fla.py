"""The Triton kernels of fla-core for the recurrences of recurrence.py, where they are installed and agree.

A kernel is believed once it has given what the chunked form gives on random inputs, on its first use with a device and
dtype. Otherwise the chunked form computes, and `kernel_report` says why. RWKV-7's update has no kernel here.
The names and arguments are those of fla-core 0.6.0.
Flash Linear Attention, github.com/fla-org/flash-linear-attention.
"""

import importlib
import sys
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llm.modules.kernels.chunks import chunked_delta_rule, chunked_linear_attention

CHUNKED = {"linear_attention": chunked_linear_attention, "delta_rule": chunked_delta_rule}
KERNELS = {  # by the width of the decay: one for a head, or one for each channel
    ("linear_attention", False): ("fla.ops.simple_gla", "chunk_simple_gla"),
    ("linear_attention", True): ("fla.ops.gla", "chunk_gla"),
    ("delta_rule", False): ("fla.ops.gated_delta_rule", "chunk_gated_delta_rule"),
    ("delta_rule", True): ("fla.ops.kda", "chunk_kda"),
}


def kernel_report(model: nn.Module, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> str:
    """One line for the start of a run: whether the recurrences of `model` have a kernel, and why not. "" without such
    recurrences."""
    files = {type(module).__module__ for module in model.modules() if ".recurrent." in type(module).__module__}
    used = {kind for kind in CHUNKED for file in files if hasattr(sys.modules[file], kind)}
    parts = []
    for kind, per_channel in KERNELS:
        if kind in used:
            reason = why_not(kind, per_channel, device, dtype)
            decay = "channel" if per_channel else "head"
            parts.append(f"{kind} (decay by {decay}): {f'chunks, {reason}' if reason else 'fla-core'}")
    return "; ".join(parts)


def fla_kernel(kind: str, inputs: tuple[Tensor, ...], log_decay: Tensor) -> Callable | None:
    """The kernel for these inputs, called as the chunked form is; None where there is none to believe."""
    v, per_channel = inputs[2], log_decay.shape[-1] > 1
    if not v.is_cuda or (kind, per_channel) not in KERNELS or why_not(kind, per_channel, v.device, v.dtype):
        return None
    return adapted(kind, per_channel)


@lru_cache
def why_not(kind: str, per_channel: bool, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernel is not used; None where it is."""
    if device.type != "cuda":
        return "no CUDA device"
    if find_spec("fla") is None:
        return "fla-core is not installed"
    if dtype is torch.float64:
        return "no kernel for float64"
    try:
        difference = largest_difference(kind, per_channel, adapted(kind, per_channel), device, dtype)
    except Exception as error:  # a kernel that does not compile here must not end the run
        return f"its kernel failed: {type(error).__name__}: {error}"
    return None if difference < 0.02 else f"its kernel differs from the chunked form by {difference:.2g}"


def adapted(kind: str, per_channel: bool) -> Callable:
    """fla's kernel with the arguments of `chunked_..`: a decay by head without its last axis, scale 1."""
    module, name = KERNELS[kind, per_channel]
    kernel = getattr(importlib.import_module(module), name)

    def call(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        *beta, state = rest
        g = log_decay if per_channel else log_decay[..., 0]
        options = dict(scale=1.0, initial_state=state, output_final_state=True)
        return kernel(q.to(v.dtype), k.to(v.dtype), v, g, *(b[..., 0] for b in beta), **options)

    return call


@torch.no_grad()
def largest_difference(
    kind: str, per_channel: bool, kernel: Callable, device: torch.device, dtype: torch.dtype
) -> float:
    """Between kernel and chunked form, over the size of the largest result: two chunks of random inputs."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    q, k, v = (F.normalize(draw(2, 128, 2, 64), dim=-1).to(dtype) for _ in range(3))
    log_decay = F.logsigmoid(draw(2, 128, 2, 64 if per_channel else 1))
    beta = [draw(2, 128, 2, 1).sigmoid()] if kind == "delta_rule" else []
    inputs = (q, k, v, log_decay, *beta, draw(2, 2, 64, 64))
    pairs = zip(kernel(*inputs), CHUNKED[kind](*inputs), strict=True)
    return max(((a.float() - b.float()).abs().max() / b.float().abs().max()).item() for a, b in pairs)
