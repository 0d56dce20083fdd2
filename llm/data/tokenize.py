"""Text in, token arrays out: learn the vocabulary, then encode the stories of two text files with it.

In the arrays the id of `<|endoftext|>` follows each story; text is never searched for it. stories.py says what a story
is. Stories are read in blocks, so memory does not grow with the corpus. Data: TinyStories, arXiv 2305.07759.
"""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tokenizers import Tokenizer

from llm.data import encoding
from llm.data.encoding import text_encoder
from llm.data.files import ARRAY_FILES, FORMAT, LOCK_FILE, SIDE_FILE, THREE_WAYS, TOKENIZER_FILE, token_bytes
from llm.data.prefetch import prefetch
from llm.data.stories import END_OF_TEXT, Tally, check_encoding, check_share, read_stories
from llm.data.vocabulary import learn_tokenizer, progress
from llm.files import DISK_FULL, fingerprint, new_file, replacing, waiting_lock, write_atomically


def pre_tokenize(
    train: Path, eval: Path, out: Path, vocab_size: int = 10_000, allow_invalid_utf8: bool = False
) -> dict:
    """Learn the tokenizer on `train`, encode both files, write all into `out`; return the content of the side file.

    The side file is written last and has the SHA-256 of all the others, so a folder is complete only where the two
    agree. A second call with the same inputs does nothing, so complete data may be read-only. Of several calls at once
    one does the work, and the others wait for it. After an interruption all files are written again, with the same
    bytes. `allow_invalid_utf8` accepts text that is hardly UTF-8. Raises FileNotFoundError, ValueError and OSError,
    before any work where it can, and OSError when the disk is full.
    """
    sources, out = {"train": Path(train), "eval": Path(eval)}, Path(out)
    check_inputs(sources, vocab_size, allow_invalid_utf8)
    inputs = {"format": FORMAT, "vocab_size": vocab_size} | {split: record(p) for split, p in sources.items()}
    if is_finished(out, inputs):
        return finished(out)
    check_writable(out)
    with waiting_lock(out / LOCK_FILE):
        if is_finished(out, inputs):
            return finished(out)
        if shutil.disk_usage(out).free < space_needed(sources):
            raise disk_full(sources, out)
        (out / SIDE_FILE).unlink(missing_ok=True)
        try:
            return write_all(sources, out, inputs, allow_invalid_utf8)
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            raise disk_full(sources, out) from error


def finished(out: Path) -> dict:
    """Say that nothing is to be done; return the content of the side file."""
    print(f"{out} is complete: its arrays and its tokenizer belong to these files. Nothing to do.")
    return json.loads((out / SIDE_FILE).read_text(encoding="utf-8"))


def check_inputs(sources: dict[str, Path], vocab_size: int, allow_invalid_utf8: bool) -> None:
    """Raise at once what would stop the work later; the error names the flag or command that mends it."""
    if vocab_size < 257:
        raise ValueError(f"--vocab-size {vocab_size} is too small: 256 bytes and {END_OF_TEXT} need at least 257")
    for split, path in sources.items():
        if not path.is_file():
            raise FileNotFoundError(f"--{split} {path} not found. {THREE_WAYS}")
        if path.stat().st_size == 0:
            raise ValueError(f"--{split} {path} is empty")
        check_encoding(path, allow_invalid_utf8)
    if sources["train"].samefile(sources["eval"]):
        raise ValueError(f"--train and --eval are the same file, {sources['train']}: the loss on it would mean nothing")


