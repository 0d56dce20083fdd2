"""Questions about where and how a tensor is computed: precision, autocast, host or device."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of products with x: autocast's, or x's own."""
    device = x.device.type
    if x.is_meta or not torch.is_autocast_enabled(device):  # autocast does not know the meta device
        return x.dtype
    return torch.get_autocast_dtype(device)


def full_precision_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (.., in) times weight (out, in) plus bias, in fp32 (float64 stays) also under autocast: -> (.., out)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if x.is_meta:
        return F.linear(x, weight, bias)
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x, weight, bias)


def without_autocast(x: Tensor) -> AbstractContextManager:
    """A context in which products on x's device keep the dtype of their inputs."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def is_remote(x: Tensor) -> bool:
    """Whether reading values of x from Python would make the host wait for a GPU, or break a compiled graph."""
    return x.device.type != "cpu" or torch.compiler.is_compiling()


def without_slow_bf16(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, in fp32 instead of bf16 where a CPU emulates products in bf16, which takes several times as long."""
    x = tensors[0]
    has_bf16 = torch.cpu.get_capabilities().get("avx512_bf16") or torch.cpu.get_capabilities().get("amx_bf16")
    slow = x.device.type == "cpu" and x.dtype is torch.bfloat16 and not has_bf16
    return tuple(x.float() for x in tensors) if slow else tensors
