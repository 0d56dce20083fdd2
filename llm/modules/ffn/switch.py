"""The Switch router: one expert a token, and a capacity, which is the most tokens that an expert takes.

    y = p_i(x) expert_i(x), i = argmax p(x)        capacity = ceil(capacity_factor * T / E) tokens of each sequence

Equal capacities give every expert a buffer of the same size, so that each can be computed on its own machine. In
training, a token whose expert is full is dropped: only the residual stream carries it on. Outside training nothing is
dropped. The factor p_i(x) gives the router a gradient, which an argmax has not.

Switch Transformers: Scaling to Trillion Parameter Models with Simple and Efficient Sparsity, arXiv 2101.03961.
Blog: FFN and MoE, Switch.
"""

import math

from torch import Tensor
from torch.nn import functional as F

from llm.modules.ffn.router import SoftmaxRouter


class SwitchRouter(SoftmaxRouter):
    """x (B, T, d_model) -> experts (B, T, 1) int64 and weights (B, T, 1), 0 where the token is dropped.

    The capacity is counted per sequence, first come first served, so the result for a sequence does not depend on its
    batch. The paper's factor of 1.25 is for a whole batch, where the load varies less. A dropped row is still computed
    and then multiplied by 0: on one machine fixed shapes are worth more than the few rows saved.
    """

    def __init__(self, d_model: int, n_experts: int, *, capacity_factor: float = 2.0, **settings):
        super().__init__(d_model, n_experts, top_k=1, normalize=False, **settings)
        if not capacity_factor > 0:
            raise ValueError(f"capacity_factor = {capacity_factor} must be positive (--model.capacity-factor)")
        self.capacity_factor = capacity_factor

    def weigh(self, scores: Tensor, experts: Tensor) -> Tensor:
        weights = super().weigh(scores, experts)
        if not self.training:
            return weights
        capacity = math.ceil(self.capacity_factor * experts.shape[-2] / self.n_experts)
        arrivals = F.one_hot(experts[..., 0], self.n_experts).cumsum(-2)  # (B, T, E): tokens of each expert so far
        return weights * (arrivals.gather(-1, experts) <= capacity)
