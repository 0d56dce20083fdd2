"""Token arrays on disk, and batches of windows as a pure function of (seed, step, rank).

Window i of T targets is `tokens[i * T : i * T + T + 1]`: the model reads the first T tokens and predicts the last T.
An epoch visits every window once, in the order of a permutation seeded by (seed, epoch); the epochs one after another
are a stream of windows. Optimizer step s takes positions `s * G ... s * G + G - 1` of it, G being the windows of a
global batch. So resuming needs a step number and no loader state, and the ranks together read what one rank alone
would read.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llm.stories import ahead
from llm.tokenization import ARRAY_FILES, SIDE_FILE, THREE_WAYS, TOKENIZER_FILE, file_sha256, token_bytes

__all__ = ["Data", "eval_windows", "open_tokens", "step_batches", "token_bytes", "windows"]

AGAIN = "Run python pre_tokenize.py again (with the --train, --eval and --out of these data)."
CHECKED_AT_ONCE = 1 << 24  # tokens


@dataclass(frozen=True)
class Data:
    """A folder of token arrays that was checked: `train` and `eval` are memory-mapped, 1-D, unsigned integers."""

    folder: Path
    train: np.ndarray
    eval: np.ndarray
    vocab_size: int
    eot: int
    tokenizer_path: Path
    tokenizer_sha256: str
    train_sha256: str
    eval_sha256: str


def open_tokens(folder: str | Path) -> Data:
    """Open the arrays that pre_tokenize.py wrote into `folder`, after checking them against the side file.

    Raises FileNotFoundError where something is missing and ValueError where a size, a SHA-256, a dtype or a token id is
    not what the side file says. Both name the file and the command that mends it.
    """
    folder = Path(folder)
    if not (folder / SIDE_FILE).is_file():
        raise FileNotFoundError(f"no complete token arrays in {folder} (no {SIDE_FILE}). {THREE_WAYS}")
    try:
        side = json.loads((folder / SIDE_FILE).read_text(encoding="utf-8"))
        recorded = {file["name"]: file for file in side["files"]}
        vocab_size, eot = int(side["vocab_size"]), int(side["end_of_text_id"])
        hashes = {name: recorded[name]["sha256"] for name in (TOKENIZER_FILE, *ARRAY_FILES.values())}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / SIDE_FILE} is damaged ({error!r}). {AGAIN}") from error
    for name in hashes:
        check_file(folder / name, recorded[name])
    arrays = {split: map_tokens(folder / name, vocab_size) for split, name in ARRAY_FILES.items()}
    return Data(
        folder=folder,
        vocab_size=vocab_size,
        eot=eot,
        tokenizer_path=folder / TOKENIZER_FILE,
        tokenizer_sha256=hashes[TOKENIZER_FILE],
        train_sha256=hashes[ARRAY_FILES["train"]],
        eval_sha256=hashes[ARRAY_FILES["eval"]],
        **arrays,
    )


def check_file(path: Path, recorded: dict) -> None:
    """Raise where a file is not the one that the side file names."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing. {AGAIN}")
    if path.stat().st_size != recorded["bytes"]:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes and should have {recorded['bytes']:,}. {AGAIN}")
    if file_sha256(path) != recorded["sha256"]:
        raise ValueError(f"{path} was changed after it was written: its SHA-256 is not the one in {SIDE_FILE}. {AGAIN}")


def map_tokens(path: Path, vocab_size: int) -> np.ndarray:
    """Memory-map one array and check that its ids, all of them, are below `vocab_size`."""
    tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    if tokens.ndim != 1 or tokens.dtype.kind != "u":
        raise ValueError(f"{path} holds {tokens.dtype} of shape {tokens.shape}, not one row of unsigned ids. {AGAIN}")
    for start in range(0, len(tokens), CHECKED_AT_ONCE):
        part = tokens[start : start + CHECKED_AT_ONCE]
        if part.max() >= vocab_size:
            offset = int(np.argmax(part >= vocab_size))
            raise ValueError(
                f"{path}: id {part[offset]} >= vocabulary {vocab_size} at offset {start + offset:,}. {AGAIN}"
            )
    return tokens


def count_windows(tokens: np.ndarray, seq_len: int) -> int:
    """Return how many windows an epoch has; ValueError where not one fits."""
    if len(tokens) <= seq_len:
        raise ValueError(
            f"the data hold {len(tokens):,} tokens, and one window of {seq_len} needs {seq_len + 1}: "
            "give more text to python pre_tokenize.py, or lower --model.max-seq-len"
        )
    return (len(tokens) - 1) // seq_len


@lru_cache(maxsize=2)  # a step may reach from one epoch into the next
def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order of the n windows in an epoch, int64 (n,)."""
    return np.random.default_rng(np.random.SeedSequence([seed, epoch])).permutation(n)


def take(tokens: np.ndarray, seq_len: int, indices: np.ndarray) -> np.ndarray:
    """Return the windows with these indices, int64 (len(indices), seq_len + 1)."""
    return tokens[indices[:, None] * seq_len + np.arange(seq_len + 1)].astype(np.int64)


def windows(tokens: np.ndarray, seq_len: int, seed: int, start: int, count: int) -> np.ndarray:
    """Return `count` windows of the training stream from position `start`, int64 (count, seq_len + 1)."""
    n = count_windows(tokens, seq_len)
    positions = range(start, start + count)
    indices = [permutation(n, seed, position // n)[position % n] for position in positions]
    return take(tokens, seq_len, np.array(indices, dtype=np.int64))


def eval_windows(tokens: np.ndarray, seq_len: int, n_windows: int) -> Tensor:
    """Return the windows to evaluate on, int64 (n, seq_len + 1), spread evenly; no two have a target in common.

    Always the same ones. n is `n_windows`, or all there are where there are fewer.
    """
    total = count_windows(tokens, seq_len)
    n = min(n_windows, total)
    return torch.from_numpy(take(tokens, seq_len, np.arange(n) * total // n))


def step_batches(
    tokens: np.ndarray,
    *,
    seq_len: int,
    micro_batch_size: int,
    windows_per_step: int,
    seed: int,
    first_step: int,
    last_step: int,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
) -> Iterator[list[tuple[int, Tensor]]]:
    """Yield for each step of `range(first_step, last_step)` this rank's micro-batches, on `device`.

    A micro-batch is (its index in the global batch, int64 (micro_batch_size, seq_len + 1)); rank r of W has the indices
    r, r + W, r + 2 W, ... The next step's are read and copied by a thread meanwhile; what fails there is raised here.
    Raises ValueError where the global batch does not divide or no window fits.
    """
    if windows_per_step % (micro_batch_size * world_size):
        raise ValueError(
            f"{windows_per_step} windows per step cannot be divided among {world_size} ranks with --micro-batch-size "
            f"{micro_batch_size}: --tokens-per-step must be a multiple of {micro_batch_size * world_size * seq_len}"
        )
    count_windows(tokens, seq_len)
    indices = range(rank, windows_per_step // micro_batch_size, world_size)
    pinned = torch.device(device).type == "cuda"

    def prepare(step: int) -> list[tuple[int, Tensor]]:
        first = step * windows_per_step
        rows = [windows(tokens, seq_len, seed, first + j * micro_batch_size, micro_batch_size) for j in indices]
        batch = torch.from_numpy(np.stack(rows))  # (accumulation, micro_batch_size, T + 1)
        batch = batch.pin_memory() if pinned else batch
        return list(zip(indices, batch.to(device, non_blocking=pinned), strict=True))

    return ahead(map(prepare, range(first_step, last_step)))
