"""Routers choose the experts of each token and their weights. balance.py has the losses that keep the load even.

    scores = softmax(x W)  or  sigmoid(x W)        chosen = the top k        weight_i = scale * score_i [/ their sum]

| router        | models                             | scores  | chosen by                 | weights                  |
|---------------|------------------------------------|---------|---------------------------|--------------------------|
| SoftmaxRouter | Mixtral, GPT-OSS (bias), Qwen3-MoE | softmax | score                     | sum to 1 (Qwen: if set)  |
|               | DeepSeek-V2                        | softmax | score, best groups only   | unchanged, times scale   |
| SigmoidRouter | DeepSeek-V3                        | sigmoid | score + bias, best groups | sum to scale             |
| SwitchRouter  | Switch Transformer (switch.py)     | softmax | score, the best one       | unchanged, 0 if dropped  |

GPT-OSS takes a softmax over the k chosen logits: this equals the softmax over all, divided by the sum of the chosen.

Mixtral of Experts, arXiv 2401.04088; DeepSeek-V2, arXiv 2405.04434; DeepSeek-V3 Technical Report, arXiv 2412.19437.
Blog: FFN and MoE, routing.
"""

import torch
from torch import Tensor, nn

from llm.modules.ffn.balance import Balanced
from llm.modules.kernels.precision import full_precision_linear


class Router(Balanced):
    """x (.., d_model) -> experts (.., top_k) int64 and weights (.., top_k), in fp32 (float64 for float64 x).

    normalize     divide the weights by their sum; with top_k = 1 only the auxiliary losses then train the router
    scale         factor of the weights (DeepSeek's routed_scaling_factor)
    n_groups      the experts form n_groups equal groups; the experts of a token come from `top_k_groups` of them
    aux_loss_coef, z_loss_coef    weights of the two auxiliary losses in balance.py

    Raises ValueError if a token could not have `top_k` different experts, or if the groups are not equal.
    """

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        top_k: int,
        *,
        bias: bool = False,
        normalize: bool = True,
        scale: float = 1.0,
        n_groups: int = 1,
        top_k_groups: int = 1,
        aux_loss_coef: float = 0.0,
        z_loss_coef: float = 0.0,
    ):
        super().__init__(n_experts, aux_loss_coef, z_loss_coef)
        check_routing(n_experts, top_k, n_groups, top_k_groups)
        self.top_k, self.normalize, self.scale = top_k, normalize, scale
        self.n_groups, self.top_k_groups = n_groups, top_k_groups
        self.weight = nn.Parameter(0.02 * torch.randn(n_experts, d_model))
        self.bias = nn.Parameter(torch.zeros(n_experts)) if bias else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.logits(x)
        scores = self.scores(logits)
        experts = self.choose(scores)
        weights = self.weigh(scores, experts)
        if self.training:
            self.observe(logits, scores, experts, weights)
        return experts, weights

    def logits(self, x: Tensor) -> Tensor:
        """(.., E), never in half precision: its rounding could change the choice. Switch Transformers, section 2.4."""
        return full_precision_linear(x, self.weight, self.bias)

    def scores(self, logits: Tensor) -> Tensor:
        """Logits (.., E) -> non-negative scores (.., E)."""
        raise NotImplementedError(f"{type(self).__name__} must say how logits become scores: define scores")

    def choose(self, scores: Tensor) -> Tensor:
        """Scores (.., E) -> the experts of each token, (.., top_k)."""
        return best_of_groups(scores, self.n_groups, self.top_k_groups, best=1).topk(self.top_k).indices

    def weigh(self, scores: Tensor, experts: Tensor) -> Tensor:
        """The weights of the chosen experts: (.., top_k)."""
        weights = scores.gather(-1, experts)
        if self.normalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * self.scale

    def flops(self, context: int) -> float:
        """FLOPs per token."""
        return 2 * self.weight.numel()


class SoftmaxRouter(Router):
    """The scores of a token are a softmax over all experts, so they sum to 1."""

    def scores(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1)


class SigmoidRouter(Router):
    """Each expert has an independent score, and a bias balances the load without an auxiliary loss.

        chosen = top k of (score + expert_bias)      after a step: expert_bias_i += speed * sign(mean load - load_i)

    The bias changes which experts are chosen, but not their weights. It has no gradient: `after_step` updates it. It is
    a buffer, so checkpoints contain it.
    Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts, arXiv 2408.15664.
    """

    def __init__(self, d_model: int, n_experts: int, top_k: int, *, bias_update_speed: float = 1e-3, **settings):
        super().__init__(d_model, n_experts, top_k, **settings)
        self.bias_update_speed = bias_update_speed
        self.register_buffer("expert_bias", torch.zeros(n_experts))

    def scores(self, logits: Tensor) -> Tensor:
        return logits.sigmoid()

    def choose(self, scores: Tensor) -> Tensor:
        biased = scores.detach() + self.expert_bias
        return best_of_groups(biased, self.n_groups, self.top_k_groups, best=2).topk(self.top_k).indices

    def rebalance(self, load: Tensor) -> None:
        self.expert_bias += self.bias_update_speed * (load.mean() - load).sign()


def best_of_groups(scores: Tensor, n_groups: int, n_kept: int, best: int) -> Tensor:
    """Scores (.., E) with -inf outside the `n_kept` best groups of experts. The score of a group is the sum of its
    `best` largest scores: 1 in DeepSeek-V2, 2 in V3, or of all where it has fewer. If each machine holds one group, a
    token goes to few machines."""
    if n_groups == 1:
        return scores
    grouped = scores.unflatten(-1, (n_groups, -1))  # (.., G, E / G)
    kept = grouped.topk(min(best, grouped.shape[-1])).values.sum(-1).topk(n_kept).indices  # (.., n_kept)
    dropped = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter(-1, kept, False)
    return grouped.masked_fill(dropped[..., None], -torch.inf).flatten(-2)


def check_routing(n_experts: int, top_k: int, n_groups: int = 1, top_k_groups: int = 1) -> None:
    """Raises ValueError if a token could not have `top_k` different experts, or if the groups are not equal."""
    if not 1 <= top_k <= n_experts:
        raise ValueError(
            f"top_k = {top_k} must lie between 1 and n_experts = {n_experts} (--model.top-k, --model.n-experts)"
        )
    if n_experts % n_groups:
        raise ValueError(f"n_groups = {n_groups} must divide n_experts = {n_experts} (--model.n-groups)")
    if not 1 <= top_k_groups <= n_groups:
        raise ValueError(f"top_k_groups = {top_k_groups} must lie between 1 and n_groups = {n_groups}")
    if top_k > n_experts // n_groups * top_k_groups:
        raise ValueError(
            f"top_k = {top_k} experts do not fit into {top_k_groups} groups of {n_experts // n_groups} "
            f"(--model.top-k, --model.top-k-groups)"
        )
