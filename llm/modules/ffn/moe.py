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
        tokens = x.flatten(0, -2).to(product_dtype(x))
        expert, order = experts.flatten().sort(stable=True)  # choice j of token t stood at t * k + j
        row, ends, n_rows = runs(expert, self.router.n_experts, block_size(tokens, expert, self.router.n_experts))
        token = order.new_zeros(n_rows).scatter(0, row, order // experts.shape[-1])  # whose copy a row is
        rows = self.experts(pick(tokens, token), ends)  # (R, D)
        chosen = pick(rows, row[order.argsort()]).view(*experts.shape, -1)  # (B, T, k, D), in the tokens' order again
        y = (chosen * weights[..., None].to(chosen.dtype)).sum(-2).to(x.dtype)
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


def pick(rows: Tensor, index: Tensor) -> Tensor:
    """rows[index] (R, D). As a lookup, whose gradient is summed by several threads; that of indexing is not."""
    return F.embedding(index, rows)


def runs(expert: Tensor, n_experts: int, block: int) -> tuple[Tensor, Tensor, int]:
    """Lay out rows for sorted choices (N,): the row of each (N,), where each expert's rows end (E,) int32, and how many
    rows there are. Every expert's rows are filled up to whole blocks, with some that belong to no choice."""
    every = torch.arange(n_experts, device=expert.device)
    ends = torch.searchsorted(expert, every, right=True, out_int32=True)  # bincount would break a compiled graph
    starts = F.pad(ends[:-1], (1, 0))
    n_blocks = (ends - starts + block - 1) // block
    filled_ends = block * n_blocks.cumsum(0, dtype=torch.int32)
    filled_starts = filled_ends - block * n_blocks
    n_rows = (len(expert) + n_experts * (block - 1)) // block * block  # what suffices, however the choices fall
    filled_ends[-1] = n_rows
    return torch.arange(len(expert), device=expert.device) + (filled_starts - starts)[expert], filled_ends, n_rows


def block_size(tokens: Tensor, expert: Tensor, n_experts: int) -> int:
    """Of `runs`. The CPU's bf16 kernel is made anew, and kept, for every number of rows that it meets, which costs more
    than the product: so where there are many rows their number is a multiple of 64."""
    anew = tokens.device.type == "cpu" and tokens.dtype is torch.bfloat16
    return 64 if anew and len(expert) >= 128 * n_experts else 1


def grouped_linear(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows (R, in), sorted by expert, times each one's expert's matrix in weight (E, out, in) -> (R, out).

    In one kernel where there is one. Under autocast in its precision, which the kernel would not find by itself.
    """
    dtype = product_dtype(rows)
    rows, weight = rows.to(dtype), weight.to(dtype)
    if has_grouped_kernel(weight):
        return F.grouped_mm(rows, weight.transpose(1, 2), offs=ends)
    from llm.modules.ffn.looped_experts import looped_linear  # costs seconds, so only where it serves

    return looped_linear(rows, weight, ends)


def product_dtype(x: Tensor) -> torch.dtype:
    """What products with x are made in: autocast's precision, or x's own."""
    device = x.device.type
    if x.is_meta or not torch.is_autocast_enabled(device):  # on meta autocast is not known
        return x.dtype
    return torch.get_autocast_dtype(device)


def has_grouped_kernel(weight: Tensor) -> bool:
    """Whether `grouped_mm` takes such weights: no float64, rows of whole 16 bytes, only bfloat16 when compiled."""
    dtypes = (torch.bfloat16,) if torch.compiler.is_compiling() else (torch.bfloat16, torch.float32)
    aligned = all(size * weight.itemsize % 16 == 0 for size in weight.shape[1:])
    if weight.is_cuda and torch.cuda.get_device_capability(weight.device) < (8, 0):
        return False
    return aligned and weight.dtype in dtypes and weight.device.type in ("cpu", "cuda", "meta")
