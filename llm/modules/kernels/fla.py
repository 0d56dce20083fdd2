"""The Triton kernels of fla-core for the recurrences of recurrence.py, where they are installed and agree.

A kernel is believed once it has given the results and the gradients of the chunked form on random inputs, on its first
use with a device, a dtype and the widths of a head. Otherwise the chunked form computes, and a warning says why.
The names and arguments are those of fla-core 0.6.0.
Flash Linear Attention, github.com/fla-org/flash-linear-attention.
"""

import importlib
import warnings
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
MIXERS = {  # by the name of the class: its recurrence, and whether the decay is one for each channel
    **dict.fromkeys(("LinearAttention", "Retention", "LightningAttention", "Mamba2"), ("linear_attention", False)),
    "GatedLinearAttention": ("linear_attention", True),
    **dict.fromkeys(("DeltaNet", "GatedDeltaNet"), ("delta_rule", False)),
    "KimiDeltaAttention": ("delta_rule", True),
    "TimeMix": ("low_rank", True),
    "Mamba": ("selective_scan", True),
    "RGLRU": ("linear_scan", True),
}


def kernel_report(model: nn.Module, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> str:
    """One line for the start of a run: whether the recurrences of `model` have a kernel, and why not. "" without such
    recurrences."""
    names = {type(module).__name__ for module in model.modules() if ".recurrent." in type(module).__module__}
    parts = []
    for kind, per_channel in sorted({MIXERS[name] for name in names & MIXERS.keys()}):
        reason = why_not(kind, per_channel, device, dtype)
        way = "a loop over tokens" if kind.endswith("scan") else "chunks"
        decay = "channel" if per_channel else "head"
        parts.append(f"{kind} (decay by {decay}): {f'{way}, {reason}' if reason else 'fla-core'}")
    return "; ".join(parts)


def fla_kernel(kind: str, inputs: tuple[Tensor, ...], log_decay: Tensor) -> Callable | None:
    """The kernel for these inputs, called as the chunked form is; None where there is none to believe."""
    k, v, per_channel = inputs[1], inputs[2], log_decay.shape[-1] > 1
    if not v.is_cuda:
        return None
    place = kind, per_channel, v.device, v.dtype, (k.shape[-1], v.shape[-1])
    if torch.compiler.is_compiling():  # which would trace the trial of the kernel
        from llm.modules.kernels.uncompiled import call_uncompiled  # takes seconds to import

        reason = call_uncompiled(why_not, *place)
    else:
        reason = why_not(*place)
    return None if reason else adapted(kind, per_channel)


@lru_cache
def why_not(
    kind: str, per_channel: bool, device: torch.device, dtype: torch.dtype, widths: tuple[int, int] = (64, 64)
) -> str | None:
    """Why the kernel is not used for heads with these widths of keys and values; None where it is."""
    if (kind, per_channel) not in KERNELS:
        return "no kernel for it here"
    if device.type != "cuda":
        return "no CUDA device"
    if find_spec("fla") is None:
        return "fla-core is not installed"
    if dtype is torch.float64:
        return "no kernel for float64"
    return disbelief(kind, per_channel, device, dtype, widths)


def disbelief(
    kind: str, per_channel: bool, device: torch.device, dtype: torch.dtype, widths: tuple[int, int]
) -> str | None:
    """Why the kernel is not trusted, which is also given as a warning; None where it is about as exact as the chunked
    form."""
    try:
        error = largest_error(adapted(kind, per_channel), kind, per_channel, device, dtype, widths)
        usual = largest_error(CHUNKED[kind], kind, per_channel, device, dtype, widths)
        reason = None if error < max(0.01, 2 * usual) else f"its kernel is wrong by {error:.2g}, chunks by {usual:.2g}"
    except Exception as failure:  # a kernel that does not compile here must not end the run
        reason = f"its kernel failed: {type(failure).__name__}: {failure}"
    if reason:
        warnings.warn(f"{kind}, heads of {widths}: {reason}; computed in chunks", stacklevel=2)
    return reason


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


@torch.inference_mode(False)
@torch.enable_grad()
def largest_error(
    form: Callable, kind: str, per_channel: bool, device: torch.device, dtype: torch.dtype, widths: tuple[int, int]
) -> float:
    """The largest error in the results of `form` and in the gradients of its inputs, each over the size of its largest
    number. The inputs are random: two chunks, of which the second is not full. The truth is computed in float64."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    q, k, v = (F.normalize(draw(2, 100, 2, width), dim=-1).to(dtype) for width in (widths[0], *widths))
    log_decay = F.logsigmoid(draw(2, 100, 2, widths[0] if per_channel else 1))
    beta = [draw(2, 100, 2, 1).sigmoid()] if kind == "delta_rule" else []
    inputs = q, k, v, log_decay, *beta, draw(2, 2, *widths)
    weights = draw(2, 100, 2, widths[1]), draw(2, 2, *widths)

    def results(form: Callable, dtype: torch.dtype | None = None) -> list[Tensor]:
        leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
        found = form(*leaves)
        total = sum((x.double() * weight).sum() for x, weight in zip(found, weights, strict=True))
        return [x.detach().double() for x in (*found, *torch.autograd.grad(total, leaves))]

    pairs = zip(results(form), results(CHUNKED[kind], torch.float64), strict=True)
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)
