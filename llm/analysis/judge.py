"""An autoregressive model reads what other models wrote: how surprising each token is to it, and how many differ."""

from itertools import pairwise

import torch
from torch import Tensor

from llm.data.files import Data
from llm.models.transformer import Transformer


def stories(data: Data, n: int, length: int) -> Tensor:
    """The first `length` tokens of n stories of the eval split, `<|endoftext|>` before each: (n, length)."""
    tokens = torch.from_numpy(data.eval.astype("int64"))
    ends = (tokens == data.eot).nonzero()[:, 0].tolist()
    begins = [begin for begin, end in pairwise(ends) if end - begin >= length]
    if len(begins) < n:
        raise ValueError(f"only {len(begins)} eval stories have {length} tokens: lower --texts or the context")
    return torch.stack([tokens[begin : begin + length] for begin in begins[:n]])


@torch.no_grad()
def surprise(judge: Transformer, texts: Tensor) -> Tensor:
    """(B, T) -> nats of each token but the first, given those before it, (B, T - 1).

    Raises ValueError for a judge that does not write from left to right.
    """
    if judge.causal:
        logits = judge(texts[:, :-1])
    elif judge.group_size(texts.shape[1]) == 1:
        logits = judge.choices(judge.denoise(torch.full_like(texts, judge.mask_token), texts))[:, 1:]
    else:
        raise ValueError("the judge must be autoregressive: name a run of autoregressive_twin or baseline (--judge)")
    return -logits.log_softmax(-1).gather(-1, texts[:, 1:, None])[..., 0]


def read(judge: Transformer, texts: Tensor, n_prompt: int, eot: int) -> dict[str, float]:
    """What the judge says of the written part of each text, up to its end: the mean over texts, and how sure it is."""
    written = texts[:, n_prompt:]
    kept = ((written == eot).cumsum(1) - (written == eot).int()) == 0
    nats = (surprise(judge, texts)[:, n_prompt - 1 :] * kept).sum(1) / kept.sum(1)
    different = [len(row[k].unique()) / k.sum().item() for row, k in zip(written, kept, strict=True)]
    error = (nats.std() / len(nats) ** 0.5).item()
    return {"nats": nats.mean().item(), "nats_error": error, "different": sum(different) / len(different)}
