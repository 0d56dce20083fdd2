"""Weights for a module of the meta device, where a picture depends on them: those that training starts from."""

import contextlib
import copy
from collections.abc import Iterator

import torch
from torch import nn

from llm.modules.initialization import initialize


def as_drawn(module: nn.Module, projections: bool = True) -> nn.Module:
    """A copy of a module of the meta device with the weights that training starts from, in float64. Without
    `projections`, only what draws itself by `init_weights`; all else is 0."""
    module = copy.deepcopy(module).double().to_empty(device="cpu")
    for tensor in [*module.parameters(), *module.buffers()]:
        tensor.zero_()
    with repeatable():
        if projections:
            initialize(module, "normal", n_layers=1)
            return module
        for part in module.modules():
            if hasattr(part, "init_weights"):
                part.init_weights("normal", 1)
    return module


@contextlib.contextmanager
def repeatable() -> Iterator[None]:
    """The same random numbers each time; those of the program around it stay as they are."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
