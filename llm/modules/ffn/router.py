"""Routers: which experts a token goes to, how much each counts, and what keeps the experts equally busy.

    scores = softmax(x W)  or  sigmoid(x W)        chosen = the top k        weight_i = scale * score_i [/ their sum]

| router        | models                             | scores  | chosen by                 | weights                  |
|---------------|------------------------------------|---------|---------------------------|--------------------------|
| SoftmaxRouter | Mixtral, GPT-OSS (bias), Qwen3-MoE | softmax | score                     | sum to 1 (Qwen: may not) |
|               | DeepSeek-V2                        | softmax | score, best groups only   | as they are, times scale |
| SigmoidRouter | DeepSeek-V3                        | sigmoid | score + bias, best groups | sum to scale             |
| SwitchRouter  | Switch Transformer (switch.py)     | softmax | score, the best one       | as it is, 0 when dropped |

A softmax over the k chosen logits (GPT-OSS) is the softmax over all of them with the chosen scaled to sum to 1.

In training a router leaves behind `aux_loss`, and `seen`: what this forward chose. `Transformer.loss` takes both right
after the forward, so what activation checkpointing recomputes later, in backward, is not counted again. They are plain
attributes: DDP would overwrite a buffer with rank 0's.

Mixtral of Experts, arXiv 2401.04088; DeepSeek-V2, arXiv 2405.04434; DeepSeek-V3 Technical Report, arXiv 2412.19437.
Blog: FFN and MoE, routing and load balance.
"""

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F


class Router(nn.Module):
    """x (.., d_model) -> experts (.., top_k) int64 and weights (.., top_k), in fp32 (float64 stays).

    normalize     divide the weights by their sum; with top_k = 1 the router would learn from the balance loss only
    scale         factor of the weights (DeepSeek's routed_scaling_factor)
    n_groups      the experts stand in groups of n_experts / n_groups, of which a token may use `top_k_groups`
    aux_loss_coef, z_loss_coef    weights of `balance_loss` and `z_loss`
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
        super().__init__()
        check_routing(n_experts, top_k, n_groups, top_k_groups)
        self.n_experts, self.top_k, self.normalize, self.scale = n_experts, top_k, normalize, scale
        self.n_groups, self.top_k_groups = n_groups, top_k_groups
        self.aux_loss_coef, self.z_loss_coef = aux_loss_coef, z_loss_coef
        self.weight = nn.Parameter(0.02 * torch.randn(n_experts, d_model))
        self.bias = nn.Parameter(torch.zeros(n_experts)) if bias else None
        self.total: Tensor | None = None  # sum of `seen` since the last step
        self.last_step: Tensor | None = None  # `total` of the step before, over all ranks

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.logits(x)
        scores = self.scores(logits)
        experts = self.choose(scores)
        weights = self.weigh(scores, experts)
        if self.training:
            self.observe(logits, scores, experts, weights)
        return experts, weights

    def logits(self, x: Tensor) -> Tensor:
        """(.., E), never in half precision: rounding there changes the choice. Switch Transformers, section 2.4."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(dtype)
        if not torch.amp.is_autocast_available(x.device.type):
            return F.linear(x.to(dtype), self.weight.to(dtype), bias)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(dtype), self.weight.to(dtype), bias)

    def scores(self, logits: Tensor) -> Tensor:
        """Logits (.., E) -> non-negative scores (.., E)."""
        raise NotImplementedError(f"{type(self).__name__} must say how logits become scores: define scores")

    def choose(self, scores: Tensor) -> Tensor:
        """Scores (.., E) -> the experts of each token, (.., top_k)."""
        return best_of_groups(scores, self.n_groups, self.top_k_groups, best=1).topk(self.top_k).indices

    def weigh(self, scores: Tensor, experts: Tensor) -> Tensor:
        """How much each chosen expert counts: (.., top_k)."""
        weights = scores.gather(-1, experts)
        if self.normalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * self.scale

    def observe(self, logits: Tensor, scores: Tensor, experts: Tensor, weights: Tensor) -> None:
        """Leave behind `aux_loss` and `seen`: choices of each expert, dropped choices, entropy in nats, tokens."""
        p = (scores / scores.sum(-1, keepdim=True)).flatten(0, -2)  # (N, E)
        chosen = torch.zeros(self.n_experts, dtype=p.dtype, device=p.device)
        chosen = chosen.index_add(0, experts.flatten(), torch.ones_like(experts.flatten(), dtype=p.dtype))
        self.aux_loss = self.aux_loss_coef * balance_loss(p, chosen) + self.z_loss_coef * z_loss(logits)
        entropy = torch.special.entr(p.detach()).sum()
        rest = torch.stack([(weights == 0).sum(), entropy, entropy.new_tensor(len(p))])
        self.seen = torch.cat([chosen, rest]).detach()

    def after_step(self, total: Tensor) -> None:
        """Take the sum of `seen` over the step's micro-batches and all ranks, (E + 3,)."""
        self.last_step = total


