"""Balance: what keeps the experts of a router equally busy, and what tells how busy they were.

    balance loss = E sum_i f_i P_i                 f_i: expert i's share of the choices; P_i: its mean probability
    z loss       = mean (log sum exp logits)^2

In training a router leaves behind `aux_loss`, and `seen`: what this forward chose. `Transformer.loss` takes both right
after the forward, so what activation checkpointing recomputes later, in backward, is not counted again. They are plain
attributes: DDP would overwrite a buffer with rank 0's.

Switch Transformers, arXiv 2101.03961, section 2.2; ST-MoE, arXiv 2202.08906. Blog: FFN and MoE, load balance.
"""

import torch
from torch import Tensor, distributed, nn


def balance_loss(p: Tensor, chosen: Tensor) -> Tensor:
    """E sum_i f_i P_i for probabilities p (N, E), with f_i expert i's share of the choices (E,) and P_i its mean
    probability: 1 at an even load, E where one expert gets everything; the gradient flows through P.
    Switch Transformers, arXiv 2101.03961, equations 4-6; for k choices as in DeepSeekMoE, arXiv 2401.06066."""
    return p.shape[-1] * (chosen / chosen.sum() * p.mean(0)).sum()


def z_loss(logits: Tensor) -> Tensor:
    """mean (log sum exp logits)^2 over tokens: keeps the logits (.., E) small, where rounding is fine.
    ST-MoE: Designing Stable and Transferable Sparse Expert Models, arXiv 2202.08906, equation 5."""
    return logits.logsumexp(-1).square().mean()


class Observed(nn.Module):
    """What every router is: a module that adds up what it chose, until `after_step` hands it the sum over all ranks.

    aux_loss_coef, z_loss_coef    weights of `balance_loss` and `z_loss` in `aux_loss`
    """

    def __init__(self, n_experts: int, aux_loss_coef: float, z_loss_coef: float):
        super().__init__()
        self.n_experts, self.aux_loss_coef, self.z_loss_coef = n_experts, aux_loss_coef, z_loss_coef
        self.aux_loss: Tensor | None = None  # of the last forward in training, until it is taken
        self.seen: Tensor | None = None  # what that forward chose
        self.total: Tensor | None = None  # sum of `seen` since the last step
        self.last_step: Tensor | None = None  # `total` of the step before, over all ranks

    def observe(self, logits: Tensor, scores: Tensor, experts: Tensor, weights: Tensor) -> None:
        """Logits and scores (.., E), the experts chosen and their weights (.., top_k): leave behind `aux_loss` and
        `seen`, which holds the choices of each expert, then dropped choices, entropy in nats and tokens, (E + 3,)."""
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


def observed(model: nn.Module) -> list[Observed]:
    """The routers of a model, in the order of its layers."""
    return [module for module in model.modules() if isinstance(module, Observed)]


def count_choices(model: nn.Module) -> None:
    """After a training forward: each router adds what it has just seen to its total."""
    for router in observed(model):
        if router.seen is not None:
            router.total = router.seen if router.total is None else router.total + router.seen
            router.seen = None


@torch.no_grad()
def balance_experts(model: nn.Module) -> None:
    """After an optimiser step, on every rank: sum the totals over the ranks, in one all-reduce, and let each router act
    on its own. What recomputed forwards saw is forgotten."""
    active = [router for router in observed(model) if router.total is not None]
    if active:
        totals = torch.cat([router.total for router in active])
        if distributed.is_initialized():
            distributed.all_reduce(totals)
        for router, total in zip(active, totals.split([router.n_experts + 3 for router in active]), strict=True):
            router.after_step(total)
    for router in observed(model):
        router.total = router.seen = None


def expert_metrics(model: nn.Module) -> dict[str, float | list[float]]:
    """Of the last step: for layer l with experts `expert_load/l`, each expert's share of the choices, and for each
    such layer `dropped_share` of the choices and `router_entropy` in nats (log n_experts: undecided; 0: certain)."""
    metrics, dropped, entropy = {}, [], []
    active = [router for router in observed(model) if router.last_step is not None]
    for index, router in enumerate(active):
        *chosen, n_dropped, nats, n_tokens = router.last_step.tolist()
        metrics[f"expert_load/{index}"] = [n / sum(chosen) for n in chosen]
        dropped.append(n_dropped / sum(chosen))
        entropy.append(nats / n_tokens)
    return metrics | {"dropped_share": dropped, "router_entropy": entropy} if active else {}
