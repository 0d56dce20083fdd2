"""The gradient of one optimiser step: the mean over its windows, computed in micro-batches on all ranks."""

import contextlib
import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from llm.config import TrainConfig
from llm.generate.compile import try_compiled
from llm.models.transformer import Transformer
from llm.training.device import Machine, compile_loss
from llm.training.distributed import Ranks
from llm.training.evaluate import draw_seed


def share_out(config: TrainConfig, max_seq_len: int, world_size: int) -> tuple[int, int]:
    """(windows in a step, windows in a micro-batch). A step has the same windows on any number of ranks.

    Raises ValueError where the sizes do not divide each other.
    """
    windows, rest = divmod(config.tokens_per_step, max_seq_len)
    if rest:
        raise ValueError(
            f"tokens_per_step = {config.tokens_per_step} is no multiple of max_seq_len = {max_seq_len}: "
            f"choose {max(windows, 1) * max_seq_len} (--tokens-per-step) or another --model.max-seq-len"
        )
    if windows % world_size:
        raise ValueError(
            f"a step of {windows} windows cannot be shared by {world_size} ranks: choose "
            f"{math.ceil(windows / world_size) * world_size * max_seq_len} tokens (--tokens-per-step)"
        )
    micro_batch_size = min(config.micro_batch_size, windows // world_size)
    if windows % (world_size * micro_batch_size):
        raise ValueError(
            f"micro_batch_size = {config.micro_batch_size} does not divide the {windows // world_size} windows of "
            f"a rank in a step: choose a divisor of it (--micro-batch-size)"
        )
    return windows, micro_batch_size


class Objective(nn.Module):
    """`model.loss` as a module, since DDP averages the gradients of what its module's `forward` computed.

    The first call compiles it if asked to. Where that fails and is not insisted on, one line says why, and the loss
    stays uncompiled.
    """

    def __init__(self, model: Transformer, compiles: bool, insist: bool):
        super().__init__()
        self.model, self.loss = model, model.loss
        self.to_compile, self.insist = compiles, insist

    def forward(self, *inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        if not self.to_compile:
            return self.loss(*inputs)
        self.to_compile = False
        return try_compiled(lambda: self.compiled(*inputs), lambda: self.loss(*inputs), self.insist)

    def compiled(self, *inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Compile the loss for this and all later calls."""
        self.loss, result = compile_loss(self.model.loss, *inputs)
        return result


def recompute(model: Transformer) -> None:
    """Make every block keep its input only; the backward pass computes its activations again. So memory holds the
    activations of one block instead of all. Training Deep Nets with Sublinear Memory Cost, arXiv 1604.06174."""

    def forward(block: nn.Module, *inputs):
        if torch.is_grad_enabled():
            return checkpoint(type(block).forward, block, *inputs, use_reentrant=False, preserve_rng_state=False)
        return type(block).forward(block, *inputs)

    for block in model.blocks:
        block.forward = partial(forward, block)


def make_objective(model: Transformer, config: TrainConfig, machine: Machine, ranks: Ranks) -> nn.Module:
    """The objective of this rank; where there are several, its gradients are averaged over them. A sharded model does
    that itself, with every micro-batch: whole gradients, to be averaged once, would not fit."""
    if config.recompute:
        recompute(model)
    objective = Objective(model, machine.compile, config.compile == "on")
    return DistributedDataParallel(objective) if ranks.world_size > 1 and not config.shard else objective


def with_noise(
    model: Transformer, micro_batches: list[tuple[int, Tensor]], n_windows: int, place: tuple[int, int]
) -> list[tuple[int, tuple[Tensor, ...]]]:
    """(index in the global batch, windows) -> (index, inputs of the loss), where `place` is (seed, step).

    What is random is drawn for all `n_windows` windows of the step on every rank, and each micro-batch takes its part.
    So it depends neither on the size of the micro-batches nor on the number of ranks.
    """
    length = micro_batches[0][1].shape[1] - 1
    drawn = model.noise(n_windows, length, torch.Generator().manual_seed(draw_seed(*place)))
    return [
        (index, (tokens, *(noise[index * len(tokens) :][: len(tokens)].to(tokens.device) for noise in drawn)))
        for index, tokens in micro_batches
    ]


def compute_gradient(
    objective: nn.Module,
    micro_batches: list[tuple[int, tuple[Tensor, ...]]],
    place: tuple[int, int],
    machine: Machine,
) -> dict[str, Tensor]:
    """Add the gradient of the mean loss to the parameters; returns the mean of each part of the loss on this rank.

    `micro_batches` are (index in the global batch, inputs of the objective). With `place`, which is (seed, step), the
    index seeds torch for a module that draws random numbers itself. Ranks exchange gradients once, with the last
    micro-batch; those of a sharded model with each.
    """
    share = 1 / len(micro_batches)
    means = {}
    for number, (index, inputs) in enumerate(micro_batches, 1):
        torch.manual_seed(draw_seed(*place, index))
        more_to_come = number < len(micro_batches) and isinstance(objective, DistributedDataParallel)
        with objective.no_sync() if more_to_come else contextlib.nullcontext():
            with machine.autocast():
                loss, parts = objective(*inputs)
            (loss * share).backward()
        means = {name: means.get(name, 0) + part * share for name, part in parts.items()}
    return means
