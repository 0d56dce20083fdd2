"""Experts one after the other, where there is no kernel that computes them together.

This is a file of its own because its decorator loads the compiler, which takes seconds and 170 MB.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


@torch.compiler.disable  # the lengths are Python numbers: a compiled graph would recompile each time they change
def looped_linear(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """What `grouped_linear` computes: rows (R, in), weight (E, out, in) and ends (E,) -> (R, out)."""
    ends = ends.tolist()
    starts = [0, *ends[:-1]]
    return torch.cat([F.linear(rows[i:j], w) for w, i, j in zip(weight, starts, ends, strict=True)])
