"""Mixers side by side: each reads the same input, and their outputs are added.

    mix(x) = a(x) + b(x)

Falcon-H1: A Family of Hybrid-Head Language Models, arXiv 2507.22448. Blog: State-space models, hybrids.
"""

from torch import Tensor, nn


class ParallelMixers(nn.ModuleDict):
    """(B, T, d_model) -> (B, T, d_model). Mixers by name. Their caches share one dict, so the names in
    these must differ; `make_cache` raises ValueError where they do not."""

    def __init__(self, **mixers: nn.Module):
        super().__init__(mixers)

    def forward(self, x: Tensor, positions: Tensor, cache: dict | None = None) -> Tensor:
        return sum(mixer(x, positions, cache) for mixer in self.values())

    def make_cache(self, batch_size: int, length: int) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for mixer in self.values():
            new = mixer.make_cache(batch_size, length)
            if shared := tensors.keys() & new.keys():
                raise ValueError(
                    f"two parallel mixers would share a cache: both call a tensor {', '.join(sorted(shared))}"
                )
            tensors |= new
        return tensors
