"""Load balance: the auxiliary losses of routers, and counts of how often each expert was chosen.

    balance loss = mean over sequences of  E sum_i f_i P_i        f_i: expert i's share of the choices in the sequence
                                                                  P_i: its mean probability in the sequence
    z loss       = mean over tokens of (log sum exp logits)^2

The balance loss is computed per sequence, as in DeepSeek-V2 (arXiv 2405.04434, section 2.2.3). So the mean does not
depend on how a global batch is split into micro-batches and ranks. Switch Transformers multiply means over a batch
instead. Their loss depends on the split, since f_i differs between micro-batches.

In training a router stores `aux_loss` and the counts of the forward pass, `seen`. `Transformer.loss` reads both right
after the forward pass. So the forward passes that activation checkpointing repeats later are not counted. The counts
are not buffers, because DDP overwrites buffers with those of rank 0.

Switch Transformers, arXiv 2101.03961, section 2.2; ST-MoE, arXiv 2202.08906. Blog: FFN and MoE, load balance.
"""

import torch
from torch import Tensor, distributed, nn


def balance_loss(p: Tensor, chosen: Tensor) -> Tensor:
    """E sum_i f_i P_i, mean over sequences. p (B, T, E) are probabilities; `chosen` (B, E) counts the choices of each
    expert. The loss is 1 at an even load and at most E / k with k choices per token. Only P has a gradient.

    Switch Transformers, arXiv 2101.03961, equations 4-6; with k choices: DeepSeekMoE, arXiv 2401.06066.
    """
    shares = chosen / chosen.sum(-1, keepdim=True)
    return p.shape[-1] * (shares * p.mean(1)).sum(-1).mean()


def z_loss(logits: Tensor) -> Tensor:
    """mean (log sum exp logits)^2 over tokens: it keeps the logits (.., E) and so their rounding errors small.
    ST-MoE: Designing Stable and Transferable Sparse Expert Models, arXiv 2202.08906, equation 5."""
    return logits.logsumexp(-1).square().mean()


class Balanced(nn.Module):
    """The base class of routers: it stores their losses, and sums up their choices until `after_step`.

    aux_loss_coef, z_loss_coef    weights of `balance_loss` and `z_loss` in `aux_loss`
    """

    def __init__(self, n_experts: int, aux_loss_coef: float, z_loss_coef: float):
        super().__init__()
        self.n_experts, self.aux_loss_coef, self.z_loss_coef = n_experts, aux_loss_coef, z_loss_coef
        self.aux_loss: Tensor | None = None  # of the last training forward pass, until `pop_loss` returns it
        self.seen: Tensor | None = None  # counts of that forward pass
        self.total: Tensor | None = None  # sum of `seen` since the last step
        self.last_step: Tensor | None = None  # `total` of the last finished step, summed over all ranks

    def observe(self, logits: Tensor, scores: Tensor, chosen: Tensor, weights: Tensor) -> None:
        """Set `aux_loss` and `seen` from logits and scores (.., T, E), chosen experts and their weights (.., T, k).
        `seen` (E + 3,) = [choices of each expert, dropped choices, sum of entropies in nats, tokens]."""
        p = (scores / scores.sum(-1, keepdim=True)).reshape(-1, *scores.shape[-2:])  # (B, T, E)
        choices = chosen.reshape(len(p), -1)  # (B, T k)
        counts = torch.zeros(len(p), self.n_experts, dtype=p.dtype, device=p.device)
        counts = counts.scatter_add(1, choices, torch.ones_like(choices, dtype=p.dtype))
        self.aux_loss = self.aux_loss_coef * balance_loss(p, counts) + self.z_loss_coef * z_loss(logits)
        entropy = torch.special.entr(p.detach()).sum()
        rest = torch.stack([(weights == 0).sum(), entropy, entropy.new_full((), p.shape[0] * p.shape[1])])
        self.seen = torch.cat([counts.sum(0), rest]).detach()

    def pop_loss(self) -> Tensor | None:
        """Called right after a forward pass: return and clear its `aux_loss`, and add its counts to `total`."""
        loss, self.aux_loss = self.aux_loss, None  # copy.deepcopy fails on tensors with an autograd graph
        if self.seen is not None:
            self.total = self.seen if self.total is None else self.total + self.seen
            self.seen = None
        return loss

    @torch.no_grad()
    def after_step(self) -> None:
        """Called after an optimiser step on every rank: sum the counts over the ranks, then `rebalance`. The counts of
        recomputed forward passes are discarded."""
        total, self.total, self.seen, self.aux_loss = self.total, None, None, None
        if total is not None:
            if distributed.is_initialized():
                distributed.all_reduce(total)
            self.last_step = total
            self.rebalance(total[: self.n_experts])

    def rebalance(self, load: Tensor) -> None:
        """Adjust the router to `load` (E,), the choices of each expert in the last step. By default, do nothing."""

    def metrics(self) -> dict[str, float | list[float]]:
        """For the last step: each expert's share of the choices, the share of dropped choices, and the mean entropy of
        the normalised scores in nats (log n_experts: uniform; 0: all on one expert)."""
        if self.last_step is None:
            return {}
        *chosen, n_dropped, nats, n_tokens = self.last_step.tolist()
        load = [n / sum(chosen) for n in chosen]
        return {"expert_load": load, "dropped_share": n_dropped / sum(chosen), "router_entropy": nats / n_tokens}
