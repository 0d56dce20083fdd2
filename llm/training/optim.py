"""The optimiser and its learning rate.

AdamW divides the step of each weight by the size of its own gradient. Muon makes the step of a whole matrix orthogonal:
all its singular values become about 1, so directions with small gradients are learned as fast as those with large ones.

    M = momentum of the gradient        step = 0.2 sqrt(max(rows, columns)) U V^T,  where M = U S V^T

The factor gives Muon's steps the size of AdamW's, so both take the same learning rate and decay.

AdamW: Decoupled Weight Decay Regularization, arXiv 1711.05101. Muon: Muon is Scalable for LLM Training,
arXiv 2502.16982. Warm-up, then half a cosine: SGDR, arXiv 1608.03983.
"""

import math

import torch
from torch import Tensor, nn

from llm.config import TrainConfig
from llm.training.device import multiplies_bf16


def make_optimizer(model: nn.Module, config: TrainConfig) -> "torch.optim.Optimizer | MuonAndAdamW":
    """Fused AdamW, for all parameters or for those that Muon does not take."""
    orthogonal = hidden_matrices(model) if config.optimizer == "muon" else []
    taken = set(map(id, orthogonal))
    decaying, others = split_by_decay(model)
    groups = [
        {"params": [p for p in decaying if id(p) not in taken], "weight_decay": config.weight_decay},
        {"params": [p for p in others if id(p) not in taken], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=config.max_lr, betas=(config.beta1, config.beta2), fused=True)
    if config.optimizer == "adamw":
        return adamw
    return MuonAndAdamW(Muon(orthogonal, config.max_lr, config.weight_decay), adamw)


def split_by_decay(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(parameters that decay, parameters that do not).

    Matrices decay. Gains and biases, which have one axis, do not, since 0 is no better value for them than another. A
    module may name more parameters of its own that must not decay: `no_weight_decay`, a tuple of names.
    """
    named = {id(getattr(module, name)) for module in model.modules() for name in getattr(module, "no_weight_decay", ())}
    decaying = [p for p in model.parameters() if p.dim() >= 2 and id(p) not in named]
    others = [p for p in model.parameters() if p.dim() < 2 or id(p) in named]
    return decaying, others


def fit_groups(saved: dict, model: nn.Module, optimizer: "torch.optim.Optimizer | MuonAndAdamW") -> dict:
    """A saved optimiser state in the groups of `optimizer`. Before modules had `no_weight_decay`, the first group held
    every parameter with two axes or more; such a state is put into the groups of today, any other is returned as it is.
    """
    if isinstance(optimizer, MuonAndAdamW):
        return saved | {"adamw": fit_groups(saved["adamw"], model, optimizer.parts["adamw"])}
    groups = [group["params"] for group in optimizer.param_groups]
    today = {id(p): i for i, p in enumerate(p for group in groups for p in group)}
    parameters = [p for p in model.parameters() if id(p) in today]
    before = [[p for p in parameters if p.dim() >= 2], [p for p in parameters if p.dim() < 2]]
    sizes = [len(group["params"]) for group in saved["param_groups"]]
    if sizes != [len(group) for group in before] or sizes == [len(group) for group in groups]:
        return saved
    earlier = [today[id(p)] for group in before for p in group]  # the number of today for each number of before
    numbers = iter(range(len(today)))
    regrouped = [
        theirs | {"params": [next(numbers) for _ in group]}
        for theirs, group in zip(saved["param_groups"], groups, strict=True)
    ]
    return {"state": {earlier[i]: state for i, state in saved["state"].items()}, "param_groups": regrouped}


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The weights of the linear layers inside the blocks. Embeddings and the head, whose rows are tokens, are left out,
    and so are stacked experts, which have three axes."""
    return [m.weight for m in model.blocks.modules() if isinstance(m, nn.Linear)]


class Muon(torch.optim.Muon):
    """torch's Muon, whose iteration is always in bf16, in fp32 where the hardware has no bf16: there a CPU takes twenty
    times as long for it, which is more than the rest of a small model's step."""

    def __init__(self, params: list[nn.Parameter], lr: float, weight_decay: float):
        super().__init__(params, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p.grad)
                momentum = self.state[p]["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                gradient = p.grad.lerp(momentum, group["momentum"])  # Nesterov's look ahead
                dtype = torch.bfloat16 if multiplies_bf16(p.device) else torch.float32
                size = 0.2 * math.sqrt(max(p.shape))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(orthogonalize(gradient.to(dtype), group["ns_steps"]), alpha=-group["lr"] * size)


def orthogonalize(matrix: Tensor, n_steps: int = 5) -> Tensor:
    """(m, n) = U S V^T -> about U V^T: each step of Newton and Schulz maps all singular values by one polynomial,
    s -> 3.4445 s - 4.775 s^3 + 2.0315 s^5, which moves them from (0, 1] to between 0.7 and 1.2."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(n_steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.775, alpha=2.0315), x, beta=3.4445)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class MuonAndAdamW:
    """Two optimisers, each with parameters of its own, used like one."""

    def __init__(self, muon: torch.optim.Optimizer, adamw: torch.optim.Optimizer):
        self.parts = {"muon": muon, "adamw": adamw}

    @property
    def param_groups(self) -> list[dict]:
        return [group for part in self.parts.values() for group in part.param_groups]

    def step(self) -> None:
        for part in self.parts.values():
            part.step()

    def zero_grad(self) -> None:
        for part in self.parts.values():
            part.zero_grad()

    def state_dict(self) -> dict:
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, saved: dict) -> None:
        for name, part in self.parts.items():
            part.load_state_dict(saved[name])


def learning_rate(step: int, config: TrainConfig) -> float:
    """The learning rate of step 1 .. `config.steps`: linear up to max_lr, then a cosine to min_lr at the last step."""
    if step <= config.warmup_steps:
        return config.max_lr * step / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.min_lr + (config.max_lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
