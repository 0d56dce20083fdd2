"""Text in, token arrays out: a byte-level BPE tokenizer, and the stories of two text files encoded with it.

Byte-pair encoding starts from the 256 bytes and adds, again and again, the most frequent pair of neighbouring tokens
as a new token, until the vocabulary is full. As every byte is a token, any text can be encoded, and decoding gives it
back. In the arrays the id of `<|endoftext|>` follows each story; text is never parsed for it. What a story is,
`llm/stories.py` says. Stories pass in blocks, so memory does not grow with the corpus.

Papers: "Neural Machine Translation of Rare Words with Subword Units" (arXiv:1508.07909); bytes instead of characters:
"Language Models are Unsupervised Multitask Learners" (GPT-2, 2019). Data: "TinyStories" (arXiv:2305.07759).
"""

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm

from llm import encoding
from llm.bpe import learn_merges
from llm.encoding import text_encoder, word_counter
from llm.sample_stories import sample_stories
from llm.stories import END_OF_TEXT, Tally, ahead, read_stories

TOKENIZER_FILE = "tokenizer-bpe.json"
SIDE_FILE = "tinystories_tokens.json"
ARRAY_FILES = {"train": "tinystories_train_tokens.npy", "eval": "tinystories_eval_tokens.npy"}
FORMAT = 2  # in the side file; raised when the same text would give other arrays

DISTINCT_BYTES = 3 << 20  # learning the merges needs about 150 bytes of memory for each

THREE_WAYS = (
    "Three ways to get data:\n"
    "  ./download.sh && python pre_tokenize.py                                        TinyStories, 2.2 GB\n"
    "  python pre_tokenize.py --train my.txt --eval my_eval.txt --out data/mine       your own text\n"
    "  python pre_tokenize.py --sample                                                built-in stories, 2 MB"
)


def count_all_words(blocks: Iterable[list[bytes]], limit: int) -> dict[bytes, int]:
    """Count the words of the texts, block by block, until the distinct ones exceed `limit` bytes.

    Each distinct word is kept once, so this bounds the memory. All of TinyStories is expected to stay below
    DISTINCT_BYTES (its first 6 MB hold 58 kB of distinct words); text full of numbers or without blanks does not.
    """
    counter, counts = word_counter(), {}
    for texts in blocks:
        for word, n in counter(texts).items():
            if word in counts:
                counts[word] += n
            else:
                counts[word] = n
                limit -= len(word)
        if limit < 0:
            break
    return counts


