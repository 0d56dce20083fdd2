"""Mixture of experts: many feed-forward layers, of which each token uses a few.

    MoE(x) = shared(x) + sum over chosen i of weight_i(x) expert_i(x)

The parameters grow with the number of experts, the work for a token does not: tokens are sorted by expert, and each
expert computes its own rows only. Differences between models lie in the router (router.py) and the kind of expert.

Outrageously Large Neural Networks, arXiv 1701.06538; Mixtral of Experts, arXiv 2401.04088; shared and fine-grained
experts: DeepSeekMoE, arXiv 2401.06066. Blog: FFN and MoE.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class MoE(nn.Module):
    """(B, T, d_model) -> (B, T, d_model).

    router    x -> (experts, weights), both (B, T, k): which experts each token goes to, and how much each counts
    experts   rows (R, d_model), sorted by expert, and where each expert's rows end (E,) int32 -> (R, d_model)
    shared    a layer that every token goes through, too
    """

    def __init__(self, router: nn.Module, experts: nn.Module, shared: nn.Module | None = None):
        super().__init__()
        self.router, self.experts, self.shared = router, experts, shared

    def forward(self, x: Tensor) -> Tensor:
        experts, weights = self.router(x)  # (B, T, k)
        expert, order = experts.flatten().sort(stable=True)  # choice j of token t stood at t * k + j
        rows = x.flatten(0, -2)[order // experts.shape[-1]]  # (B T k, D)
        rows = self.experts(rows, ends_of_runs(expert, self.router.n_experts))
        chosen = rows[order.argsort()].view(*experts.shape, -1)  # (B, T, k, D), in the tokens' order again
        y = (chosen * weights[..., None]).sum(-2).to(x.dtype)
        return y if self.shared is None else y + self.shared(x)


class GatedExperts(nn.Module):
    """GLU experts, act(x W_gate) * (x W_up) into W_down; gate_up_proj holds the rows of W_gate, then those of W_up."""

    def __init__(self, d_model: int, d_expert: int, n_experts: int, activation: Callable[[Tensor], Tensor] = F.silu):
        super().__init__()
        self.gate_up_proj = nn.Parameter(0.02 * torch.randn(n_experts, 2 * d_expert, d_model))
        self.down_proj = nn.Parameter(0.02 * torch.randn(n_experts, d_model, d_expert))
        self.activation = activation

    def forward(self, rows: Tensor, ends: Tensor) -> Tensor:
        gate, up = grouped_linear(rows, self.gate_up_proj, ends).chunk(2, -1)
        return grouped_linear(self.activation(gate) * up, self.down_proj, ends)


class PlainExperts(nn.Module):
    """MLP experts, act(x W_up) W_down, as in the Switch Transformer."""

    def __init__(self, d_model: int, d_expert: int, n_experts: int, activation: Callable[[Tensor], Tensor] = F.gelu):
        super().__init__()
        self.up_proj = nn.Parameter(0.02 * torch.randn(n_experts, d_expert, d_model))
        self.down_proj = nn.Parameter(0.02 * torch.randn(n_experts, d_model, d_expert))
        self.activation = activation

    def forward(self, rows: Tensor, ends: Tensor) -> Tensor:
        return grouped_linear(self.activation(grouped_linear(rows, self.up_proj, ends)), self.down_proj, ends)


def ends_of_runs(expert: Tensor, n_experts: int) -> Tensor:
    """Sorted experts (R,) -> where the rows of each end, (E,) int32; bincount would break a compiled graph."""
    every = torch.arange(n_experts, device=expert.device)
    return torch.searchsorted(expert, every, right=True, out_int32=True)


def grouped_linear(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows (R, in), sorted by expert, times each one's expert's matrix in weight (E, out, in) -> (R, out).

    In one kernel where there is one. Under autocast in its precision, which the kernel would not find by itself.
    """
    device = rows.device.type
    if not rows.is_meta and torch.is_autocast_enabled(device):  # on meta autocast is not known
        dtype = torch.get_autocast_dtype(device)
        rows, weight = rows.to(dtype), weight.to(dtype)
    if has_grouped_kernel(weight):
        return F.grouped_mm(rows, weight.transpose(1, 2), offs=ends)
    from llm.modules.ffn.looped_experts import looped_linear  # costs seconds, so only where it serves

    return looped_linear(rows, weight, ends)


def has_grouped_kernel(weight: Tensor) -> bool:
    """Whether `grouped_mm` takes such weights: no float64, rows of whole 16 bytes, only bfloat16 when compiled."""
    dtypes = (torch.bfloat16,) if torch.compiler.is_compiling() else (torch.bfloat16, torch.float32)
    aligned = all(size * weight.itemsize % 16 == 0 for size in weight.shape[1:])
    if weight.is_cuda and torch.cuda.get_device_capability(weight.device) < (8, 0):
        return False
    return aligned and weight.dtype in dtypes and weight.device.type in ("cpu", "cuda", "meta")
