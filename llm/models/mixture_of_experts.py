"""The baseline with fine-grained experts: of many narrow ones each token uses a few, and one that all tokens share.

    FFN(x) = shared(x) + sum over the top k of weight_i expert_i(x)        weight_i = p_i(x) / sum of the chosen p

By default an expert is a quarter of the baseline's layer, and three routed ones and the shared one make up a whole. The
work for a token is that of the baseline and of the router, with (16 + 1) / 4 = 4.25 times the feed-forward parameters.

Top-k with weights that sum to 1: Mixtral of Experts, arXiv 2401.04088. Shared and fine-grained experts: DeepSeekMoE,
arXiv 2401.06066. Blog: FFN and MoE.
Gallery: docs/gallery/index.html#mixture_of_experts
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from llm.config import check_not_negative, check_positive
from llm.models.baseline import Baseline
from llm.modules.ffn.mlp import MLP
from llm.modules.ffn.moe import MoE, PlainExperts
from llm.modules.ffn.router import Router, SoftmaxRouter, check_routing


class MixtureOfExperts(Baseline):
    @dataclass(frozen=True)
    class Config(Baseline.Config):
        """`d_ff` is not used: the width of the feed-forward layer is that of its experts."""

        n_experts: int = 16
        """Experts in each layer among which the router chooses."""
        top_k: int = 3
        """Experts that each token goes to; one alone would always weigh 1 and teach the router nothing."""
        n_shared_experts: int = 1
        """Experts that every token goes through, too."""
        d_expert: int = 512
        """Width of an expert."""
        aux_loss_coef: float = 0.01
        """Weight of the loss that balances the load of the experts."""
        z_loss_coef: float = 0.0
        """Weight of the loss that keeps the router's logits small."""

        small: ClassVar[dict[str, Any]] = {**Baseline.Config.small, "d_expert": 128}

        def __post_init__(self):
            super().__post_init__()
            check_positive(self, "d_expert")
            check_not_negative(self, "n_shared_experts")
            check_routing(self.n_experts, self.top_k)

    def make_router(self) -> Router:
        c = self.config
        return SoftmaxRouter(c.d_model, c.n_experts, c.top_k, aux_loss_coef=c.aux_loss_coef, z_loss_coef=c.z_loss_coef)

    def make_ffn(self, layer: int) -> nn.Module:
        c = self.config
        router, experts = self.make_router(), PlainExperts(c.d_model, c.d_expert, c.n_experts)
        return MoE(router, experts, MLP(c.d_model, c.n_shared_experts * c.d_expert) if c.n_shared_experts else None)
