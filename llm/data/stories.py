"""Read the stories of a text file, block by block.

A story is the text between two `<|endoftext|>`. It is stripped at both ends (`str.strip`), and its inside stays as it
is: CRLF, NUL and blanks are kept. Empty stories are dropped and counted. Each invalid UTF-8 sequence becomes U+FFFD and
is counted. A UTF-8 byte-order mark at the beginning of the file is skipped; UTF-16, UTF-32 and text that is hardly
UTF-8 are refused. A file without a separator is one story. A long story is read in pieces, so the memory needed depends
on neither the size of the file nor the length of a story.

Stories are bytes of valid UTF-8, not `str`: a gigabyte holds more than a million stories, and ASCII needs no decoding.
"""

import codecs
import re
from collections.abc import Iterator
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
MANY_INVALID = 0.005  # invalid sequences a byte; German in Latin-1 has 0.02
FEW_INVALID = 10  # invalid sequences that may be typing errors in a text of any size
MARKS = {  # a file that begins with one of these; that of UTF-32 begins with that of UTF-16
    codecs.BOM_UTF32_LE: "UTF-32-LE",
    codecs.BOM_UTF32_BE: "UTF-32-BE",
    codecs.BOM_UTF16_LE: "UTF-16-LE",
    codecs.BOM_UTF16_BE: "UTF-16-BE",
}


@dataclass
class Tally:
    """What one split holds. `story_bytes` counts the UTF-8 bytes of the stories without the separators."""

    stories: int = 0
    tokens: int = 0
    story_bytes: int = 0
    empty_stories: int = 0
    invalid_utf8: int = 0


def check_encoding(path: Path, allow_invalid_utf8: bool = False) -> None:
    """Look at the first bytes of a text. Raises ValueError for UTF-16 and UTF-32, by name, and for text that is hardly
    UTF-8, unless `allow_invalid_utf8`."""
    with open(path, "rb") as file:
        raw = file.read(READ_BYTES)
    if name := wide_encoding(raw):
        raise ValueError(
            f"{path} is {name}, and the stories must be UTF-8: convert it (iconv -f {name} -t UTF-8 {path} > new.txt)"
        )
    tally = Tally()
    clean(raw, tally, begun=False)
    check_share(path, tally.invalid_utf8, len(raw), allow_invalid_utf8)


def wide_encoding(raw: bytes) -> str | None:
    """UTF-16 or UTF-32 by its mark or, without one, by its zeros: in UTF-16 nearly all are the first or nearly all the
    second bytes of their pairs, in UTF-32 two of four bytes are zeros. None for other text."""
    for mark, name in MARKS.items():
        if raw.startswith(mark):
            return name
    sample = np.frombuffer(raw[: 1 << 16], np.uint8)
    fourths = [np.count_nonzero(sample[place::4] == 0) for place in range(4)]
    if sum(fourths) < max(16, 0.02 * len(sample)):
        return None
    if min(high := fourths[2:]) >= len(sample) // 4 or min(high := fourths[:2]) >= len(sample) // 4:
        return "UTF-32-LE" if high == fourths[2:] else "UTF-32-BE"
    first, second = fourths[0] + fourths[2], fourths[1] + fourths[3]
    return "UTF-16-LE" if second > 10 * first else "UTF-16-BE" if first > 10 * second else None


def check_share(path: Path, invalid: int, n_bytes: int, allowed: bool) -> None:
    """Raises ValueError where too much of a text is not UTF-8, unless that is `allowed`."""
    if not allowed and invalid > max(FEW_INVALID, MANY_INVALID * n_bytes):
        raise ValueError(
            f"{path} has {invalid:,} invalid UTF-8 sequences in {n_bytes:,} bytes. Is it text in another encoding, or "
            f"not text at all? Convert it (such as iconv -f LATIN1 -t UTF-8 {path} > new.txt), or give "
            "--allow-invalid-utf8 to train on it, with U+FFFD in place of each"
        )


def cut(raw: bytes) -> list[bytes]:
    """Cut bytes into pieces that give `raw` when joined. All but the last are at most LONGEST_PIECE long.

    A cut is made where a word ends and white space begins, if there is such a place. The tokenizer starts a new word
    there anyway, so the ids are those of the uncut text. The last piece is longer than LONGEST_PIECE, so a separator
    that has only begun at the end of `raw` is never cut in two.
    """
    pieces, start = [], 0
    while len(raw) - start > 2 * LONGEST_PIECE:
        if head := UP_TO_A_WORD_END.match(raw, start, start + LONGEST_PIECE):
            end = head.end()
        else:  # cut between two characters
            starts_character = (raw[start + LONGEST_PIECE - back] & 0xC0 != 0x80 for back in range(4))
            end = start + LONGEST_PIECE - next((back for back, yes in enumerate(starts_character) if yes), 0)
        pieces.append(raw[start:end])
        start = end
    return [*pieces, raw[start:]]


def raw_blocks(file: BinaryIO, bar: tqdm) -> Iterator[tuple[bytes, bool]]:
    """Yield (stories with separators between them, True), or (a part of one story, False) where it is very long.

    A part never ends in blanks: the story may end there, and would have to be stripped.
    """
    rest, unfinished = b"", False
    if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
        file.seek(0)
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
    """Return a story stripped, with its invalid UTF-8 replaced. If it has `begun` before, only its end is stripped."""
    if raw.isascii():
        return raw.rstrip(ASCII_BLANKS) if begun else raw.strip(ASCII_BLANKS)
    text = raw.decode(errors="replace")
    tally.invalid_utf8 += text.count("\ufffd") - raw.count("\ufffd".encode())
    return (text.rstrip() if begun else text.strip()).encode()


def read_stories(path: Path, tally: Tally, bar: tqdm) -> Iterator[tuple[list[bytes], np.ndarray]]:
    """Yield blocks (texts, indices of the texts that end a story), and count in `tally` what was read.

    Nearly every text is a whole story. A long story is several texts, which may be in several blocks.
    """
    begun = False  # whether the first story of this block began in an earlier block
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
