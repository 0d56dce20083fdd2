"""DeepSeek-V3: V2's architecture with experts balanced by a bias, and with multi-token prediction in training.

DeepSeek-V3 (December 2024, arXiv 2412.19437) balances experts by a bias that changes which experts are chosen but not
their weights. It scores each expert by its own sigmoid, and in training predicts more than one token. Its weights were
trained and are published in FP8. DeepSeek-R1 is the same model trained further. Kimi K2 (July 2025, arXiv 2507.20534)
has half as many heads, half as many experts again, in one group, and one dense layer. Blog: Case studies, DeepSeek.
Gallery: docs/gallery/index.html#deepseek_v3
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llm.models.case_studies.deepseek_v2 import DeepseekConfig, latent_attention, shared_and_routed
from llm.models.transformer import Transformer
from llm.modules.blocks import Block
from llm.modules.ffn.glu import SwiGLU
from llm.modules.ffn.router import SigmoidRouter
from llm.modules.initialization import initialize
from llm.modules.kernels.cross_entropy import linear_cross_entropy
from llm.modules.multi_token_prediction import PredictionModule


class DeepseekV3(Transformer):
    """`mtp` holds the prediction modules. Only training uses them; llm/hub leaves them out."""

    @dataclass(frozen=True)
    class Config(DeepseekConfig):
        """The prediction module adds 10 M parameters to those of V2, 3.4 M of them active, in training only."""

        routed_scaling_factor: float = 2.5
        """What the weights of the chosen experts sum to, or, where they are not normalised, their factor."""
        normalize_weights: bool = True
        """Divide the weights of the chosen experts by their sum (norm_topk_prob)."""
        bias_update_speed: float = 0.001
        """Change of an expert's bias per step: up if its load was below the mean, else down."""
        n_mtp: int = 1
        """Number of prediction modules, one for each token predicted beyond the next."""
        mtp_loss_coef: float = 0.3
        """Weight of the mean loss of the prediction modules; V3 lowers it to 0.1 for the last third of its training."""

        def __post_init__(self):
            super().__post_init__()
            longest = self.max_seq_len - 1
            if not 0 <= self.n_mtp <= longest:
                raise ValueError(
                    f"n_mtp = {self.n_mtp} must lie between 0 and max_seq_len - 1 = {longest} (--model.n-mtp)"
                )
            if self.n_groups > 1 and self.n_experts // self.n_groups < 2:
                raise ValueError(
                    f"n_groups = {self.n_groups} leaves 1 of n_experts = {self.n_experts} to a group, which is judged "
                    "by its best two: choose fewer groups (--model.n-groups)"
                )

    training_only = ("mtp",)

    def __init__(self, config: Config):
        super().__init__(config)
        blocks = (self.make_block(config.n_layers + k) for k in range(config.n_mtp))
        self.mtp = nn.ModuleList(PredictionModule(config.d_model, block, self.make_norm) for block in blocks)
        initialize(self.mtp, config.initialization, config.n_layers)

    def make_block(self, layer: int) -> Block:
        c = self.config
        ffn = SwiGLU(c.d_model, c.d_ff) if layer < c.n_dense_layers else self.make_experts()
        return Block(self.make_mixer(layer), ffn, self.make_norm)

    def make_mixer(self, layer: int) -> nn.Module:
        return latent_attention(self.config)

    def make_experts(self) -> nn.Module:
        c = self.config
        groups = dict(n_groups=c.n_groups, top_k_groups=c.top_k_groups)
        weights = dict(
            normalize=c.normalize_weights, scale=c.routed_scaling_factor, bias_update_speed=c.bias_update_speed
        )
        return shared_and_routed(c, SigmoidRouter(c.d_model, c.n_experts, c.top_k, **groups, **weights))

    def loss(self, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The usual loss; in training, mtp_loss_coef times the mean loss of the prediction modules is part of `aux`. A
        module that has no token to predict, in a window of few, has no loss."""
        if not (self.training and self.mtp):
            return super().loss(tokens)
        x = self.norm(self.hidden(tokens[:, :-1]))
        ce, later = self.head_loss(x, tokens[:, 1:]), []
        for k, module in enumerate(self.mtp, 1):
            if x.shape[1] == 1:
                break
            x = module(x[:, :-1], self.tok_embed(tokens[:, k:-1]))  # (B, T - k, D)
            later.append(self.head_loss(x, tokens[:, k + 1 :]))
        prediction = [self.config.mtp_loss_coef * torch.stack(later).mean()] if later else []
        return self.with_aux(ce, [*prediction, *self.pop_losses()])

    def head_loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """Normed x (B, T, D) and targets (B, T) -> the mean cross-entropy in nats."""
        return linear_cross_entropy(x.flatten(0, 1), self.head_weight(), targets.flatten())
