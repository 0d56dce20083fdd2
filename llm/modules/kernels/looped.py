"""Experts one after the other, where there is no kernel that computes them together.

A module of its own, since its decorator loads the compiler: seconds and 170 MB that no other command should pay for.
Blog: FFN and MoE.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


@torch.compiler.disable  # the lengths are numbers in Python, which would be compiled anew each time they change
def looped_linear(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """What `grouped_linear` in moe.py computes: rows (R, in), weight (E, out, in) and ends (E,) -> (R, out)."""
    ends = ends.tolist()
    starts = [0, *ends[:-1]]
    return torch.cat([F.linear(rows[i:j], w) for w, i, j in zip(weight, starts, ends, strict=True)])
