"""Seconds, MB/s and memory from a text file to token arrays: `python benchmarks/tokenization.py`.

Both contestants run `pre_tokenize`, each in a process of its own, in turn. "tokenizers" learns the vocabulary with
the trainer of that package, fed story by story, and encodes with its fastest call, `encode_batch_fast`; "ours" is what
pre_tokenize.py does. The encoder alone is measured on blocks of stories that are in memory.

The corpus is made up: the sample stories over and over, each with three new words, so that the number of distinct words
grows with it; or a file's text, repeated up to the size.
"""

import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import torch
import tyro
from measure import Contestant, answer, in_turn, machine_line, markdown, median, peak_memory, ratio
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from llm.console import console
from llm.data import encoding, tokenize
from llm.data.files import TOKENIZER_FILE, as_plain_text, load_tokenizer
from llm.data.sample import sample_stories
from llm.data.stories import END_OF_TEXT, Tally, read_stories

BLOCKS = 10  # of 4 MB, for the encoder alone


@dataclass(frozen=True)
class Arguments:
    """Tokenise a text with `tokenizers` and with ours, in turn."""

    megabytes: int = 50
    """Size of the train text; the eval text has 1 MB."""
    text: Path | None = None
    """A text with <|endoftext|> between its stories, repeated up to the size; otherwise the corpus is made up."""
    contestants: tuple[str, ...] = ("tokenizers", "ours")
    """Which of the two. `tokenizers` takes about a minute for 100 MB."""
    vocab_size: int = 10_000
    """Size of the vocabulary to learn."""
    turns: int = 3
    """How often each is measured, after a turn that warms up."""


def write_corpus(path: Path, n_bytes: int, text: Path | None, seed: int) -> None:
    """Write the text again and again, or sample stories, each followed by a sentence of three made-up words."""
    rng, stories, written = random.Random(seed), sample_stories()["train"], 0
    again = text.read_bytes() if text else b""
    with open(path, "wb") as file:
        while written < n_bytes:
            words = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=24))
            extra = f"They said {words[:8]}, {words[8:16]} and {words[16:]}."
            written += file.write(again or f"{rng.choice(stories)} {extra}\n{END_OF_TEXT}\n".encode())


def learn_by_tokenizers(source: Path, vocab_size: int) -> Tokenizer:
    """What a user of `tokenizers` would write."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    with tokenize.progress(source, "learning the vocabulary") as bar:
        blocks = read_stories(source, Tally(), bar)
        tokenizer.train_from_iterator((text.decode() for texts, _ in blocks for text in texts), trainer)
    return as_plain_text(tokenizer)


def timed(function: Callable, seconds: dict[str, float], name: str) -> Callable:
    """The same function, which notes how long it takes in all."""

    def call(*arguments):
        start = time.perf_counter()
        result = function(*arguments)
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
        return result

    return call


STEPS = {
    "tokenizers": (learn_by_tokenizers, lambda t: partial(encoding.encode, t), tokenize.write_tokens),
    "ours": (tokenize.learn_tokenizer, tokenize.text_encoder, tokenize.write_tokens),
}


def compete(name: str, folder: Path, vocab_size: int, at_start: int) -> dict:
    """The child: run `pre_tokenize` once, with the steps of one contestant."""
    learn, encoder, write = STEPS[name]
    train, evaluation, seconds = folder / "train.txt", folder / "eval.txt", {}
    tokenize.learn_tokenizer = timed(learn, seconds, "learning")
    tokenize.write_tokens = timed(write, seconds, "encoding")
    tokenize.text_encoder = encoder
    with tempfile.TemporaryDirectory(dir=folder) as out:
        start = time.perf_counter()
        side = tokenize.pre_tokenize(train, evaluation, Path(out), vocab_size)
        seconds["all"] = time.perf_counter() - start
        peak = peak_memory(torch.device("cpu")) - at_start
        encode = encoder(load_tokenizer(Path(out) / TOKENIZER_FILE))
    with tokenize.progress(train, "") as bar:
        blocks = [texts for texts, _ in islice(read_stories(train, Tally(), bar), BLOCKS)]
    encode(blocks[0])
    start = time.perf_counter()
    for texts in blocks:
        encode(texts)
    alone = sum(len(text) for texts in blocks for text in texts) / (time.perf_counter() - start)
    hashes = [file["sha256"] for file in side["files"]]
    return seconds | {"alone": alone, "peak": peak, "hashes": hashes}


@console()
def main(arguments: list[str] | None = None) -> None:
    """The command."""
    flags = tyro.cli(Arguments, args=arguments)
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(Path(folder, "train.txt"), flags.megabytes * 10**6, flags.text, seed=0)
        write_corpus(Path(folder, "eval.txt"), 10**6, None, seed=1)
        size = Path(folder, "train.txt").stat().st_size / 1e6
        contestants = {
            name: Contestant([__file__, "--compete", name, folder, str(flags.vocab_size)]) for name in flags.contestants
        }
        results = in_turn(contestants, flags.turns)
    print(f"{machine_line(torch.device('cpu'), 'tokenizers', 'gigatoken')}\n")
    print(f"{flags.text.name + ', repeated' if flags.text else 'made-up stories'}: {size:,.0f} MB; ", end="")
    same = len({tuple(result["hashes"]) for rows in results.values() for result in rows}) == 1
    print(f"files of all runs {'the same' if same else 'DIFFERENT'}\n")
    first = results[flags.contestants[0]]
    columns = [
        "learning, s",
        "encoding, s",
        "MB/s",
        "all, s",
        "MB/s",
        "encoder alone, MB/s",
        "peak over start, MiB",
        "all, ratio",
    ]
    print(markdown(["", *columns], [row(name, rows, first, size) for name, rows in results.items()]))


def row(name: str, results: list[dict], first: list[dict], size: float) -> list[str]:
    """The cells of one contestant; the ratio is the first contestant's seconds over its own."""
    learning, encoding_, total = (median(results, what) for what in ("learning", "encoding", "all"))
    return [
        name,
        f"{learning:.1f}",
        f"{encoding_:.1f}",
        f"{size / encoding_:.0f}",
        f"{total:.1f}",
        f"{size / total:.0f}",
        f"{median(results, 'alone') / 1e6:.0f}",
        f"{median(results, 'peak') / 2**20:,.0f}",
        f"{ratio(first, results, 'all'):.1f}",
    ]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--compete"]:
        name, folder, vocab_size = sys.argv[2:]
        at_start = peak_memory(torch.device("cpu"))  # with torch, which pre_tokenize.py does without
        answer(lambda: compete(name, Path(folder), int(vocab_size), at_start))
    else:
        main()
