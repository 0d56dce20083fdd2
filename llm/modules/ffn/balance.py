"""Balance: the auxiliary losses of routers, and the counts of how often each expert was chosen.

    balance loss = mean over sequences of  E sum_i f_i P_i        f_i: expert i's share of the choices in the sequence
                                                                  P_i: its mean probability in the sequence
    z loss       = mean over tokens of (log sum exp logits)^2

The balance loss is taken per sequence, as DeepSeek-V2 defines it (arXiv 2405.04434, section 2.2.3). A mean over
sequences does not depend on how a global batch is cut into micro-batches or shared by ranks. The product of two means
over a batch, as in Switch Transformers, does: each micro-batch would have other shares f_i.

In training a router stores `aux_loss`, and `seen`: the counts of this forward pass. `Transformer.loss` takes both right
after the forward pass, so what activation checkpointing recomputes in the backward pass is not counted again. They are
not buffers, which DDP would replace by rank 0's.

Switch Transformers, arXiv 2101.03961, section 2.2; ST-MoE, arXiv 2202.08906. Blog: FFN and MoE, load balance.
"""

import torch
from torch import Tensor, distributed, nn


def balance_loss(p: Tensor, chosen: Tensor) -> Tensor:
    """E sum_i f_i P_i, mean over sequences, for probabilities p (B, T, E) and how often each expert was chosen (B, E):
    1 at an even load, at most E / k with k choices a token. The gradient flows through P only.

    Switch Transformers, arXiv 2101.03961, equations 4-6, for k choices as in DeepSeekMoE, arXiv 2401.06066.
    """
    shares = chosen / chosen.sum(-1, keepdim=True)
    return p.shape[-1] * (shares * p.mean(1)).sum(-1).mean()


def z_loss(logits: Tensor) -> Tensor:
    """mean (log sum exp logits)^2 over tokens: keeps the logits (.., E) small, and with them the rounding errors.
    ST-MoE: Designing Stable and Transferable Sparse Expert Models, arXiv 2202.08906, equation 5."""
    return logits.logsumexp(-1).square().mean()


class Balanced(nn.Module):
    """The base class of routers: stores their losses, and counts what they chose until `after_step`.

    aux_loss_coef, z_loss_coef    weights of `balance_loss` and `z_loss` in `aux_loss`
    """

    def __init__(self, n_experts: int, aux_loss_coef: float, z_loss_coef: float):
        super().__init__()
        self.n_experts, self.aux_loss_coef, self.z_loss_coef = n_experts, aux_loss_coef, z_loss_coef
        self.aux_loss: Tensor | None = None  # of the last forward pass in training, until it is taken
        self.seen: Tensor | None = None  # counts of that forward pass
        self.total: Tensor | None = None  # sum of `seen` since the last step
        self.last_step: Tensor | None = None  # `total` of the step before, over all ranks

    def observe(self, logits: Tensor, scores: Tensor, chosen: Tensor, weights: Tensor) -> None:
        """Logits and scores (.., T, E), the chosen experts and their weights (.., T, k): set `aux_loss` and
        `seen` (E + 3,) = [choices of each expert, dropped choices, sum of entropies in nats, tokens]."""
        p = (scores / scores.sum(-1, keepdim=True)).reshape(-1, *scores.shape[-2:])  # (B, T, E)
        choices = chosen.reshape(len(p), -1)  # (B, T k)
        counts = torch.zeros(len(p), self.n_experts, dtype=p.dtype, device=p.device)
        counts = counts.scatter_add(1, choices, torch.ones_like(choices, dtype=p.dtype))
        self.aux_loss = self.aux_loss_coef * balance_loss(p, counts) + self.z_loss_coef * z_loss(logits)
        entropy = torch.special.entr(p.detach()).sum()
        rest = torch.stack([(weights == 0).sum(), entropy, entropy.new_tensor(p.shape[0] * p.shape[1])])
        self.seen = torch.cat([counts.sum(0), rest]).detach()

    def pop_loss(self) -> Tensor | None:
        """Right after a forward pass: its `aux_loss`, once; what the pass chose is added to the total."""
        loss, self.aux_loss = self.aux_loss, None  # copy.deepcopy fails on tensors with a graph
        if self.seen is not None:
            self.total = self.seen if self.total is None else self.total + self.seen
            self.seen = None
        return loss

    @torch.no_grad()
    def after_step(self) -> None:
        """After an optimiser step, on every rank: sum the counts over the ranks, then `rebalance`. The counts of
        recomputed forward passes are discarded."""
        total, self.total, self.seen, self.aux_loss = self.total, None, None, None
        if total is not None:
            if distributed.is_initialized():
                distributed.all_reduce(total)
            self.last_step = total
            self.rebalance(total[: self.n_experts])

    def rebalance(self, load: Tensor) -> None:
        """React to how often each expert was chosen in the last step, (E,). By default nothing changes."""

    def metrics(self) -> dict[str, float | list[float]]:
        """Of the last step: each expert's share of the choices, the share of dropped choices, and the mean entropy of
        the scores in nats (log n_experts: undecided; 0: certain)."""
        if self.last_step is None:
            return {}
        *chosen, n_dropped, nats, n_tokens = self.last_step.tolist()
        load = [n / sum(chosen) for n in chosen]
        return {"expert_load": load, "dropped_share": n_dropped / sum(chosen), "router_entropy": nats / n_tokens}
