"""Several processes, one a device, that act as one: each computes a share of the batch, and they average gradients.

`torchrun` starts the processes and tells each its rank through the environment; without it there is one rank.
"""

import os
from dataclasses import dataclass

import torch
from torch import Tensor, distributed


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this is; `local_rank` counts on this machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @classmethod
    def current(cls) -> "Ranks":
        """What torchrun put into the environment of this process."""
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

    def wait(self) -> None:
        """Return when every rank has come here."""
        if self.world_size > 1:
            distributed.barrier()


def join_ranks() -> Ranks:
    """Join the other processes that torchrun started: NCCL where every local process has a GPU, else gloo."""
    ranks = Ranks.current()
    if ranks.world_size > 1 and not distributed.is_initialized():
        enough_gpus = torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if enough_gpus:
            torch.cuda.set_device(ranks.local_rank)  # NCCL's first barrier comes before the model
        distributed.init_process_group("cuda:nccl,cpu:gloo" if enough_gpus else "gloo")
    return ranks


def leave_ranks() -> None:
    """End the group that `join_ranks` made, where there is one."""
    if distributed.is_initialized():
        distributed.destroy_process_group()
