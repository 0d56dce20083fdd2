"""Texts to words and to token ids: by `tokenizers`, and as fast as `gigatoken` can where it says the same.

Both split a text into words by GPT-2's rule, ` ?letters| ?digits| ?others|blanks`, and write each word with the merges
of the vocabulary. gigatoken remembers the words that it has met, and is some sixty times as fast.

It is believed only where it was seen to agree: on the first texts, and on every character when it turns up first, since
the two may know different editions of Unicode (gigatoken 0.10 takes 359 characters for letters or digits that
tokenizers 0.23 does not know yet). Where it is missing or disagrees, `tokenizers` does the work and one line says so.
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

from llm.bpe import byte_characters
from llm.stories import END_OF_TEXT

try:
    import gigatoken
    from gigatoken.gigatoken_rs import pretokenized_counts
except ImportError:
    gigatoken = None

FIRST_BYTES = 200_000  # of the texts on which both must agree before one is believed
AT_ONCE = 256  # texts; `tokenizers` needs much memory for each
BLANKS = "\\t-\\r \\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000"  # Unicode's White_Space
WORD_WITH_BLANKS = re.compile(f"[{BLANKS}]*[^{BLANKS}]+|[{BLANKS}]+")


def split_words(text: str) -> list[bytes]:
    """Return the words of a text as `tokenizers` splits it; joined they are the text again."""
    byte_of = {character: byte for byte, character in enumerate(byte_characters())}
    words = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)
    return [bytes(byte_of[character] for character in word) for word, _ in words]


def count_words(texts: list[bytes]) -> dict[bytes, int]:
    """Return how often each word occurs. No word goes from a letter on to a blank, so each such part is split once."""
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
    """Return the ids of all texts in one row, uint32 (n,), and where in it each text ends, int64 (len(texts),)."""
    ids = []
    for start in range(0, len(texts), AT_ONCE):
        batch = [text.decode() for text in texts[start : start + AT_ONCE]]
        ids += [np.array(one.ids, dtype=np.uint32) for one in tokenizer.encode_batch_fast(batch)]
    return np.concatenate(ids), np.cumsum([len(one) for one in ids], dtype=np.int64)


def fast_encoder(tokenizer: Tokenizer) -> Callable[[list[bytes]], tuple[np.ndarray, np.ndarray]]:
    """Return `encode` by gigatoken. It gets the vocabulary without special tokens, so no text is parsed for them."""
    fast = gigatoken.Tokenizer.from_json(json.dumps(json.loads(tokenizer.to_str()) | {"added_tokens": []}))

    def encode(texts: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        rows = fast.encode_batch(texts).layout
        return rows.content.data, rows.offsets.data[1:]

    return encode


class Checked:
    """Calls `fast` as long as it gives what `plain` gives; see the module's first lines. `what` names it in messages.

    `same` compares two results. A block of texts with a character that the two understand differently goes to `plain`.
    """

    def __init__(self, fast: Callable | None, plain: Callable, same: Callable, what: str):
        self.fast, self.plain, self.same, self.what = fast, plain, same, what
        self.known: set[str] = set()
        self.strange: set[str] = set()
        self.met_texts = False

    def __call__(self, texts: list[bytes]):
        if self.fast is not None and not self.met_texts:
            self.meet(texts)
        if self.fast is None or self.characters(texts) & self.strange:
            return self.plain(texts)
        return self.fast(texts)

    def meet(self, texts: list[bytes]) -> None:
        """Compare both on the first texts."""
        first = texts[: 1 + int(np.searchsorted(np.cumsum([len(text) for text in texts]), FIRST_BYTES))]
        self.met_texts = True
        if not self.same(self.fast(first), self.plain(first)):
            self.fast = None
            self.say("gigatoken and tokenizers disagree on the first texts")

    def characters(self, texts: list[bytes]) -> set[str]:
        """Return the characters beyond ASCII, and compare both on the new ones."""
        found = set().union(*(text.decode() for text in texts if not text.isascii()))
        if new := found - self.known:
            disputed = {character for character in new if not same_words(character)} if not same_words(*new) else set()
            if disputed - self.strange:
                self.say(f"gigatoken and tokenizers split words with {min(disputed)!a} differently; where it occurs")
            self.strange |= disputed
            self.known |= new
        return found

    def say(self, why: str) -> None:
        print(f"{why}: {self.what} by tokenizers, much slower")


def same_words(*characters: str) -> bool:
    """Whether gigatoken takes these for letters, digits, blanks or others as `tokenizers` does."""
    text = "".join(f"a{c}a {c} 1{c}1 .{c}.  {c}{c}\n{c}'{c}s " for c in characters)
    return list(gigatoken.pretokenizer(text.encode())) == split_words(text)


def word_counter() -> Checked:
    """Return the fastest `count_words` that can be trusted."""
    return Checked(count_words_fast if gigatoken else None, count_words, operator.eq, "words are counted")


def text_encoder(tokenizer: Tokenizer) -> Checked:
    """Return the fastest `encode` with this tokenizer that can be trusted: texts -> (ids, ends)."""
    return Checked(
        fast_encoder(tokenizer) if gigatoken else None,
        lambda texts: encode(tokenizer, texts),
        lambda a, b: all(map(np.array_equal, a, b)),
        "texts are encoded",
    )