class SoftmaxRouter(Router):
    """Scores that sum to 1: experts compete."""

    def scores(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1)


class SigmoidRouter(Router):
    """A score of its own for each expert, and a bias that balances without a loss: it moves the choice, never a weight.

        chosen = top k of (score + expert_bias)      after a step: expert_bias_i += speed * sign(mean load - load_i)

    The bias is a buffer: saved with the weights, changed by `after_step`, seen by no gradient.
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

    def after_step(self, total: Tensor) -> None:
        super().after_step(total)
        load = total[: self.n_experts]
        self.expert_bias += self.bias_update_speed * (load.mean() - load).sign()


def best_of_groups(scores: Tensor, n_groups: int, n_kept: int, best: int) -> Tensor:
    """Scores (.., E) with -inf outside the `n_kept` best groups of experts. A group is as good as the sum of its `best`
    scores: 1 in DeepSeek-V2, 2 in DeepSeek-V3. On many machines a group is what one of them holds."""
    if n_groups == 1:
        return scores
    grouped = scores.unflatten(-1, (n_groups, -1))  # (.., G, E / G)
    kept = grouped.topk(best).values.sum(-1).topk(n_kept).indices  # (.., n_kept)
    dropped = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter(-1, kept, False)
    return grouped.masked_fill(dropped[..., None], -torch.inf).flatten(-2)


def balance_loss(p: Tensor, chosen: Tensor) -> Tensor:
    """E sum_i f_i P_i for probabilities p (N, E), with f_i expert i's share of the choices (E,) and P_i its mean
    probability: 1 at an even load, E where one expert gets everything; the gradient flows through P.
    Switch Transformers, arXiv 2101.03961, equations 4-6; for k choices as in DeepSeekMoE, arXiv 2401.06066."""
    return p.shape[-1] * (chosen / chosen.sum() * p.mean(0)).sum()


def z_loss(logits: Tensor) -> Tensor:
    """mean (log sum exp logits)^2 over tokens: keeps the logits (.., E) small, where rounding is fine.
    ST-MoE: Designing Stable and Transferable Sparse Expert Models, arXiv 2202.08906, equation 5."""
    return logits.logsumexp(-1).square().mean()


def check_routing(n_experts: int, top_k: int, n_groups: int = 1, top_k_groups: int = 1) -> None:
    """Raises ValueError where a token could not find `top_k` different experts."""
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


def routers(model: nn.Module) -> list[Router]:
    """The routers of a model, in the order of its layers."""
    return [module for module in model.modules() if isinstance(module, Router)]


def count_choices(model: nn.Module) -> None:
    """After a training forward: each router adds what it has just seen to its total."""
    for router in routers(model):
        seen = vars(router).pop("seen", None)
        if seen is not None:
            router.total = seen if router.total is None else router.total + seen


@torch.no_grad()
def balance_experts(model: nn.Module) -> None:
    """After an optimiser step, on every rank: sum the totals over the ranks, in one all-reduce, and let each router act
    on its own. What recomputed forwards saw is forgotten."""
    active = [router for router in routers(model) if router.total is not None]
    if active:
        totals = torch.cat([router.total for router in active])
        if distributed.is_initialized():
            distributed.all_reduce(totals)
        for router, total in zip(active, totals.split([router.n_experts + 3 for router in active]), strict=True):
            router.after_step(total)
    for router in routers(model):
        router.total = None
        vars(router).pop("seen", None)


def expert_metrics(model: nn.Module) -> dict[str, float | list[float]]:
    """Of the last step: for layer l with experts `expert_load/l`, each expert's share of the choices, and for each
    such layer `dropped_share` of the choices and `router_entropy` in nats (log n_experts: undecided; 0: certain)."""
    metrics, dropped, entropy = {}, [], []
    active = [router for router in routers(model) if router.last_step is not None]
    for index, router in enumerate(active):
        *chosen, n_dropped, nats, n_tokens = router.last_step.tolist()
        metrics[f"expert_load/{index}"] = [n / sum(chosen) for n in chosen]
        dropped.append(n_dropped / sum(chosen))
        entropy.append(nats / n_tokens)
    return metrics | {"dropped_share": dropped, "router_entropy": entropy} if active else {}
