"""Read the stories of a text file as a stream of blocks.

A story is the text between two `<|endoftext|>`, stripped at both ends (`str.strip`) and untouched inside: CRLF, NUL
and blanks stay. Empty stories are dropped and counted, each invalid UTF-8 sequence becomes U+FFFD and is counted. A
file without a separator is one story. A long story passes in pieces, so memory depends on neither file nor story.

Stories are bytes, valid UTF-8: a gigabyte has more than a million of them, and ASCII needs no decoding.
"""

import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

END_OF_TEXT = "<|endoftext|>"
READ_BYTES = 4 << 20  # about 5,000 stories
LONGEST_PIECE = 16 << 10  # bytes; TinyStories' stories are shorter and stay whole
ASCII_BLANKS = b" \t\n\r\x0b\x0c\x1c\x1d\x1e\x1f"  # those of str.strip; bytes.strip would leave the last four
UP_TO_A_WORD_END = re.compile(rb".*[!-~\xb0-\xbf](?=[ \n])", re.DOTALL)  # no blank ends in such a byte


@dataclass
class Tally:
    """What one split holds. `story_bytes` are the UTF-8 bytes of the stories, without the separators."""

    stories: int = 0
    tokens: int = 0
    story_bytes: int = 0
    empty_stories: int = 0
    invalid_utf8: int = 0


def cut(raw: bytes) -> list[bytes]:
    """Cut bytes into pieces of at most LONGEST_PIECE, all but the last; joined they are `raw` again.

    A cut falls where a word ends and white space begins, wherever there is such a place: the tokenizer starts a new
    word there anyway, so the ids are those of the uncut text. What is left after a cut is longer than LONGEST_PIECE, so
    the beginning of a separator at the end of it is never cut off.
    """
    pieces, start = [], 0
    while len(raw) - start > 2 * LONGEST_PIECE:
        if head := UP_TO_A_WORD_END.match(raw, start, start + LONGEST_PIECE):
            end = head.end()
        else:  # end at least between two characters
            starts_character = (raw[start + LONGEST_PIECE - back] & 0xC0 != 0x80 for back in range(4))
            end = start + LONGEST_PIECE - next((back for back, yes in enumerate(starts_character) if yes), 0)
        pieces.append(raw[start:end])
        start = end
    return [*pieces, raw[start:]]


def raw_blocks(file: BinaryIO, bar: tqdm) -> Iterator[tuple[bytes, bool]]:
    """Yield (stories with separators between them, True) or, of a story longer than READ_BYTES, (a part, False).

    A part does not end in blanks, as they may turn out to be the end of the story.
    """
    rest, unfinished = b"", False
    while read := file.read(READ_BYTES):
        bar.update(len(read))
        raw = rest + read
        stories, separator, rest = raw.rpartition(END_OF_TEXT.encode())
        if separator:
            yield stories, True
            unfinished = False
        elif part := without_last_blanks(raw[: len(raw) - len(cut(raw)[-1])]):
            yield part, False
            rest, unfinished = raw[len(part) :], True
    if unfinished or rest.strip():
        yield rest, True


def without_last_blanks(raw: bytes) -> bytes:
    """`str.rstrip` for bytes that need not be valid UTF-8."""
    return raw.decode(errors="surrogateescape").rstrip().encode(errors="surrogateescape")


def clean(raw: bytes, tally: Tally, begun: bool) -> bytes:
    """Return a story stripped, at its end only where it has `begun` before, with its invalid UTF-8 replaced."""
    if raw.isascii():
        return raw.rstrip(ASCII_BLANKS) if begun else raw.strip(ASCII_BLANKS)
    text = raw.decode(errors="replace")
    tally.invalid_utf8 += text.count("\ufffd") - raw.count("\ufffd".encode())
    return (text.rstrip() if begun else text.strip()).encode()


def read_stories(path: Path, tally: Tally, bar: tqdm) -> Iterator[tuple[list[bytes], np.ndarray]]:
    """Yield blocks: (texts, the indices of those texts that end a story), counting in `tally` what is there.

    Nearly always each text is a story; a long one is several texts, which may lie in several blocks.
    """
    begun = False  # whether an earlier block has the beginning of the first story in this one
    with open(path, "rb") as file:
        for raw, complete in raw_blocks(file, bar):
            first, *others = raw.split(END_OF_TEXT.encode())
            first = clean(first, tally, begun)
            found = [story for other in others if (story := clean(other, tally, begun=False))]
            if first or begun:
                found.insert(0, first)
            if complete:
                tally.stories += len(found)
                tally.empty_stories += 1 + len(others) - len(found)
            begun = not complete
            pieces = [cut(story) if len(story) > LONGEST_PIECE else [story] for story in found]
            ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64) - 1
            if found:
                yield list(chain.from_iterable(pieces)), ends if complete else ends[:0]


def ahead(items: Iterable) -> Iterator:
    """Yield the same items, the next one being made by a thread while the caller uses the last. What fails there is
    raised here."""
    items, end = iter(items), object()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="ahead") as thread:
        upcoming = thread.submit(next, items, end)
        while (item := upcoming.result()) is not end:
            upcoming = thread.submit(next, items, end)
            yield item
