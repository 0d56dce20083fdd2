"""Several processes that train one model: each computes a share of the batch, and they average their gradients.

`torchrun` starts the processes and gives each its rank through the environment. Without it there is one rank.
"""

import os
from dataclasses import dataclass

from torch import Tensor, distributed

from llm.training.device import claim_gpu


@dataclass(frozen=True)
class Ranks:
    """The number of this process, of all processes, and of this process among those on its machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @classmethod
    def current(cls) -> "Ranks":
        """The ranks that torchrun put into the environment of this process."""
        return cls(*(int(os.environ.get(n, d)) for n, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))))

    @property
    def is_first(self) -> bool:
        """Only the first rank prints and writes."""
        return self.rank == 0

    def average(self, values: Tensor) -> Tensor:
        """The mean over all ranks, in place and on every rank."""
        if self.world_size > 1:
            distributed.all_reduce(values)
            values /= self.world_size
        return values

    def as_first(self, values: Tensor) -> Tensor:
        """The first rank's values, in place and on every rank."""
        if self.world_size > 1:
            distributed.broadcast(values, 0)
        return values

    def wait(self) -> None:
        """Return when every rank has called this."""
        if self.world_size > 1:
            distributed.barrier()


def join_ranks() -> Ranks:
    """Join the other processes that torchrun started: NCCL where every local process has a GPU, else gloo."""
    ranks = Ranks.current()
    if "RANK" in os.environ and not distributed.is_initialized():
        enough_gpus = claim_gpu(ranks.local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))  # NCCL asks which
        distributed.init_process_group("cuda:nccl,cpu:gloo" if enough_gpus else "gloo")
    return ranks


def leave_ranks() -> None:
    """End the group that `join_ranks` made, where there is one."""
    if distributed.is_initialized():
        distributed.destroy_process_group()
