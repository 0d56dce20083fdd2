"""Mixture of experts: many feed-forward layers, of which each token uses a few.

    MoE(x) = shared(x) + sum over chosen i of weight_i(x) expert_i(x)

The parameters grow with the number of experts, the work for a token does not. Models differ in the router (router.py)
and in the kind of expert. `explicit_moe` is the definition; llm/modules/kernels/grouped.py computes the same by sorting
the tokens by expert, so that each expert reads only its own.

Outrageously Large Neural Networks, arXiv 1701.06538; Mixtral of Experts, arXiv 2401.04088; shared and fine-grained
experts: DeepSeekMoE, arXiv 2401.06066. Blog: FFN and MoE.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llm.modules.ffn.glu import SwiGLU
from llm.modules.kernels.grouped import grouped_linear, grouped_moe


def explicit_moe(x: Tensor, chosen: Tensor, weights: Tensor, experts: nn.Module) -> Tensor:
    """The weighted sum as a loop over all experts: x (.., D), chosen experts and weights (.., k) -> (.., D)."""
    y = torch.zeros_like(x)
    for i in range(experts.n_experts):
        weight = (weights * (chosen == i)).sum(-1, keepdim=True)  # 0 where the token did not choose expert i
        y = y + weight.to(x.dtype) * experts.expert(i, x)
    return y


class MoE(nn.Module):
    """(B, T, d_model) -> (B, T, d_model).

    router    x -> (chosen, weights), both (B, T, k): which experts each token goes to, and how much each counts
    experts   (rows (R, d_model) sorted by expert, end row of each expert (E,) int32) -> (R, d_model)
    shared    a layer that every token goes through, too
    """

    def __init__(self, router: nn.Module, experts: nn.Module, shared: nn.Module | None = None):
        super().__init__()
        self.router, self.experts, self.shared = router, experts, shared

    def forward(self, x: Tensor) -> Tensor:
        chosen, weights = self.router(x)  # (B, T, k)
        y = grouped_moe(x, chosen, weights, self.experts)
        return y if self.shared is None else y + self.shared(x)

    @property
    def active_share(self) -> float:
        """The share of the experts that one token goes to."""
        return self.router.top_k / self.router.n_experts

    def flops(self, context: int) -> float:
        """FLOPs per token of the chosen experts."""
        return 2 * sum(p.numel() for p in self.experts.parameters() if p.dim() == 3) * self.active_share

    def idle_parameters(self) -> float:
        """Parameters of the experts that one token does not go to."""
        return sum(p.numel() for p in self.experts.parameters()) * (1 - self.active_share)


class LatentMoE(MoE):
    """Routed experts that read a narrower projection of the token, so that more of them cost the same (Nemotron 3).

    y = shared(x) + W_out sum over chosen i of weight_i(x) expert_i(W_in x). The router and the shared expert read x.
    """

    def __init__(self, d_model: int, d_latent: int, router: nn.Module, experts: nn.Module, shared: nn.Module):
        super().__init__(router, experts, shared)
        self.latent_in_proj = nn.Linear(d_model, d_latent, bias=False)
        self.latent_out_proj = nn.Linear(d_latent, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        chosen, weights = self.router(x)
        routed = grouped_moe(self.latent_in_proj(x), chosen, weights, self.experts)
        return self.shared(x) + self.latent_out_proj(routed)


class GatedShared(nn.Module):
    """The shared expert of Qwen2-MoE: (B, T, d_model) -> sigmoid(x w) SwiGLU(x), so that a token may do without it."""

    def __init__(self, d_model: int, d_shared: int):
        super().__init__()
        self.gate = nn.Linear(d_model, 1, bias=False)
        self.expert = SwiGLU(d_model, d_shared)

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(x).sigmoid() * self.expert(x)


class GatedExperts(nn.Module):
    """GLU experts, (act(x W_gate) * x W_up) W_down; gate_up_proj holds the rows of W_gate, then those of W_up."""

    def __init__(self, d_model: int, d_expert: int, n_experts: int, activation: Callable[[Tensor], Tensor] = F.silu):
        super().__init__()
        self.n_experts, self.d_expert, self.activation = n_experts, d_expert, activation
        self.gate_up_proj = nn.Parameter(0.02 * torch.randn(n_experts, 2 * d_expert, d_model))
        self.down_proj = nn.Parameter(0.02 * torch.randn(n_experts, d_model, d_expert))

    def expert(self, i: int, x: Tensor) -> Tensor:
        """Expert i alone: (.., d_model) -> (.., d_model)."""
        gate, up = F.linear(x, self.gate_up_proj[i]).chunk(2, -1)
        return F.linear(self.activation(gate) * up, self.down_proj[i])

    def forward(self, rows: Tensor, ends: Tensor) -> Tensor:
        gate, up = grouped_linear(rows, self.gate_up_proj, ends).chunk(2, -1)
        return grouped_linear(self.activation(gate) * up, self.down_proj, ends)


class PlainExperts(nn.Module):
    """MLP experts, act(x W_up) W_down, as in the Switch Transformer."""

    def __init__(self, d_model: int, d_expert: int, n_experts: int, activation: Callable[[Tensor], Tensor] = F.gelu):
        super().__init__()
        self.n_experts, self.d_expert, self.activation = n_experts, d_expert, activation
        self.up_proj = nn.Parameter(0.02 * torch.randn(n_experts, d_expert, d_model))
        self.down_proj = nn.Parameter(0.02 * torch.randn(n_experts, d_model, d_expert))

    def expert(self, i: int, x: Tensor) -> Tensor:
        """Expert i alone: (.., d_model) -> (.., d_model)."""
        return F.linear(self.activation(F.linear(x, self.up_proj[i])), self.down_proj[i])

    def forward(self, rows: Tensor, ends: Tensor) -> Tensor:
        return grouped_linear(self.activation(grouped_linear(rows, self.up_proj, ends)), self.down_proj, ends)
