"""The optimiser and its learning rate.

AdamW divides each weight's step by the size of its own gradient. Muon makes the step of a whole matrix orthogonal: all
its singular values become about 1, so directions that the gradient hardly sees are learned as fast as the loud ones.

    M = momentum of the gradient        step = 0.2 sqrt(max(rows, columns)) U V^T,  where M = U S V^T

The factor gives Muon's steps the size of AdamW's, so both take the same learning rate and decay.

AdamW: Decoupled Weight Decay Regularization, arXiv 1711.05101. Muon: Muon is Scalable for LLM Training,
arXiv 2502.16982. Warm-up, then half a cosine: SGDR, arXiv 1608.03983.
"""

import math

import torch
from torch import nn

from llm.config import TrainConfig


def make_optimizer(model: nn.Module, config: TrainConfig) -> "torch.optim.Optimizer | MuonAndAdamW":
    """Fused AdamW, for all parameters or for those that are not Muon's. Matrices decay; gains and biases, which have
    one axis, do not: 0 is no better place for them."""
    orthogonal = hidden_matrices(model) if config.optimizer == "muon" else []
    others = [p for p in model.parameters() if not any(p is matrix for matrix in orthogonal)]
    groups = [
        {"params": [p for p in others if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=config.max_lr, betas=(config.beta1, config.beta2), fused=True)
    if config.optimizer == "adamw":
        return adamw
    muon = torch.optim.Muon(
        orthogonal, lr=config.max_lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    return MuonAndAdamW(muon, adamw)


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The weights of the linear layers inside the blocks: those that map hidden states to hidden states. Embeddings
    and head, whose rows are tokens, are none, nor are stacked experts, which have three axes."""
    return [m.weight for m in model.blocks.modules() if isinstance(m, nn.Linear)]


class MuonAndAdamW:
    """Two optimisers, each with its own parameters, behind the methods of one."""

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
    """The rate of step 1, 2, .. `config.steps`: linear up to max_lr, then a cosine down to min_lr at the last step."""
    if step <= config.warmup_steps:
        return config.max_lr * step / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.min_lr + (config.max_lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