def check_writable(out: Path) -> None:
    """Make the folder `out`; raise OSError where nothing can be written in it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with new_file(out / ".writable") as file:
            Path(file.name).unlink()
    except OSError as error:
        raise OSError(f"cannot write in --out {out} ({error.strerror}); give another directory") from error


def space_needed(sources: dict[str, Path]) -> int:
    """Return about how many bytes the arrays will take: 2 for a token, which stands for about 4 bytes of text."""
    return sum(path.stat().st_size for path in sources.values()) // 2


def disk_full(sources: dict[str, Path], out: Path) -> OSError:
    """Return the error that says how much space is needed and how much is free."""
    needed, free = space_needed(sources) / 1e6, shutil.disk_usage(out).free / 1e6
    return OSError(
        f"disk full: {out} needs about {needed:,.1f} MB and has {free:,.1f} MB free; nothing was half-written"
    )


def is_finished(out: Path, inputs: dict) -> bool:
    """Whether `out` holds the complete result of the same inputs."""
    try:
        side = json.loads((out / SIDE_FILE).read_text(encoding="utf-8"))
        return side["inputs"] == inputs and all(record(out / file["name"]) == file for file in side["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def record(path: Path) -> dict:
    """Return the name, size in bytes and SHA-256 of a file, as the side file has them."""
    return {"name": path.name} | fingerprint(path)


def write_all(sources: dict[str, Path], out: Path, inputs: dict, allow_invalid_utf8: bool) -> dict:
    """Write the tokenizer, the arrays and at last the side file; print the closing table."""
    if encoding.gigatoken is None:
        print("gigatoken is not installed (pip install gigatoken): tokenizers does its work, much slower")
    start = time.perf_counter()
    tokenizer = learn_tokenizer(sources["train"], inputs["vocab_size"])
    write_atomically(out / TOKENIZER_FILE, tokenizer.to_str().encode())
    seconds, tallies = {"tokenizer": time.perf_counter() - start}, {}
    encode = text_encoder(tokenizer)
    for split, source in sources.items():
        start = time.perf_counter()
        tallies[split] = write_tokens(source, out / ARRAY_FILES[split], tokenizer, encode, allow_invalid_utf8)
        seconds[split] = time.perf_counter() - start
    side = {
        "vocab_size": tokenizer.get_vocab_size(),
        "end_of_text_id": tokenizer.token_to_id(END_OF_TEXT),
        "inputs": inputs,
        "files": [record(out / name) for name in (TOKENIZER_FILE, *ARRAY_FILES.values())],
    } | {split: asdict(tally) for split, tally in tallies.items()}
    write_atomically(out / SIDE_FILE, json.dumps(side, indent=2).encode())
    report(side, out, seconds)
    return side


def write_tokens(
    source: Path, target: Path, tokenizer: Tokenizer, encode: Callable, allow_invalid_utf8: bool = False
) -> Tally:
    """Encode the stories of `source` into the 1-D array `target`, in the smallest unsigned dtype for the vocabulary.

    `encode` is what `text_encoder(tokenizer)` returns. Raises ValueError where `source` has no story, where an id is
    outside the vocabulary, where the tokens do not stand for as many bytes as the text has, and where much of the text
    is not UTF-8, unless `allow_invalid_utf8`.
    """
    tally, lengths = Tally(), token_bytes(tokenizer).astype(np.int32)
    dtype, end_of_text = np.min_scalar_type(len(lengths) - 1), tokenizer.token_to_id(END_OF_TEXT)
    with replacing(target) as file, progress(source, f"encoding {source.name}") as bar:
        write_header(file, dtype, 0)
        for texts, last in prefetch(read_stories(source, tally, bar)):
            ids, ends = encode(texts)
            n_bytes = sum(map(len, texts))
            if ids.max(initial=0) >= len(lengths) or lengths.take(ids, mode="clip").sum() != n_bytes:  # clip is faster
                raise ValueError(f"the tokenizer does not give back the text of {source} near story {tally.stories:,}")
            file.write(np.insert(ids.astype(dtype), ends[last], end_of_text).data)
            tally.tokens += len(ids) + len(last)
            tally.story_bytes += n_bytes
        if tally.stories == 0:
            raise ValueError(f"{source} holds no story: it has nothing but blanks and separators")
        check_share(source, tally.invalid_utf8, tally.story_bytes, allow_invalid_utf8)
        write_header(file, dtype, tally.tokens)
    return tally


def write_header(file: BinaryIO, dtype: np.dtype, length: int) -> None:
    """Write the header of a 1-D .npy file at its start. It may be written again: numpy pads it for longer lengths."""
    file.seek(0)
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(file, header)


def report(side: dict, out: Path, seconds: dict[str, float]) -> None:
    """Print the closing table, and how many empty stories and invalid UTF-8 sequences there were."""
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
