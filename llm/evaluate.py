"""How well a model predicts a text.

    python -m llm.evaluate runs/baseline --text file.txt
    python -m llm.evaluate path/to/checkpoint --text file.txt --per stories       # a hub folder or a GGUF file, too

    perplexity = exp(nats per token)        bits per byte = total nats / ln 2 / UTF-8 bytes of the predicted text

A text is cut into stories at <|endoftext|>, and the tokenizer begins each as it begins a document. Windows run over all
stories one after the other, without overlap, and a last incomplete one is left out. Stories alone are cut where they
are longer than the context. The first token of a window or story is not predicted. Special tokens count no bytes.

A diffusion model has no such number, only a bound on it, which is a mean over random draws: the text is evaluated again
with other draws until the standard error of the mean is small, as in training (llm/training/evaluate.py). A model that
writes whole blocks predicts whole blocks: the rest of a text shorter than the context is left out.
"""

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal

import torch
import tyro
from tokenizers import Tokenizer
from torch.nn import functional as F
from tqdm import tqdm

from llm.console import console
from llm.data.stories import END_OF_TEXT, wide_encoding
from llm.generate.load import load_run
from llm.generate.text import end_of_text
from llm.models.denoiser import Denoiser
from llm.models.transformer import Transformer
from llm.training.checkpoint import CheckpointError
from llm.training.device import find_device
from llm.training.evaluate import MAX_ERROR, MOST_DRAWS, draw_seed

ROWS = 1024  # tokens whose logits are in memory at once


@dataclass(frozen=True)
class Arguments:
    """Print nats a token, perplexity and bits a byte of a text."""

    path: tyro.conf.Positional[Path]
    """Run directory, checkpoint, folder of a published model as the hub has it, or GGUF file."""
    text: Path
    """UTF-8 file; <|endoftext|> separates stories."""
    per: Literal["windows", "stories"] = "windows"
    """windows: as long as the context, over all stories in a row; stories: each alone."""
    max_seq_len: int | None = None
    """Longest text that the model reads at once; where it is not given, as the model was made or published."""
    batch_size: int = 8
    """Windows that are computed at once."""
    device: str = "auto"
    """auto, cuda, mps or cpu."""

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"batch_size = {self.batch_size} must be at least 1 (--batch-size)")


@dataclass(frozen=True)
class Result:
    """What was predicted: tokens, the bytes of their text, and the nats that they cost in all. Where there is an
    `error`, the nats are a bound, and that is its standard error."""

    n_tokens: int
    n_bytes: int
    nats: float
    error: float | None = None

    def __str__(self) -> str:
        loss = self.nats / self.n_tokens
        perplexity = f"{math.exp(min(loss, 700)):.4f}"
        bits, bits_error = (
            f"{nats / math.log(2) / self.n_bytes:.4f}" if self.n_bytes else "undefined"
            for nats in (self.nats, self.error or 0.0)
        )
        size = f"{self.n_tokens:,} tokens, {self.n_bytes:,} bytes"
        if self.error is None:
            return f"{size}: {loss:.6f} nats per token, perplexity {perplexity}, {bits} bits per byte"
        return (
            f"{size}: at most {loss:.6f} ± {self.error / self.n_tokens:.6f} nats per token, perplexity at most "
            f"{perplexity}, at most {bits} ± {bits_error} bits per byte (a bound and its standard error)"
        )


def read_stories(file: Path) -> list[str]:
    """The stories of a text file. Raises ValueError for a file that cannot be read, or that holds no text."""
    try:
        raw = file.read_bytes()
        if name := wide_encoding(raw):
            raise ValueError(f"{file} is {name}: convert it (iconv -f {name} -t UTF-8 {file} > new.txt) (--text)")
        text = raw.decode("utf-8-sig")  # without a byte-order mark
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read as UTF-8 text: {error} (--text)") from None
    stories = [story.strip() for story in text.split(END_OF_TEXT) if story.strip()]
    if not stories:
        raise ValueError(f"{file} holds no text (--text)")
    return stories


