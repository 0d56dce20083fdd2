"""How well a model predicts the eval split, always on the same windows.

    perplexity = exp(nats per token)        bits per byte = total nats / ln 2 / UTF-8 bytes of the targets

Bits per byte do not depend on the tokenizer, so they compare models with different vocabularies.

A model that is not causal has no such number, only a bound on it, which is a mean over random draws. The whole split is
evaluated again with other draws until the standard error of the mean is below MAX_ERROR.
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


MAX_ERROR, MOST_DRAWS = 0.01, 1000  # nats per token; times that the split is evaluated


@torch.no_grad()
def evaluate(
    model: Transformer, eval_set: EvalSet, micro_batch_size: int, machine: Machine, ranks: Ranks, seed: int = 0
) -> dict[str, float]:
    """eval_loss (nats per token), eval_perplexity and eval_bits_per_byte. Each rank computes its share of the windows.

    torch is seeded before every batch, so a loss that draws random numbers draws the same ones in each evaluation. A
    bound also has eval_draws and the standard errors eval_loss_error and eval_bits_per_byte_error; another micro-batch
    size draws other numbers, so the bound differs by as much.
    """
    was_training = model.training
    model.eval()
    n_windows = len(eval_set.windows)
    draws = [batch_nats(model, eval_set, micro_batch_size, machine, ranks, seed, 0)]
    fewest = 1 if model.causal else 2 + 8 // math.ceil(n_windows / micro_batch_size)
    error = 0.0
    while len(draws) < fewest or (error > MAX_ERROR and len(draws) < MOST_DRAWS):
        draws.append(batch_nats(model, eval_set, micro_batch_size, machine, ranks, seed, len(draws)))
        variance = torch.stack(draws).var(0).sum() / len(draws)
        error = math.sqrt(ranks.average(variance).item() * ranks.world_size) / n_windows
    model.train(was_training)
    loss = ranks.average(torch.stack(draws).mean(0).sum()).item() * ranks.world_size / n_windows
    to_bits = eval_set.windows[:, 1:].numel() / math.log(2) / eval_set.n_bytes
    result = {"eval_loss": loss, "eval_perplexity": math.exp(min(loss, 700)), "eval_bits_per_byte": loss * to_bits}
    if model.causal:
        return result
    errors = {"eval_loss_error": error, "eval_bits_per_byte_error": error * to_bits}
    return result | errors | {"eval_draws": len(draws)}


def batch_nats(
    model: Transformer, eval_set: EvalSet, size: int, machine: Machine, ranks: Ranks, seed: int, draw: int
) -> Tensor:
    """The loss of each batch of this rank times its windows, with the random numbers of this draw.

    Every rank computes as many batches, since ranks that share out the weights compute together. One that has no batch
    left computes the first one, and counts it zero times.
    """
    nats = []
    for turn in range(0, len(eval_set.windows), ranks.world_size * size):
        first = turn + ranks.rank * size
        left = first < len(eval_set.windows)
        batch = eval_set.windows[first if left else 0 :][:size].to(machine.device)
        torch.manual_seed(draw_seed(seed, first, draw))
        with machine.autocast():
            nats.append(model.loss(batch)[1]["ce"] * (len(batch) if left else 0))
    return torch.stack(nats)


def is_bound(result: dict[str, float]) -> bool:
    """Whether an evaluation, or its line in metrics.jsonl, is a bound on the loss and not the loss itself."""
    return "eval_loss_error" in result


def in_words(result: dict[str, float]) -> str:
    """The loss and the bits per byte of an evaluation; a bound is called one, with its standard error."""
    loss, bits = result["eval_loss"], result["eval_bits_per_byte"]
    if not is_bound(result):
        return f"eval loss {loss:.4f}, {bits:.4f} bits per byte"
    errors = result["eval_loss_error"], result["eval_bits_per_byte_error"]
    return f"eval loss at most {loss:.4f} ± {errors[0]:.4f}, {bits:.4f} ± {errors[1]:.4f} bits per byte (a bound)"


def draw_seed(*place: int) -> int:
    """A seed that follows from where it is used, so that a resumed run needs no saved random state."""
    return int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0] >> 1)
