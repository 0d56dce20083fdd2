"""How fast the states of recurrent mixers fade, found by running them: no mixer has to say it, and none is known here.

A state of ones and a state of zeros go through one token of zeros. The difference that is left is exp(-rate), for each
number of the state, since every recurrence is linear in its state. A token of zeros writes and overwrites nothing.
"""

import inspect
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from llm.gallery.labels import facts_of, settings_of, title_of
from llm.gallery.weights import as_drawn
from llm.models.transformer import Transformer

CURVES = 16
"""Lines that a picture has at most."""


def decays(model: Transformer) -> list[dict[str, Any]]:
    """For each recurrent mixer, by `name`: `rates` a token before training, from slow to fast, CURVES of them at most
    and evenly chosen; `distinct`: how many different ones there are, to three digits."""
    return [decay_of(name, mixer, model.config.d_model) for name, mixer in recurrent_mixers(model).items()]


def recurrent_mixers(model: Transformer) -> dict[str, nn.Module]:
    """Each kind of mixer that keeps a state, by its title; its first and last variant where layers differ."""
    kinds: dict[str, dict[str, tuple[str, nn.Module]]] = {}
    for layer, block in enumerate(model.blocks, 1):
        for mixer in stateful(block):
            variant = repr([*facts_of(mixer), *settings_of(mixer)])
            kinds.setdefault(title_of(mixer), {}).setdefault(variant, (f", layer {layer}", mixer))
    found = {}
    for title, variants in kinds.items():
        ends = [*variants.values()][:: max(1, len(variants) - 1)]
        found |= {title + (layer if len(ends) > 1 else ""): mixer for layer, mixer in ends}
    return found


def stateful(module: nn.Module) -> Iterator[nn.Module]:
    """The modules inside, or the module itself, whose cache holds a `state` (llm/modules/recurrent/state.py)."""
    inner = [found for child in module.children() for found in stateful(child)]
    if inner or not hasattr(module, "make_cache"):
        yield from inner
    elif "length" in inspect.signature(module.make_cache).parameters and "state" in module.make_cache(1, 1):
        yield module


@torch.no_grad()
def decay_of(name: str, mixer: nn.Module, d_model: int) -> dict[str, Any]:
    mixer = as_drawn(mixer, projections=False)
    x, positions, states = torch.zeros(1, 1, d_model, dtype=torch.float64), torch.ones(1, 1, dtype=torch.int64), []
    for value in (1.0, 0.0):
        cache = mixer.make_cache(1, 1)
        cache["state"].fill_(value)
        mixer(x, positions, cache)
        states.append(cache["state"])
    left = (states[0] - states[1]).unique()
    rates = sorted({float(f"{abs(math.log(share)):.3g}") for share in left.tolist()})
    n = min(len(rates), CURVES)
    chosen = [rates[round(i * (len(rates) - 1) / max(1, n - 1))] for i in range(n)]
    return {"name": name, "rates": chosen, "distinct": len(rates)}
