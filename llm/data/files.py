"""The folder of token arrays: names of its files, the side file that seals them, and opening them again.

The side file `tinystories_tokens.json` records the vocabulary, counts, and the size and SHA-256 of the tokenizer and of
both arrays. `open_tokens` compares every file with it.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from llm.data.stories import END_OF_TEXT
from llm.files import sha256

TOKENIZER_FILE = "tokenizer-bpe.json"
SIDE_FILE = "tinystories_tokens.json"
ARRAY_FILES = {"train": "tinystories_train_tokens.npy", "eval": "tinystories_eval_tokens.npy"}
LOCK_FILE = "tinystories_tokens.lock"  # held while the others are written
FORMAT = 3  # in the side file; raised when the same text would give other arrays

THREE_WAYS = (
    "Three ways to get data:\n"
    "  ./download.sh && python pre_tokenize.py                                        TinyStories, 2.2 GB\n"
    "  python pre_tokenize.py --train my.txt --eval my_eval.txt --out data/mine       your own text\n"
    "  python pre_tokenize.py --sample                                                built-in stories, 2 MB"
)
AGAIN = "Run python pre_tokenize.py again (with the --train, --eval and --out of these data)."
CHECKED_AT_ONCE = 1 << 24  # tokens


@dataclass(frozen=True)
class Data:
    """A folder of token arrays after all checks. `train` and `eval` are memory-mapped, 1-D, unsigned integers."""

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
    if sha256(path) != recorded["sha256"]:
        raise ValueError(f"{path} was changed after it was written: its SHA-256 is not the one in {SIDE_FILE}. {AGAIN}")


def map_tokens(path: Path, vocab_size: int) -> np.ndarray:
    """Memory-map one array and check that all its ids are below `vocab_size`."""
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


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a `tokenizers` file, ready for `encode(text).ids` and `decode(ids)`.

    Raises FileNotFoundError (with the ways to get data) and ValueError (not a tokenizer).
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} not found. {THREE_WAYS}")
    try:
        return as_plain_text(Tokenizer.from_file(str(path)))
    except Exception as error:  # tokenizers raises nothing narrower
        raise ValueError(f"{path} is not a tokenizer file ({error}); run python pre_tokenize.py again") from error


def as_plain_text(tokenizer: Tokenizer) -> Tokenizer:
    """Make `encode` read `<|endoftext|>` in a text as 13 ordinary characters; a tokenizer file does not store this."""
    tokenizer.encode_special_tokens = True
    return tokenizer


def token_bytes(tokenizer: Tokenizer | str | Path) -> np.ndarray:
    """Return how many UTF-8 bytes each token stands for, int64 (vocab_size,); `<|endoftext|>` counts 0.

    bits per byte = (summed cross-entropy in nats / ln 2) / token_bytes(tokenizer)[targets].sum()
    """
    tokenizer = tokenizer if isinstance(tokenizer, Tokenizer) else load_tokenizer(tokenizer)
    special = tokenizer.token_to_id(END_OF_TEXT)
    lengths = [len(tokenizer.id_to_token(i)) for i in range(tokenizer.get_vocab_size())]  # one character per byte
    lengths[special] = 0
    return np.array(lengths, dtype=np.int64)
