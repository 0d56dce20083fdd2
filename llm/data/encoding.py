"""Texts to words and to token ids: by the package `tokenizers`, or faster by `gigatoken` where both agree.

Both split a text into words by GPT-2's rule, ` ?letters| ?digits| ?others|blanks`, and encode each word with the merges
of the vocabulary. gigatoken caches the words it has seen, and is some sixty times as fast.

gigatoken is used only where it was checked against `tokenizers`: on the first texts, and on every character when it
first occurs. The two may follow different versions of Unicode (gigatoken 0.10 takes 359 characters for letters or
digits that tokenizers 0.23 does not know yet). Where gigatoken is missing or disagrees, `tokenizers` does the work and
one line says so.
"""

import json
import operator
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from tokenizers import Tokenizer, pre_tokenizers

from llm.data.bpe import byte_characters
from llm.data.stories import END_OF_TEXT

try:
    import gigatoken
    from gigatoken.gigatoken_rs import pretokenized_counts
except ImportError:
    gigatoken = None

FIRST_BYTES = 200_000  # both must agree on this much text before gigatoken is used
AT_ONCE = 256  # texts in one call; `tokenizers` needs much memory for each
BLANKS = "\\t-\\r \\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000"  # Unicode's White_Space
WORD_WITH_BLANKS = re.compile(f"[{BLANKS}]*[^{BLANKS}]+|[{BLANKS}]+")


def split_words(text: str) -> list[bytes]:
    """Return the words of a text as `tokenizers` splits it; joined they are the text again."""
    byte_of = {character: byte for byte, character in enumerate(byte_characters())}
    words = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)
    return [bytes(byte_of[character] for character in word) for word, _ in words]


def count_words(texts: list[bytes]) -> dict[bytes, int]:
    """Return how often each word occurs. No word contains a letter before a blank, so each part is split once."""
    parts = Counter(part for text in texts for part in WORD_WITH_BLANKS.findall(text.decode()))
    counts = Counter()
    for part, n in parts.items():
        for word in split_words(part):
            counts[word] += n
    return counts


def count_words_fast(texts: list[bytes]) -> dict[bytes, int]:
    """`count_words` by gigatoken."""
    separator = END_OF_TEXT.encode()
    with quiet():
        return dict(pretokenized_counts(separator.join(texts), separator))


@contextmanager
def quiet() -> Iterator[None]:
    """Discard what gigatoken writes to standard error about its threads."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def encode(tokenizer: Tokenizer, texts: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids of all texts in one row, uint32 (n,), and where each text ends in it, int64 (len(texts),)."""
    ids = []
    for start in range(0, len(texts), AT_ONCE):
        batch = [text.decode() for text in texts[start : start + AT_ONCE]]
        ids += [np.array(one.ids, dtype=np.uint32) for one in tokenizer.encode_batch_fast(batch)]
    return np.concatenate(ids), np.cumsum([len(one) for one in ids], dtype=np.int64)


def fast_encoder(tokenizer: Tokenizer) -> Callable[[list[bytes]], tuple[np.ndarray, np.ndarray]]:
    """Return `encode` by gigatoken. It is given no special tokens, so it never looks for them in a text."""
    fast = gigatoken.Tokenizer.from_json(json.dumps(json.loads(tokenizer.to_str()) | {"added_tokens": []}))

    def encode(texts: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        rows = fast.encode_batch(texts).layout
        return rows.content.data, rows.offsets.data[1:]

    return encode


class Checked:
    """A function of texts that calls `fast` where it was checked against `plain`, and `plain` elsewhere.

    `same` compares two results. `what` names the work in messages. A block of texts with a character that the two
    treat differently is left to `plain`.
    """

    def __init__(self, fast: Callable | None, plain: Callable, same: Callable, what: str):
        self.fast, self.plain, self.same, self.what = fast, plain, same, what
        self.known: set[str] = set()
        self.disputed: set[str] = set()
        self.checked_texts = False

    def __call__(self, texts: list[bytes]):
        if self.fast is not None and not self.checked_texts:
            self.check_texts(texts)
        if self.fast is None or self.check_characters(texts) & self.disputed:
            return self.plain(texts)
        return self.fast(texts)

    def check_texts(self, texts: list[bytes]) -> None:
        """Compare both on the first texts."""
        first = texts[: 1 + int(np.searchsorted(np.cumsum([len(text) for text in texts]), FIRST_BYTES))]
        self.checked_texts = True
        if not self.same(self.fast(first), self.plain(first)):
            self.fast = None
            self.say("gigatoken and tokenizers disagree on the first texts")

    def check_characters(self, texts: list[bytes]) -> set[str]:
        """Return the characters beyond ASCII, after comparing both functions on those that are new."""
        found = set().union(*(text.decode() for text in texts if not text.isascii()))
        if new := found - self.known:
            disputed = {character for character in new if not same_words(character)} if not same_words(*new) else set()
            if disputed - self.disputed:
                self.say(f"gigatoken and tokenizers split words with {min(disputed)!a} differently; where it occurs")
            self.disputed |= disputed
            self.known |= new
        return found

    def say(self, why: str) -> None:
        print(f"{why}: {self.what} by tokenizers, much slower")


def same_words(*characters: str) -> bool:
    """Whether gigatoken takes these for letters, digits, blanks or others as `tokenizers` does."""
    text = "".join(f"a{c}a {c} 1{c}1 .{c}.  {c}{c}\n{c}'{c}s " for c in characters)
    return list(gigatoken.pretokenizer(text.encode())) == split_words(text)


def word_counter() -> Checked:
    """Return `count_words`, by gigatoken where it agrees."""
    return Checked(count_words_fast if gigatoken else None, count_words, operator.eq, "words are counted")


def text_encoder(tokenizer: Tokenizer) -> Checked:
    """Return `encode` with this tokenizer, by gigatoken where it agrees: texts -> (ids, ends)."""
    return Checked(
        fast_encoder(tokenizer) if gigatoken else None,
        lambda texts: encode(tokenizer, texts),
        lambda a, b: all(map(np.array_equal, a, b)),
        "texts are encoded",
    )
