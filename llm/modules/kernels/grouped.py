"""Experts computed together: tokens are sorted by expert, and one grouped product serves all experts.

`grouped_moe` equals `explicit_moe` of llm/modules/ffn/moe.py, which computes every expert on every token.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llm.modules.kernels.precision import product_dtype


def grouped_moe(x: Tensor, chosen: Tensor, weights: Tensor, experts: nn.Module) -> Tensor:
    """x (.., D), chosen experts and weights (.., k) -> (.., D). `experts` takes rows (R, D) sorted by expert, and the
    end
    row of each expert, (E,) int32."""
    tokens = x.flatten(0, -2).to(product_dtype(x))
    expert, order = chosen.flatten().sort(stable=True)  # choice j of token t stood at t * k + j
    row, ends, n_rows = lay_out(expert, experts.n_experts, block_size(tokens, expert, experts.n_experts))
    token = order.new_zeros(n_rows).scatter(0, row, order // chosen.shape[-1])  # the token that each row copies
    rows = experts(pick(tokens, token), ends)  # (R, D)
    picked = pick(rows, row[order.argsort()]).view(*chosen.shape, -1)  # (.., k, D), in the tokens' order again
    return (picked * weights[..., None].to(picked.dtype)).sum(-2).to(x.dtype)


def pick(rows: Tensor, index: Tensor) -> Tensor:
    """rows[index] (R, D), as an embedding lookup: several threads sum its gradient, one thread that of indexing."""
    return F.embedding(index, rows)


def lay_out(expert: Tensor, n_experts: int, block: int) -> tuple[Tensor, Tensor, int]:
    """Lay out rows for sorted choices (N,): the row of each (N,), where each expert's rows end (E,) int32, and how many
    rows there are. Each expert has a whole number of blocks; rows that only fill up a block belong to no choice."""
    every = torch.arange(n_experts, device=expert.device)
    ends = torch.searchsorted(expert, every, right=True, out_int32=True)  # bincount would break a compiled graph
    starts = F.pad(ends[:-1], (1, 0))
    n_blocks = (ends - starts + block - 1) // block
    filled_ends = block * n_blocks.cumsum(0, dtype=torch.int32)
    filled_starts = filled_ends - block * n_blocks
    n_rows = (len(expert) + n_experts * (block - 1)) // block * block  # enough, however the choices fall
    filled_ends[-1] = n_rows
    return torch.arange(len(expert), device=expert.device) + (filled_starts - starts)[expert], filled_ends, n_rows


def block_size(tokens: Tensor, expert: Tensor, n_experts: int) -> int:
    """The block of `lay_out`. The CPU's bf16 kernel is compiled once for each number of rows, which takes longer than
    the product. So with many rows, their number is padded to a multiple of 64."""
    recompiles = tokens.device.type == "cpu" and tokens.dtype is torch.bfloat16
    return 64 if recompiles and len(expert) >= 128 * n_experts else 1


def grouped_linear(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows (R, in), sorted by expert, times the matrix of each one's expert in weight (E, out, in) -> (R, out).

    One kernel where there is one, else a loop over the experts. Under autocast the product is made in its precision.
    """
    dtype = product_dtype(rows)
    rows, weight = rows.to(dtype), weight.to(dtype)
    if has_grouped_kernel(weight):
        return F.grouped_mm(rows, weight.transpose(1, 2), offs=ends)
    from llm.modules.kernels.looped import looped_linear  # takes seconds to import

    return looped_linear(rows, weight, ends)


def has_grouped_kernel(weight: Tensor) -> bool:
    """Whether `grouped_mm` takes such weights: bf16 or fp32 (compiled: bf16), widths of 16 bytes, sm80 or later."""
    dtypes = (torch.bfloat16,) if torch.compiler.is_compiling() else (torch.bfloat16, torch.float32)
    aligned = all(size * weight.itemsize % 16 == 0 for size in weight.shape[1:])
    if weight.is_cuda and torch.cuda.get_device_capability(weight.device) < (8, 0):
        return False
    return aligned and weight.dtype in dtypes and weight.device.type in ("cpu", "cuda", "meta")