def encode(tokenizer: Tokenizer, stories: list[str], per: str) -> tuple[list[list[int]], list[int]]:
    """The tokens of each story, and the bytes of its text without the special tokens that are written in it. With a
    tokenizer of ours, <|endoftext|> follows, and comes before a story alone."""
    encodings = tokenizer.encode_batch(stories)
    special = {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    sizes = []
    for story, encoding in zip(stories, encodings, strict=True):
        places = zip(encoding.ids, encoding.offsets, strict=True)  # a token before or after the text has an empty one
        left_out = (story[start:end] for token, (start, end) in places if token in special)
        sizes.append(len(story.encode()) - sum(len(written.encode()) for written in left_out))
    if tokenizer.post_processor is not None:
        return [encoding.ids for encoding in encodings], sizes
    end = end_of_text(tokenizer)
    return [(end if per == "stories" else []) + encoding.ids + end for encoding in encodings], sizes


def check_tokens(documents: list[list[int]], vocab_size: int) -> None:
    """Raises ValueError for a token that the model does not have."""
    largest = max((token for story in documents for token in story), default=0)
    if largest >= vocab_size:
        raise ValueError(
            f"the text holds token {largest}, and the embedding of this model ends at {vocab_size - 1}: the tokenizer "
            "belongs to another model, so take the one that was published or trained with this model"
        )


def cut(documents: list[list[int]], length: int, per: str) -> Iterator[list[int]]:
    """Windows of at most `length` targets and the token before them; two have only that token in common."""
    if per == "stories":
        starts = ((story, start) for story in documents for start in range(0, len(story) - 1, length))
        yield from (story[start : start + length + 1] for story, start in starts)
        return
    tokens = [token for story in documents for token in story]
    n_windows = (len(tokens) - 1) // length
    if n_windows == 0 and len(tokens) > 1:
        yield tokens
    yield from (tokens[i * length : (i + 1) * length + 1] for i in range(n_windows))


def count_bytes(tokenizer: Tokenizer, documents: list[list[int]], sizes: list[int], n_tokens: int) -> int:
    """The bytes of text that the first `n_tokens` tokens of all documents stand for."""
    total = 0
    for ids, n_bytes in zip(documents, sizes, strict=True):
        if n_tokens <= 0:
            break
        total += n_bytes if len(ids) <= n_tokens else len(decoded(tokenizer, ids[:n_tokens]).encode())
        n_tokens -= len(ids)
    return total


def decoded(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The text of tokens without special ones and without a character that is not complete yet."""
    return tokenizer.decode(ids).rstrip("\N{REPLACEMENT CHARACTER}")


def whole_blocks(model: Denoiser, windows: list[list[int]], per: str) -> list[list[int]]:
    """The windows, a single short one without the block that it does not fill. Raises ValueError where nothing is left,
    and for stories that are no whole number of blocks."""
    rests = [(len(window) - 1) % model.group_size(len(window) - 1) for window in windows]
    if not any(rests):
        return windows
    size = model.group_size(len(windows[0]) - 1)
    if per == "stories":
        raise ValueError(
            f"{sum(map(bool, rests))} of {len(windows)} stories, or their last parts, are no whole number of blocks of "
            f"{size} tokens, which this model predicts together: take --per windows"
        )
    ((window,), (rest,)) = windows, rests
    if len(window) - 1 < size:
        raise ValueError(
            f"the text has {len(window) - 1} tokens to predict, and this model predicts blocks of {size} together: "
            "give a longer text (--text)"
        )
    return [window[: len(window) - rest]]


@torch.inference_mode()
def evaluate_text(
    model: Transformer, tokenizer: Tokenizer, stories: list[str], per: str = "windows", batch_size: int = 8
) -> Result:
    """Nats of a text under a model, or a bound on them where it is not causal, with a progress bar on the standard
    error. Raises ValueError for a text that cannot be evaluated."""
    documents, sizes = encode(tokenizer, stories, per)
    check_tokens(documents, model.config.vocab_size)
    windows = sorted(cut(documents, model.config.max_seq_len, per), key=len, reverse=True)
    if not windows:
        raise ValueError("the text has fewer than two tokens: nothing is predicted (--text)")
    if not model.causal:
        windows = whole_blocks(model, windows, per)
    nats, error = (exact_nats if model.causal else bound)(model, windows, batch_size)
    n_tokens = sum(len(window) - 1 for window in windows)
    if per == "stories":
        firsts = sum(len(decoded(tokenizer, ids[:1]).encode()) for ids in documents if len(ids) > 1)
        text = sum(n_bytes for n_bytes, ids in zip(sizes, documents, strict=True) if len(ids) > 1)
        return Result(n_tokens, text - firsts, nats, error)
    first = len(decoded(tokenizer, documents[0][:1]).encode())
    return Result(n_tokens, count_bytes(tokenizer, documents, sizes, n_tokens + 1) - first, nats, error)


def exact_nats(model: Transformer, windows: list[list[int]], batch_size: int) -> tuple[float, None]:
    """The nats of all targets of windows, the longest first; they have no standard error. Logits are computed for a few
    rows at once: those of a long context and a large vocabulary would fill many gigabytes."""
    nats, device = 0.0, model.tok_embed.weight.device
    for start in tqdm(range(0, len(windows), batch_size), desc="evaluating", file=sys.stderr):
        batch = windows[start : start + batch_size]
        longest = max(map(len, batch))
        tokens = torch.tensor([window + [0] * (longest - len(window)) for window in batch], device=device)
        n_targets = torch.tensor([len(window) - 1 for window in batch], device=device)
        predicted = torch.arange(longest - 1, device=device) < n_targets[:, None]  # (B, T), False for padding
        x, targets = model.hidden(tokens[:, :-1])[predicted], tokens[:, 1:][predicted]  # (N, D), (N,)
        for some_x, some_targets in zip(x.split(ROWS), targets.split(ROWS), strict=True):
            losses = F.cross_entropy(model.unembed(some_x).float(), some_targets, reduction="none")
            nats += losses.cpu().double().sum().item()
    return nats, None


def bound(model: Denoiser, windows: list[list[int]], batch_size: int) -> tuple[float, float]:
    """A bound on the nats of all targets of windows that are sorted by their lengths, and its standard error.

    A batch holds windows of one length, since a token sees the later ones, and would see padding, too. Draws are added
    until the error is at most MAX_ERROR for each token, or there are MOST_DRAWS.
    """
    alike = [list(group) for _, group in groupby(windows, key=len)]
    batches = [group[i : i + batch_size] for group in alike for i in range(0, len(group), batch_size)]
    limit = MAX_ERROR * sum(len(window) - 1 for window in windows)
    fewest = 2 + 8 // len(batches)
    draws, error = [], math.inf
    with tqdm(desc="evaluating", total=fewest * len(batches), file=sys.stderr) as bar:
        while len(draws) < fewest or (error > limit and len(draws) < MOST_DRAWS):
            bar.total = max(fewest, len(draws) + 1) * len(batches)
            nats = []
            for number, batch in enumerate(batches):
                tokens = torch.tensor(batch, device=model.tok_embed.weight.device)
                torch.manual_seed(draw_seed(0, number, len(draws)))
                nats.append(model.loss(tokens)[1]["ce"].item() * tokens[:, 1:].numel())
                bar.update()
            draws.append(nats)
            if len(draws) > 1:
                error = (torch.tensor(draws, dtype=torch.float64).var(0).sum() / len(draws)).sqrt().item()
    return torch.tensor(draws, dtype=torch.float64).mean(0).sum().item(), error


@console()
def main(arguments: list[str] | None = None) -> None:
    """The command."""
    flags = tyro.cli(Arguments, args=arguments, prog="python -m llm.evaluate")
    stories = read_stories(flags.text)
    model, tokenizer = load_run(flags.path, find_device(flags.device), flags.max_seq_len)
    print(evaluate_text(model, tokenizer, stories, flags.per, flags.batch_size))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, CheckpointError) as error:
        sys.exit(f"error: {error}")
