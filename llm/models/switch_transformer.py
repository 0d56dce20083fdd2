"""The baseline with a Switch layer for each feed-forward layer: many experts, each as wide as the layer they replace,
and one of them for each token. The parameters grow, the work for a token stays.

    FFN(x) = p_i(x) expert_i(x), i = argmax p(x)        loss = ce + a E sum_i f_i P_i + b mean (log sum exp logits)^2

Switch Transformers, arXiv 2101.03961 (there every other layer); the z loss: ST-MoE, arXiv 2202.08906.
Blog: FFN and MoE, Switch.
Gallery: docs/gallery/index.html#switch_transformer
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from llm.config import check_positive
from llm.models.baseline import Baseline
from llm.modules.ffn.moe import MoE, PlainExperts
from llm.modules.ffn.switch import SwitchRouter


class SwitchTransformer(Baseline):
    @dataclass(frozen=True)
    class Config(Baseline.Config):
        """The baseline's sizes; `d_ff` is the width of each expert."""

        n_experts: int = 8
        """Experts in each layer, d_ff wide; each token goes to one of them."""
        capacity_factor: float = 2.0
        """In training, an expert takes this times its even share of a sequence's tokens, and drops the rest."""
        aux_loss_coef: float = 0.01
        """Weight of the loss that balances the load of the experts."""
        z_loss_coef: float = 0.001
        """Weight of the loss that keeps the router's logits small."""

        small: ClassVar[dict[str, Any]] = {**Baseline.Config.small, "n_experts": 4}

        def __post_init__(self):
            super().__post_init__()
            check_positive(self, "n_experts", "capacity_factor")

    def make_ffn(self, layer: int) -> nn.Module:
        c = self.config
        losses = {"aux_loss_coef": c.aux_loss_coef, "z_loss_coef": c.z_loss_coef}
        router = SwitchRouter(c.d_model, c.n_experts, capacity_factor=c.capacity_factor, **losses)
        return MoE(router, PlainExperts(c.d_model, c.d_ff, c.n_experts))
