"""The experts of GPT-OSS: gated, with biases, and with their factors clamped before they are multiplied.

    gate = min(x W_gate + b_gate, limit)        up = clip(x W_up + b_up, -limit, limit)
    expert(x) = (gate sigmoid(alpha gate) * (up + 1)) W_down + b_down

A product of two unbounded numbers grows as their square, and with few bits one outlier makes the rounding of all its
neighbours coarse; clamped at 7 the product is at most 56. x sigmoid(1.702 x) approximates GELU. With up + 1, the gate
passes its own value where `up` is 0. By default limit = 7 and alpha = 1.702.
gpt-oss-120b & gpt-oss-20b Model Card, arXiv 2508.10925, section 2. Blog: FFN and MoE; Case studies, GPT-OSS.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llm.modules.kernels.grouped import grouped_linear


class ClampedExperts(nn.Module):
    """For MoE: rows (R, d_model), sorted by expert, and where each expert's rows end (E,) int32 -> (R, d_model).

    gate_up_proj and its bias hold W_gate and then W_up; published checkpoints alternate the two.
    """

    no_weight_decay = ("gate_up_proj_bias", "down_proj_bias")  # biases, although they have two axes

    def __init__(self, d_model: int, d_expert: int, n_experts: int, limit: float = 7.0, alpha: float = 1.702):
        super().__init__()
        self.n_experts, self.d_expert, self.limit, self.alpha = n_experts, d_expert, limit, alpha
        self.gate_up_proj = nn.Parameter(0.02 * torch.randn(n_experts, 2 * d_expert, d_model))
        self.gate_up_proj_bias = nn.Parameter(torch.zeros(n_experts, 2 * d_expert))
        self.down_proj = nn.Parameter(0.02 * torch.randn(n_experts, d_model, d_expert))
        self.down_proj_bias = nn.Parameter(torch.zeros(n_experts, d_model))

    def expert(self, i: int, x: Tensor) -> Tensor:
        """Expert i alone: (.., d_model) -> (.., d_model)."""
        both = F.linear(x, self.gate_up_proj[i], self.gate_up_proj_bias[i])
        return F.linear(clamped_swiglu(both, self.limit, self.alpha), self.down_proj[i], self.down_proj_bias[i])

    def forward(self, rows: Tensor, ends: Tensor) -> Tensor:
        numbers = torch.arange(len(rows), device=rows.device, dtype=ends.dtype)
        expert = torch.searchsorted(ends, numbers, right=True)  # (R,): the expert of each row
        both = add_bias(grouped_linear(rows, self.gate_up_proj, ends), self.gate_up_proj_bias, expert)
        out = grouped_linear(clamped_swiglu(both, self.limit, self.alpha), self.down_proj, ends)
        return add_bias(out, self.down_proj_bias, expert)


def clamped_swiglu(both: Tensor, limit: float = 7.0, alpha: float = 1.702) -> Tensor:
    """(.., 2 F), gate and then up -> (.., F)."""
    gate, up = both.chunk(2, -1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1)


def add_bias(rows: Tensor, bias: Tensor, expert: Tensor) -> Tensor:
    """Rows (R, out) plus the bias (E, out) of each row's expert, as a lookup: its gradient sums equal rows fast."""
    return rows + F.embedding(expert, bias).to(rows.dtype)
