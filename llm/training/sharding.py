"""Sharded training: every rank keeps a part of each weight, with the part's gradient and optimiser state.

    memory of a rank = 16 bytes * parameters / ranks + the weights of a block or two + activations

Just before a block computes, in the forward and again in the backward pass, the ranks gather its weights; afterwards
each drops what is not its own. After the block's backward pass each rank receives the mean over the ranks of its part
of the gradient. The embedding, the head and whatever else stands outside the blocks are gathered for the whole step.
Weights are fp32 and autocast rounds them, so a sharded step computes what an unsharded one does.

Where a weight is a part (a DTensor), its shape is still that of the whole. Whatever reads its values as a whole needs
all ranks: `whole`, `gathered`, and the forward pass, too.

ZeRO, arXiv 1910.02054, stage 3; PyTorch FSDP, arXiv 2304.11277. The classes of torch are imported where they are used:
that takes seconds.
"""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, distributed, nn

from llm.config import TrainConfig
from llm.models.transformer import Transformer
from llm.training.device import Machine
from llm.training.distributed import Ranks


def check_shard(config: TrainConfig) -> None:
    """Raises ValueError where `--shard` is given and torchrun did not start this process."""
    if config.shard and not distributed.is_initialized():
        raise ValueError(
            "shard = True, but there are no ranks to share the weights: start the script with torchrun, as in "
            "`torchrun --nproc-per-node 8 train_scripts/train_llama.py --shard`, or leave out --shard"
        )


def place(model: Transformer, config: TrainConfig, machine: Machine, ranks: Ranks) -> Transformer:
    """The model on its device: whole, or with `--shard` this rank's part of it. The blocks move one after the other, so
    the device never holds more than its part and one block."""
    if not config.shard:
        return model.to(machine.device)
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = machine.mesh(ranks.world_size)
    for part in model.children():
        for block in part if isinstance(part, nn.ModuleList) else ():  # the blocks, and modules for more predictions
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "loss")  # torch gathers for `forward` only
    # A tensor that a block hands on unchanged looks to torch like one that must not be written into: nothing here does
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    return model


@contextlib.contextmanager
def whole_outside_blocks(model: Transformer) -> Iterator[None]:
    """Within this, every method of a model can be called, by all ranks together, and not only `loss`: the weights
    outside the blocks are gathered, and blocks gather their own."""
    if not hasattr(model, "unshard"):
        yield
        return
    model.unshard()
    try:
        yield
    finally:
        model.reshard()


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor on every rank, from their parts; a tensor that is whole already as it is."""
    return tensor.full_tensor() if is_part(tensor) else tensor


def is_part(tensor: Tensor) -> bool:
    """Whether a tensor is shared out over the ranks."""
    return hasattr(tensor, "full_tensor")


def gathered(state: Any, ranks: Ranks) -> Any:
    """A nested state of dicts, lists and tuples in which the first rank has whole tensors on the CPU in place of parts,
    and the other ranks None. The parts are gathered one tensor at a time, so no device holds the whole state."""
    if isinstance(state, dict):
        return {name: gathered(value, ranks) for name, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(gathered(value, ranks) for value in state)
    if not (isinstance(state, Tensor) and is_part(state)):
        return state
    tensor = whole(state)
    return tensor.cpu() if ranks.is_first else None


def part_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a whole tensor, shared out as `like` is; without parts, the tensor itself. Each rank takes
    its part without asking the others."""
    if not is_part(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def optimizer_parts(saved: dict, optimizer: torch.optim.Optimizer) -> dict:
    """A whole optimiser state, shared out as the optimiser's parameters are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {
        index: {
            name: part_like(value, parameters[index]) if value.shape == parameters[index].shape else value
            for name, value in values.items()
        }
        for index, values in saved["state"].items()
    }
    return saved | {"state": state}
