"""Byte-pair encoding, learned from how often each word occurs.

Every word starts as its bytes. The most frequent pair of neighbouring tokens becomes a new token everywhere, and this
is repeated until the vocabulary is full:

    pair = argmax over (a, b) of  sum over words of count(word) * occurrences of (a, b) in word

Of two pairs with equal counts, the one with the smaller ids is merged first. A merge changes the counts of neighbouring
pairs only, so it costs as much as the pair has occurrences. The largest count is taken from a heap; an entry that is
out of date is corrected when it comes to the top. tests/test_pre_tokenize.py checks that the merges and their order are
those of the package `tokenizers`.

Neural Machine Translation of Rare Words with Subword Units, arXiv 1508.07909.
"""

import heapq
from array import array
from collections import defaultdict
from itertools import pairwise

import numpy as np
from tokenizers import pre_tokenizers

NO_TOKEN = -1  # stands between two words, and where a token was merged into the one before it


def byte_characters() -> list[str]:
    """Return the character that GPT-2 writes for each byte: its own where that is visible, else one from U+0100 on."""
    visible = {chr(byte) for byte in range(256)} & set(pre_tokenizers.ByteLevel.alphabet())
    others = (chr(code) for code in range(256, 512))
    return [chr(byte) if chr(byte) in visible else next(others) for byte in range(256)]


def learn_merges(counts: dict[bytes, int], vocab_size: int, special: str) -> tuple[list[str], list[tuple[str, str]]]:
    """Return the vocabulary (`special`, the 256 bytes, the merged tokens) and the merges, in the order learned.

    The vocabulary is smaller than `vocab_size` if the words run out of pairs to merge.
    """
    vocabulary, merges = [special, *sorted(byte_characters())], []
    symbol, before, after, times = chained(counts, vocabulary)
    where, total = occurrences(symbol, times)
    heap = [(-total[pair], pair) for pair in where]
    heapq.heapify(heap)
    while heap and len(vocabulary) < vocab_size:
        count, pair = heapq.heappop(heap)
        if -count != total[pair]:
            heapq.heappush(heap, (-total[pair], pair))
            continue
        if count == 0:
            break
        a, b = pair
        new = len(vocabulary)
        vocabulary.append(vocabulary[a] + vocabulary[b])
        merges.append((vocabulary[a], vocabulary[b]))
        made = set()
        for i in where.pop(pair):
            j = after[i]
            if symbol[i] != a or symbol[j] != b:  # an earlier merge took one of the two, as in "aaa"
                continue
            left, right, n = before[i], after[j], times[i]
            symbol[i], symbol[j] = new, NO_TOKEN
            after[i], before[right] = right, i
            if symbol[left] != NO_TOKEN:
                total[symbol[left], a] -= n
                total[symbol[left], new] += n
                where[symbol[left], new].append(left)
                made.add((symbol[left], new))
            if symbol[right] != NO_TOKEN:
                total[b, symbol[right]] -= n
                total[new, symbol[right]] += n
                where[new, symbol[right]].append(i)
                made.add((new, symbol[right]))
        for pair in made:
            heapq.heappush(heap, (-total[pair], pair))
    return vocabulary, merges


def chained(counts: dict[bytes, int], vocabulary: list[str]) -> tuple[array, array, array, array]:
    """Return all words in one row: each place's token, the places before and after it, and the count of its word."""
    ids = {token: i for i, token in enumerate(vocabulary)}
    id_of_byte = np.array([ids[character] for character in byte_characters()], dtype=np.int32)
    lengths = np.array([0, *map(len, counts)], dtype=np.int64)
    tokens = id_of_byte[np.frombuffer(b"".join(counts), dtype=np.uint8)]
    tokens = np.insert(tokens, np.cumsum(lengths), NO_TOKEN)  # NO_TOKEN word NO_TOKEN word NO_TOKEN
    places = np.arange(len(tokens))
    times = np.repeat(np.array([0, *counts.values()], dtype=np.int64), lengths + 1)
    return (
        array("i", tokens.astype(np.int32).tobytes()),
        array("i", (places - 1).astype(np.int32).tobytes()),
        array("i", (places + 1).astype(np.int32).tobytes()),
        array("q", times.astype(np.int64).tobytes()),
    )


def occurrences(symbol: array, times: array) -> tuple[defaultdict, defaultdict]:
    """Return, for each pair of neighbours, the ascending places of its first token and how often it occurs in total."""
    tokens, weights = np.asarray(symbol, dtype=np.int64), np.asarray(times)
    places = np.flatnonzero((tokens[:-1] != NO_TOKEN) & (tokens[1:] != NO_TOKEN))
    first, second = tokens[places], tokens[places + 1]
    order = np.lexsort((places, second, first))
    places, first, second = places[order].astype(np.int32), first[order], second[order]
    starts = np.flatnonzero((np.diff(first, prepend=-1) != 0) | (np.diff(second, prepend=-1) != 0))
    where, total = defaultdict(lambda: array("i")), defaultdict(int)
    for start, end in pairwise([*starts.tolist(), len(places)]):
        pair = int(first[start]), int(second[start])
        where[pair] = array("i", places[start:end].tobytes())
        total[pair] = int(weights[places[start:end]].sum())
    return where, total
