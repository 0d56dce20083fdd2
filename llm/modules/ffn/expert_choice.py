"""Expert choice: experts choose their tokens, so that every expert is equally busy by construction.

    S = softmax(x W) over experts        expert i takes the C tokens with the largest S[:, i]        C = c T / E
    y_t = sum over the experts i that took t of S[t, i] expert_i(x_t)

A token may be taken by many experts or by none. That depends on the scores of all other tokens, the later ones too, so
a model trained with it uses the future and cannot generate: no causal model here has it.

Mixture-of-Experts with Expert Choice Routing, arXiv 2202.09368. Blog: FFN and MoE.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ExpertChoice(nn.Module):
    """(B, T, d_model) -> (B, T, d_model), not causal. `experts` as in MoE; `capacity_factor` c is the mean number of
    experts a token has. Each expert takes its tokens from one sequence at a time, at least one and at most all."""

    def __init__(self, d_model: int, n_experts: int, experts: nn.Module, capacity_factor: float = 2.0):
        super().__init__()
        self.n_experts, self.capacity_factor = n_experts, capacity_factor
        self.weight = nn.Parameter(0.02 * torch.randn(n_experts, d_model))
        self.experts = experts

    def forward(self, x: Tensor) -> Tensor:
        n_sequences, length, _ = x.shape
        capacity = min(max(int(self.capacity_factor * length / self.n_experts), 1), length)
        scores = F.linear(x, self.weight).softmax(-1)  # (B, T, E)
        weights, tokens = scores.permute(2, 0, 1).topk(capacity)  # (E, B, C): sorted by expert as they are
        tokens = (tokens + length * torch.arange(n_sequences, device=x.device)[:, None]).flatten()
        ends = n_sequences * capacity * torch.arange(1, self.n_experts + 1, device=x.device, dtype=torch.int32)
        rows = self.experts(x.flatten(0, 1)[tokens], ends) * weights.flatten()[:, None]
        return torch.zeros_like(x).flatten(0, 1).index_add(0, tokens, rows.to(x.dtype)).view_as(x)
