"""Fine-grained experts that a bias keeps equally busy, instead of a loss that would pull the weights off their task.

    chosen = top k of (s_i(x) + b_i), s = sigmoid(x W)        b_i += speed * sign(mean load - load_i), after each step
    FFN(x) = shared(x) + sum over the chosen of weight_i expert_i(x)        weight_i = s_i(x) / sum of the chosen s

Sizes as in mixture_of_experts, so that the two differ in the router only.

Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts, arXiv 2408.15664; in DeepSeek-V3, arXiv 2412.19437.
Blog: FFN and MoE, load balance.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from llm.config import DecoderConfig, check_positive
from llm.models.transformer import Transformer
from llm.modules.attention.multi_head import MultiHeadAttention
from llm.modules.blocks import Block
from llm.modules.ffn.mlp import MLP
from llm.modules.ffn.moe import MoE, PlainExperts
from llm.modules.ffn.router import SigmoidRouter, check_routing
from llm.modules.position_encoding.sinusoidal import add_sinusoidal


@dataclass(frozen=True)
class LossFreeBalancingConfig(DecoderConfig):
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
    """How far the bias of an expert moves after each step, up where it had too little to do."""

    small: ClassVar[dict[str, Any]] = {**DecoderConfig.small, "d_expert": 128}

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "d_expert")
        check_positive(self, "bias_update_speed")
        check_routing(self.n_experts, self.top_k)


class LossFreeBalancing(Transformer):
    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return add_sinusoidal(self.tok_embed(tokens), positions)

    def make_block(self, layer: int) -> Block:
        c = self.config
        attention = MultiHeadAttention(d_model=c.d_model, n_heads=c.n_heads)
        router = SigmoidRouter(c.d_model, c.n_experts, c.top_k, bias_update_speed=c.bias_update_speed)
        experts = PlainExperts(c.d_model, c.d_expert, c.n_experts)
        shared = MLP(c.d_model, c.n_shared_experts * c.d_expert) if c.n_shared_experts else None
        return Block(attention, MoE(router, experts, shared), self.make_norm)
