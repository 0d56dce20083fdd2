"""From logits to tokens: sampling, and several prompts continued in one batch.

Each new token is drawn from the model's distribution, changed by temperature, top-k (Hierarchical Neural Story
Generation, arXiv 1805.04833) and top-p (The Curious Case of Neural Text Degeneration, arXiv 1904.09751).
"""

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from llm.models.transformer import Transformer

LOWEST_TEMPERATURE = 1e-4  # far below it, logits divided by it are no finite numbers


@dataclass(frozen=True)
class Sampler:
    """Logits (B, V) -> one token for each row (B,), or (B, n, V) -> (B, n).

    temperature divides the logits, and 0 takes the likeliest token; top_k keeps the k likeliest tokens, k of them even
    where others are as likely as the last; top_p keeps the fewest tokens whose probabilities add up to p. Each row has
    a generator of its own, so what it draws does not depend on the other rows. Raises ValueError for settings that
    leave nothing to draw from.
    """

    generators: tuple[torch.Generator, ...]
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self):
        if self.temperature != 0 and not LOWEST_TEMPERATURE <= self.temperature < math.inf:
            raise ValueError(
                f"temperature = {self.temperature} must be 0, which takes the likeliest token each time, or a number "
                f"from {LOWEST_TEMPERATURE} on (--temperature)"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k = {self.top_k} must be at least 1 (--top-k)")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p} must lie in (0, 1] (--top-p)")

    def __call__(self, logits: Tensor) -> Tensor:
        if self.temperature == 0:
            return logits.argmax(-1)
        logits = logits.float() / self.temperature
        if self.top_k is not None:
            kept, tokens = logits.topk(min(self.top_k, logits.shape[-1]))
            logits = torch.full_like(logits, -torch.inf).scatter(-1, tokens, kept)
        if self.top_p is not None:
            ordered, order = logits.softmax(-1).sort(descending=True)
            surplus = ordered.cumsum(-1) - ordered >= self.top_p  # never the likeliest token
            logits = logits.masked_fill(surplus.gather(-1, order.argsort(-1)), -torch.inf)
        rows = zip(logits.softmax(-1), self.generators, strict=True)
        return torch.stack([row.multinomial(1, generator=generator)[..., 0] for row, generator in rows])


def greedy(logits: Tensor) -> Tensor:
    """The likeliest token of each row: (B, V) -> (B,). In fp32: a CPU takes five times as long to compare bf16."""
    return logits.float().argmax(-1)


def generate_tokens(
    model: Transformer,
    prompts: list[list[int]],
    max_new_tokens: int,
    sampler: Callable[[Tensor], Tensor],
    stop: int | Collection[int],
) -> Iterator[list[int | None]]:
    """Continue prompts of different lengths in one batch; yields the next token of each, None after its end.

    A text ends with a token of `stop`, which is yielded. Raises ValueError for a prompt longer than the context, or one
    that holds a token that the model does not have.
    """
    stop = {stop} if isinstance(stop, int) else set(stop)
    longest, limit = max(map(len, prompts)), model.config.max_seq_len
    if longest > limit:
        raise ValueError(f"a prompt has {longest} tokens, and this model reads max_seq_len = {limit}: shorten it")
    if (largest := max(map(max, prompts))) >= model.config.vocab_size:
        raise ValueError(
            f"a prompt holds token {largest}, and the embedding of this model ends at {model.config.vocab_size - 1}: "
            "the tokenizer belongs to another model, so take the one that was published or trained with this model"
        )
    device = model.tok_embed.weight.device
    batch = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
    padding = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)
    ended = [False] * len(prompts)
    for step in model.generate(batch, max_new_tokens, sampler, padding):
        for column in step.reshape(len(prompts), -1).T.tolist():  # one, or several where a model writes blocks
            tokens = [None if end else token for token, end in zip(column, ended, strict=True)]
            yield tokens
            ended = [end or token in stop for token, end in zip(tokens, ended, strict=True)]
            if all(ended):
                return
