"""The experts of GPT-OSS: gated, with biases, and with their inputs cut off before they are multiplied.

    gate = min(x W_gate + b_gate, limit)        up = clip(x W_up + b_up, -limit, limit)
    expert(x) = (gate sigmoid(alpha gate) * (up + 1)) W_down + b_down

A product of two unbounded numbers grows as their square, and in few bits one outlier coarsens the rounding of all its
neighbours; cut off at 7 it is at most 56. x sigmoid(1.702 x) is close to GELU, and up + 1 lets a gate pass its own
value on where `up` says nothing. By default limit = 7 and alpha = 1.702.
gpt-oss-120b & gpt-oss-20b Model Card, arXiv 2508.10925, section 2. Blog: FFN and MoE; Case studies, GPT-OSS.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llm.modules.ffn.moe import grouped_linear


class ClampedExperts(nn.Module):
    """For MoE: rows (R, d_model), sorted by expert, and where each expert's rows end (E,) int32 -> (R, d_model).

    gate_up_proj and its bias hold W_gate and then W_up; published checkpoints alternate the two.
    """

    def __init__(self, d_model: int, d_expert: int, n_experts: int, limit: float = 7.0, alpha: float = 1.702):
        super().__init__()
        self.limit, self.alpha = limit, alpha
        self.gate_up_proj = nn.Parameter(0.02 * torch.randn(n_experts, 2 * d_expert, d_model))
        self.gate_up_proj_bias = nn.Parameter(torch.zeros(n_experts, 2 * d_expert))
        self.down_proj = nn.Parameter(0.02 * torch.randn(n_experts, d_model, d_expert))
        self.down_proj_bias = nn.Parameter(torch.zeros(n_experts, d_model))

    def forward(self, rows: Tensor, ends: Tensor) -> Tensor:
        numbers = torch.arange(len(rows), device=rows.device, dtype=ends.dtype)
        expert = torch.searchsorted(ends, numbers, right=True)  # (R,): whose row it is
        both = biased(grouped_linear(rows, self.gate_up_proj, ends), self.gate_up_proj_bias, expert)
        out = grouped_linear(clamped_swiglu(both, self.limit, self.alpha), self.down_proj, ends)
        return biased(out, self.down_proj_bias, expert)


def clamped_swiglu(both: Tensor, limit: float = 7.0, alpha: float = 1.702) -> Tensor:
    """(.., 2 F), gate and then up -> (.., F)."""
    gate, up = both.chunk(2, -1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1)


def biased(rows: Tensor, bias: Tensor, expert: Tensor) -> Tensor:
    """Rows (R, out) plus each one's expert's bias (E, out). As a lookup: its gradient sums runs of equal rows well."""
    return rows + F.embedding(expert, bias).to(rows.dtype)
