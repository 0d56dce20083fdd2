"""Compare at equal cost: choose a model's feed-forward width so that it has as many parameters or FLOPs as another.

The widths of the dense layer and of the experts are scaled by one factor, found by bisection. Attention and other
mixers stay as they are. Parameters are all of them, also those of experts that a token does not go to. FLOPs are those
of a token in training (llm/analysis/accounting.py).
"""

from dataclasses import replace
from typing import Literal

import torch

from llm.analysis.accounting import describe
from llm.config import ModelConfig
from llm.models.transformer import Transformer

Quantity = Literal["parameters", "flops"]
COSTS: dict[str, str] = {"parameters": "parameters", "flops": "training_flops_per_token"}
WIDTHS = ("d_ff", "d_expert", "d_shared")
CLOSE = 0.01


def cost(Model: type[Transformer], config: ModelConfig, quantity: Quantity) -> float:
    """The cost of a model that is built without memory."""
    with torch.device("meta"):
        return describe(Model(config))[COSTS[quantity]]


def scaled(config: ModelConfig, factor: float, names: tuple[str, ...] = WIDTHS) -> ModelConfig:
    """The config with these widths times `factor`."""
    widths = {name: getattr(config, name, None) for name in names}
    return replace(config, **{name: max(1, round(factor * width)) for name, width in widths.items() if width})


def matched(Model: type[Transformer], config: ModelConfig, target: float, quantity: Quantity) -> ModelConfig:
    """The config whose feed-forward widths bring the cost nearest to `target`; as it is where that is within 1 percent.

    Where no width reaches the target, as in a model without feed-forward layers, the nearest config is returned:
    compare its `cost`.
    """
    for names in (WIDTHS, WIDTHS[:1]):  # a channel of all experts is a large step: the dense layer takes the rest
        if abs(cost(Model, config, quantity) / target - 1) > CLOSE:
            config = nearest(Model, config, target, quantity, names)
    return config


def nearest(
    Model: type[Transformer], config: ModelConfig, target: float, quantity: Quantity, names: tuple[str, ...]
) -> ModelConfig:
    """The config with these widths scaled by the factor, of up to 8, that brings the cost nearest to `target`."""
    low, high = 0.0, 8.0
    misses = {}
    for _ in range(14):
        middle = (low + high) / 2
        found = cost(Model, scaled(config, middle, names), quantity)
        misses[middle] = abs(found - target)
        low, high = (middle, high) if found < target else (low, middle)
    return scaled(config, min(misses, key=misses.__getitem__), names)
