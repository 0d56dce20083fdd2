"""Learn a byte-level BPE vocabulary from the stories of a text file.

Byte-pair encoding starts from the 256 bytes and adds the most frequent pair of neighbouring tokens as a new token,
again and again, until the vocabulary is full (bpe.py). Every byte is a token, so any text can be encoded, and decoding
gives it back.

Neural Machine Translation of Rare Words with Subword Units, arXiv 1508.07909; bytes instead of characters: Language
Models are Unsupervised Multitask Learners (GPT-2, 2019).
"""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm

from llm.data.bpe import learn_merges
from llm.data.encoding import word_counter
from llm.data.files import as_plain_text
from llm.data.stories import END_OF_TEXT, Tally, read_stories

DISTINCT_BYTES = 3 << 20  # learning the merges needs about 150 bytes of memory for each


def learn_tokenizer(source: Path, vocab_size: int) -> Tokenizer:
    """Learn a byte-level BPE from the stories of a file; see `make_tokenizer`."""
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
    """Learn a byte-level BPE from a few texts; see `make_tokenizer`."""
    return make_tokenizer(count_all_words([[text.encode() for text in texts]], DISTINCT_BYTES), vocab_size)


def count_all_words(blocks: Iterable[list[bytes]], limit: int) -> dict[bytes, int]:
    """Count the words of the texts, block by block, until the distinct ones exceed `limit` bytes.

    Each distinct word is stored once, so this bounds the memory. All of TinyStories is expected to stay below
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


def make_tokenizer(counts: dict[bytes, int], vocab_size: int) -> Tokenizer:
    """Learn a byte-level BPE from word counts: id 0 is `<|endoftext|>`, then come the 256 bytes and the merged tokens.

    The vocabulary is smaller than `vocab_size` if the text runs out of pairs to merge.
    """
    vocabulary, merges = learn_merges(counts, vocab_size, special=END_OF_TEXT)
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    return as_plain_text(tokenizer)


def progress(source: Path, what: str) -> tqdm:
    """Return a bar over the bytes of a file, with rate and time left; shown for files that take over a second."""
    return tqdm(total=source.stat().st_size, desc=what, unit="B", unit_scale=True, delay=1, dynamic_ncols=True)
