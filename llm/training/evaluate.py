"""How well a model predicts the eval split, always on the same windows.

    perplexity = exp(nats per token)        bits per byte = total nats / ln 2 / UTF-8 bytes of the targets

Bits per byte do not depend on the tokenizer, so they compare models with different vocabularies.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llm.data.files import Data, token_bytes
from llm.data.windows import eval_windows
from llm.models.transformer import Transformer
from llm.training.device import Machine
from llm.training.distributed import Ranks


@dataclass(frozen=True)
class EvalSet:
    """`windows` (N, T + 1) int64 of the eval split; `n_bytes`: the bytes of text that their targets stand for."""

    windows: Tensor
    n_bytes: int

    @classmethod
    def of(cls, data: Data, seq_len: int, n_windows: int) -> "EvalSet":
        """`n_windows` windows of `seq_len` targets, evenly spread over the eval split."""
        windows = eval_windows(data.eval, seq_len, n_windows)
        return cls(windows, int(token_bytes(data.tokenizer_path)[windows[:, 1:]].sum()))


@torch.no_grad()
def evaluate(
    model: Transformer, eval_set: EvalSet, micro_batch_size: int, machine: Machine, ranks: Ranks, seed: int = 0
) -> dict[str, float]:
    """eval_loss (nats per token), eval_perplexity and eval_bits_per_byte. Each rank computes its share of the windows.

    torch is seeded before every batch, so a loss that draws random numbers draws the same ones in each evaluation.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(2, device=machine.device)  # nats, windows
    for first in range(ranks.rank * micro_batch_size, len(eval_set.windows), ranks.world_size * micro_batch_size):
        batch = eval_set.windows[first : first + micro_batch_size].to(machine.device)
        torch.manual_seed(draw_seed(seed, first))
        with machine.autocast():
            ce = model.loss(batch)[1]["ce"]
        sums += torch.stack([ce * len(batch), ce.new_tensor(len(batch))])
    model.train(was_training)
    nats, n_windows = ranks.average(sums).tolist()
    loss = nats / n_windows
    n_tokens = eval_set.windows[:, 1:].numel()
    bits_per_byte = loss * n_tokens / math.log(2) / eval_set.n_bytes
    return {"eval_loss": loss, "eval_perplexity": math.exp(min(loss, 700)), "eval_bits_per_byte": bits_per_byte}


def draw_seed(*place: int) -> int:
    """A seed that follows from where it is used, so that a resumed run needs no saved random state."""
    return int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0] >> 1)
