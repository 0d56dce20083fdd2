"""What the tokens of a model see: masks, biases by distance, decays of recurrent states, and the speeds of RoPE.

The modules themselves compute all of it. Where weights decide it, they are drawn as before training (weights.py).
"""

import math
from functools import partial
from typing import Any

import torch
from torch import nn

from llm.gallery.decay import decays
from llm.gallery.describe import mask_part
from llm.gallery.labels import title_of, words
from llm.gallery.weights import as_drawn, repeatable
from llm.models.transformer import Transformer
from llm.modules.masks import Mask, visibility
from llm.modules.position_encoding.rope import RoPE, inverse_frequencies

CELLS = 48
"""Rows and columns of a drawn mask."""
DISTANCES = 256
"""Tokens over which a bias is drawn."""


def sights(model: Transformer) -> dict[str, Any]:
    """Each mask once, each rotation once, and each kind of bias and of recurrent state."""
    longest = model.config.max_seq_len
    masks, ropes, biases = {}, {}, {}
    for module in model.modules():
        if isinstance(mask := getattr(module, "mask", None), Mask):
            part = mask_part(mask, "mask")
            masks.setdefault(", ".join([part.title, *part.facts]), mask)
        if isinstance(module, RoPE):
            ropes.setdefault((module.theta, module.rotary_dim, repr(module.scaling)), module)
        if getattr(module, "score_bias", None) is not None:
            biases.setdefault(repr(module.score_bias), partial(score_bias_picture, module.score_bias))
        elif hasattr(module, "distances"):
            biases.setdefault(repr(module), partial(distance_picture, module))
    return {
        "masks": [{"name": name, **mask_picture(mask, longest)} for name, mask in list(masks.items())[:4]],
        "ropes": [{"theta": key[0], **rope_wavelengths(rope, longest)} for key, rope in ropes.items()],
        "biases": [picture() for picture in biases.values()],
        "decays": decays(model),
    }


def mask_picture(mask: Mask, longest: int) -> dict[str, Any]:
    """The mask over a text that is long enough to show its shape: CELLS rows of digits, 0 hidden to 9 visible.

    `length` is that of the text. Where a cell stands for many pairs of tokens, its digit is the share of visible ones.
    """
    length = max(CELLS, min(longest, 2 * mask.reach if mask.reach < math.inf else longest))
    step = max(1, round(length / CELLS))
    inside = min(step, 8)  # positions looked at in each cell, by row and column
    offsets = torch.arange(inside) * step // inside
    positions = (torch.arange(CELLS)[:, None] * step + offsets).flatten()
    shown = visibility(mask, positions, positions).float().unflatten(0, (CELLS, inside)).unflatten(2, (CELLS, inside))
    digits = (shown.mean((1, 3)) * 9).ceil().int().tolist()
    return {"length": CELLS * step, "rows": ["".join(map(str, row)) for row in digits]}


def rope_wavelengths(rope: RoPE, context: int) -> dict[str, Any]:
    """Tokens in which each pair of channels makes a full turn, without and with the scaling."""
    plain = inverse_frequencies(rope.rotary_dim, rope.theta)
    scaled = rope.scaling(rope.rotary_dim, rope.theta, torch.arange(context))[0] if rope.scaling else None
    turns = [
        None if f is None else [float(f"{2 * math.pi / value:.3g}") for value in f.tolist()] for f in (plain, scaled)
    ]
    return {"plain": turns[0], "scaled": turns[1], "context": context}


@torch.no_grad()
def score_bias_picture(bias: Any) -> dict[str, Any]:
    """What is added to the scores by distance: a line for each head; where it is learned, one for the first head."""
    learned = isinstance(bias, nn.Module)
    values = (as_drawn(bias) if learned else bias)(torch.tensor([DISTANCES - 1]), torch.arange(DISTANCES))
    curves = values[:, 0].flip(-1).double()  # (H, DISTANCES), the nearest key first
    if learned:
        told = f"the first of {len(curves)} heads, as drawn before training: each step is a number of its own"
    else:
        told = f"a line for each of {len(curves)} heads"
    name = title_of(bias) if learned else words(type(bias).__name__)
    shown = curves[:1] if learned else curves
    return {"caption": f"{name}, added to the scores: {told}", "curves": [corners(curve) for curve in shown.tolist()]}


@torch.no_grad()
def distance_picture(mixer: nn.Module) -> dict[str, Any]:
    """The position term of a mixer whose queries are multiplied with a vector for each distance, `distances(n)`."""
    vectors = as_drawn(mixer).distances(DISTANCES)[0]  # (D, DISTANCES), the nearest key last
    with repeatable():
        queries = torch.randn(3, len(vectors)).to(vectors)
    curves = (queries @ vectors / len(vectors) ** 0.5).flip(-1)
    caption = (
        "position term of the scores: it depends on the query; three random ones in the first head, before training"
    )
    return {"caption": f"{words(type(mixer).__name__)}, {caption}", "curves": [corners(c) for c in curves.tolist()]}


def corners(values: list[float]) -> list[list[float]]:
    """The points [distance, value] between which a curve is straight."""
    tolerance = 1e-3 * (max(values) - min(values))
    bends = [abs(c - 2 * b + a) > tolerance for a, b, c in zip(values, values[1:], values[2:], strict=False)]
    kept = [True, *bends, True]
    return [[i, float(f"{value:.3g}")] for i, value in enumerate(values) if kept[i]]
