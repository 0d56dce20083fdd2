"""Fine-grained experts that a bias keeps equally busy, without a loss whose gradient competes with the model's own.

    chosen = top k of (s_i(x) + b_i), s = sigmoid(x W)        b_i += speed * sign(mean load - load_i), after each step
    FFN(x) = shared(x) + sum over the chosen of weight_i expert_i(x)        weight_i = s_i(x) / sum of the chosen s

The sizes are those of mixture_of_experts, so the two differ in the router only.

Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts, arXiv 2408.15664; in DeepSeek-V3, arXiv 2412.19437.
Blog: FFN and MoE, load balance.
Gallery: docs/gallery/index.html#loss_free_balancing
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from llm.config import check_not_negative, check_positive
from llm.models.baseline import Baseline
from llm.models.mixture_of_experts import MixtureOfExperts
from llm.modules.ffn.router import Router, SigmoidRouter, check_routing


class LossFreeBalancing(MixtureOfExperts):
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
        bias_update_speed: float = 0.001
        """Change of an expert's bias per step: up if its load was below the mean, else down."""

        small: ClassVar[dict[str, Any]] = {**Baseline.Config.small, "d_expert": 128}

        def __post_init__(self):
            super().__post_init__()
            check_positive(self, "d_expert", "bias_update_speed")
            check_not_negative(self, "n_shared_experts")
            check_routing(self.n_experts, self.top_k)

    def make_router(self) -> Router:
        c = self.config
        return SigmoidRouter(c.d_model, c.n_experts, c.top_k, bias_update_speed=c.bias_update_speed)