def learn_tokenizer(source: Path, vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE on the stories of a file; see `make_tokenizer`."""
    with progress(source, "learning the vocabulary") as bar:
        blocks = (texts for texts, _ in read_stories(source, Tally(), bar))
        counts = count_all_words(blocks, DISTINCT_BYTES)
        if sum(map(len, counts)) > DISTINCT_BYTES and bar.n < bar.total:
            bar.write(
                f"the vocabulary is learned from the first {bar.n / bar.total:.1%} of {source.name}: so many words "
                f"differ that counting them all would fill the memory"
            )
        return make_tokenizer(counts, vocab_size)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE on a few texts; see `make_tokenizer`."""
    return make_tokenizer(count_all_words([[text.encode() for text in texts]], DISTINCT_BYTES), vocab_size)


def make_tokenizer(counts: dict[bytes, int], vocab_size: int) -> Tokenizer:
    """Learn a byte-level BPE from word counts: id 0 is `<|endoftext|>`, then the 256 bytes, then what was merged.

    The vocabulary stays smaller than `vocab_size` where the text has no more pairs to merge.
    """
    vocabulary, merges = learn_merges(counts, vocab_size, special=END_OF_TEXT)
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    return as_plain_text(tokenizer)


def as_plain_text(tokenizer: Tokenizer) -> Tokenizer:
    """Let `encode` treat `<|endoftext|>` in a text as 13 ordinary characters; a tokenizer file does not store this."""
    tokenizer.encode_special_tokens = True
    return tokenizer


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


def token_bytes(tokenizer: Tokenizer | str | Path) -> np.ndarray:
    """Return the number of UTF-8 bytes that each token stands for, int64 (vocab_size,); `<|endoftext|>` counts 0.

    bits per byte = (summed cross-entropy in nats / ln 2) / token_bytes(tokenizer)[targets].sum()
    """
    tokenizer = tokenizer if isinstance(tokenizer, Tokenizer) else load_tokenizer(tokenizer)
    special = tokenizer.token_to_id(END_OF_TEXT)
    lengths = [len(tokenizer.id_to_token(i)) for i in range(tokenizer.get_vocab_size())]  # one character per byte
    lengths[special] = 0
    return np.array(lengths, dtype=np.int64)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(path: Path) -> dict:
    """Return the name, size in bytes and SHA-256 of a file, as the side file records them."""
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": file_sha256(path)}


@contextmanager
def replacing(target: Path) -> Iterator[BinaryIO]:
    """Write `target` whole or not at all: a temporary file beside it takes its name only when it is safe on disk."""
    temporary = target.with_name(target.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write_header(file: BinaryIO, dtype: np.dtype, length: int) -> None:
    """Write the header of a 1-D .npy file at its start. numpy leaves room to set the length later."""
    file.seek(0)
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(file, header)


def write_tokens(source: Path, target: Path, tokenizer: Tokenizer, encode: Callable) -> Tally:
    """Encode the stories of `source` into the 1-D array `target`, in the smallest unsigned dtype for the vocabulary.

    `encode` is what `text_encoder(tokenizer)` returns. Raises ValueError where `source` has no story, or where an id or
    a byte count is not what it must be.
    """
    tally, lengths = Tally(), token_bytes(tokenizer).astype(np.int32)
    dtype, end_of_text = np.min_scalar_type(len(lengths) - 1), tokenizer.token_to_id(END_OF_TEXT)
    with replacing(target) as file, progress(source, f"encoding {source.name}") as bar:
        write_header(file, dtype, 0)
        for texts, last in ahead(read_stories(source, tally, bar)):
            ids, ends = encode(texts)
            n_bytes = sum(map(len, texts))
            if ids.max(initial=0) >= len(lengths) or lengths.take(ids, mode="clip").sum() != n_bytes:  # clip is faster
                raise ValueError(f"the tokenizer does not give back the text of {source} near story {tally.stories:,}")
            file.write(np.insert(ids.astype(dtype), ends[last], end_of_text).data)
            tally.tokens += len(ids) + len(last)
            tally.story_bytes += n_bytes
        if tally.stories == 0:
            raise ValueError(f"{source} holds no story: it has nothing but blanks and separators")
        write_header(file, dtype, tally.tokens)
    return tally


def progress(source: Path, what: str) -> tqdm:
    """Return a bar over the bytes of a file, with rate and time left; shown for files that take more than a moment."""
    return tqdm(total=source.stat().st_size, desc=what, unit="B", unit_scale=True, delay=1, dynamic_ncols=True)


def check_inputs(sources: dict[str, Path], out: Path, vocab_size: int) -> None:
    """Raise, before any work, what would stop it later; the error names the flag or command that mends it."""
    if vocab_size < 257:
        raise ValueError(f"--vocab-size {vocab_size} is too small: 256 bytes and {END_OF_TEXT} need at least 257")
    for split, path in sources.items():
        if not path.is_file():
            raise FileNotFoundError(f"--{split} {path} not found. {THREE_WAYS}")
        if path.stat().st_size == 0:
            raise ValueError(f"--{split} {path} is empty")
    if sources["train"].samefile(sources["eval"]):
        raise ValueError(f"--train and --eval are the same file, {sources['train']}: the loss on it would mean nothing")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with replacing(out / ".writable"):
            pass
        (out / ".writable").unlink()
    except OSError as error:
        raise OSError(f"cannot write in --out {out} ({error.strerror}); give another directory") from error
    if shutil.disk_usage(out).free < space_needed(sources):
        raise disk_full(sources, out)


def space_needed(sources: dict[str, Path]) -> int:
    """Return the bytes that the arrays will take, about: 2 for a token, which stands for about 4 bytes of text."""
    return sum(path.stat().st_size for path in sources.values()) // 2


def disk_full(sources: dict[str, Path], out: Path) -> OSError:
    """Return the error that says how much room is needed and how much there is."""
    needed, free = space_needed(sources) / 1e6, shutil.disk_usage(out).free / 1e6
    return OSError(
        f"disk full: {out} needs about {needed:,.1f} MB and has {free:,.1f} MB free; nothing was half-written"
    )


def is_finished(out: Path, inputs: dict) -> bool:
    """Whether `out` holds the complete result of the same inputs."""
    try:
        side = json.loads((out / SIDE_FILE).read_text(encoding="utf-8"))
        return side["inputs"] == inputs and all(fingerprint(out / f["name"]) == f for f in side["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def pre_tokenize(train: Path, eval: Path, out: Path, vocab_size: int = 10_000) -> dict:
    """Train the tokenizer on `train`, encode both files, write all into `out`; return what the side file says.

    The side file is written last and names the SHA-256 of all the others: without it, or with another hash, nothing
    is complete. A second call with the same inputs does nothing; after an interruption all is made anew, to the same
    bytes.
    Raises FileNotFoundError, ValueError and OSError before any work where it can, and OSError when the disk fills up.
    """
    sources, out = {"train": Path(train), "eval": Path(eval)}, Path(out)
    check_inputs(sources, out, vocab_size)
    inputs = {"format": FORMAT, "vocab_size": vocab_size} | {split: fingerprint(p) for split, p in sources.items()}
    if is_finished(out, inputs):
        print(f"{out} is complete: its arrays and its tokenizer belong to these files. Nothing to do.")
        return json.loads((out / SIDE_FILE).read_text(encoding="utf-8"))
    (out / SIDE_FILE).unlink(missing_ok=True)
    try:
        return write_all(sources, out, inputs)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise
        raise disk_full(sources, out) from error


def write_all(sources: dict[str, Path], out: Path, inputs: dict) -> dict:
    """Write tokenizer, arrays and, last, the side file; print the closing table."""
    if encoding.gigatoken is None:
        print("gigatoken is not installed (pip install gigatoken): tokenizers does its work, much slower")
    start = time.perf_counter()
    tokenizer = learn_tokenizer(sources["train"], inputs["vocab_size"])
    with replacing(out / TOKENIZER_FILE) as file:
        file.write(tokenizer.to_str().encode())
    seconds, tallies = {"tokenizer": time.perf_counter() - start}, {}
    encode = text_encoder(tokenizer)
    for split, source in sources.items():
        start = time.perf_counter()
        tallies[split] = write_tokens(source, out / ARRAY_FILES[split], tokenizer, encode)
        seconds[split] = time.perf_counter() - start
    side = {
        "vocab_size": tokenizer.get_vocab_size(),
        "end_of_text_id": tokenizer.token_to_id(END_OF_TEXT),
        "inputs": inputs,
        "files": [fingerprint(out / name) for name in (TOKENIZER_FILE, *ARRAY_FILES.values())],
    } | {split: asdict(tally) for split, tally in tallies.items()}
    with replacing(out / SIDE_FILE) as file:
        file.write(json.dumps(side, indent=2).encode())
    report(side, out, seconds)
    return side


def report(side: dict, out: Path, seconds: dict[str, float]) -> None:
    """Print the closing table, and what was odd in the text."""
    print(f"{side['vocab_size']:,} tokens of vocabulary learned in {seconds['tokenizer']:.1f} s; written to {out}")
    print(f"{'split':6}{'stories':>12}{'tokens':>14}{'bytes/token':>13}{'seconds':>9}{'MB/s':>7}")
    for split in ARRAY_FILES:
        tally, size, s = side[split], side["inputs"][split]["bytes"], seconds[split]
        ratio = tally["story_bytes"] / tally["tokens"]
        print(f"{split:6}{tally['stories']:12,}{tally['tokens']:14,}{ratio:13.3f}{s:9.1f}{size / 1e6 / s:7.1f}")
    for split in ARRAY_FILES:
        name = side["inputs"][split]["name"]
        if side[split]["empty_stories"]:
            print(f"{name}: {side[split]['empty_stories']:,} empty stories dropped")
        if side[split]["invalid_utf8"]:
            print(f"{name}: {side[split]['invalid_utf8']:,} invalid UTF-8 sequences replaced by U+FFFD")


def make_sample(folder: str | Path = Path("data/sample"), vocab_size: int = 10_000) -> Path:
    """Write the built-in stories and their arrays into `folder` unless they are there, complete; return the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {split: folder / f"sample_{split}.txt" for split in ARRAY_FILES}
    for split, stories in sample_stories().items():
        path, text = paths[split], "".join(f"{story}\n{END_OF_TEXT}\n" for story in stories).encode()
        if not path.is_file() or path.read_bytes() != text:
            with replacing(path) as file:
                file.write(text)
    pre_tokenize(paths["train"], paths["eval"], folder, vocab_size)
    return folder
