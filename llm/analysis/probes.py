"""Probes: small synthetic tasks that tell architectures apart, which one loss on stories does not.

A task draws random tokens. At some tokens it asks for a target, which the tokens so far determine. A model's score is
the share of targets that it predicts. The papers are named below the table:

| task           | tokens                                   | target                  | needs                         |
|----------------|------------------------------------------|-------------------------|-------------------------------|
| recall         | keys with their values, again and again  | values of known keys    | look-up by content            |
| noisy_recall   | the same among random other tokens       | their values            | and ignoring noise            |
| fuzzy_recall   | the same, keys and values of two tokens  | their values            | and joining two tokens        |
| selective_copy | symbols among blanks, then in order      | the symbols             | a choice of what to store     |
| copy           | a string, then the string again          | the string              | memory as long as the text    |
| parity         | bits                                     | their sum so far, mod 2 | a state that flips            |
| s3             | permutations of 3 things                 | their product so far    | a state that does not commute |
| s5             | swaps of neighbours among 5 things       | their product so far    | the same, 120 states          |
| needle         | a fact far before its question           | the answer              | reach                         |
| induction      | different tokens, then one of them again | the one after it        | two layers, or a convolution  |
| nested         | brackets of two kinds                    | the closing kinds       | a stack                       |

Zoology, arXiv 2312.04927 (recall); MAD, arXiv 2403.17844 (noisy and fuzzy recall); Mamba, arXiv 2312.00752 (selective
copy); Repeat After Me, arXiv 2402.01032 (copy); The Illusion of State in State-Space Models, arXiv 2404.08819
(permutations); Unlocking State-Tracking in Linear RNNs, arXiv 2411.12537 (their swaps); In-context Learning and
Induction Heads, arXiv 2209.11895 (induction).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import permutations as all_permutations

import torch
from torch import Generator, Tensor

Texts = tuple[Tensor, Tensor]
"""Tokens (B, T) int64, and for each the target after it, (B, T) int64: UNDECIDED where the text does not decide it."""
UNDECIDED = -100  # which `cross_entropy` ignores


@dataclass(frozen=True)
class Task:
    """`draw(generator, batch_size, length)` gives Texts of at most `length` tokens, all of one length.

    chance    the share of targets that a guess among the possible answers gets right
    steps     of training, after which models differ
    """

    draw: Callable[[Generator, int, int], Texts]
    vocab_size: int
    chance: float
    steps: int = 600


def draw(task: Task, seed: int, step: int, batch_size: int, length: int) -> Texts:
    """The texts of a step: a pure function of the arguments."""
    return task.draw(Generator().manual_seed(seed * 1_000_003 + step), batch_size, length)


def distinct(generator: Generator, rows: int, n: int, k: int) -> Tensor:
    """k different numbers below n for each row, in random order: (rows, k)."""
    return torch.rand(rows, n, generator=generator).argsort(-1)[:, :k]


def next_tokens(text: Tensor, decided: Tensor) -> Texts:
    """Every token of `text` (B, T + 1) is the target of the one before it where it is `decided`."""
    return text[:, :-1], text[:, 1:].masked_fill(~decided[:, 1:], UNDECIDED)


def randint(generator: Generator, high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, generator=generator)


def recall(generator: Generator, batch_size: int, length: int, n_keys: int, n_noise: int = 0, width: int = 1) -> Texts:
    """Keys with their values, in random order, each about four times; the value is decided where the key was there
    before. Keys are numbers below n_keys, values those from n_keys to 2 n_keys. With width 2, both are two tokens each.
    With n_noise, as many tokens that mean nothing, the n_noise numbers after the values, follow each pair."""
    n_slots = length // (2 * width * (2 if n_noise else 1))
    names = distinct(generator, batch_size, n_keys**width, max(n_slots // 4, 1))
    key = torch.stack([names // n_keys**i % n_keys for i in range(width)], -1)  # (B, P, width)
    value = n_keys + randint(generator, n_keys, *key.shape)
    index = randint(generator, key.shape[1], batch_size, n_slots)
    again = (index[:, :, None] == index[:, None]).tril(-1).any(-1)  # (B, slots)
    parts = [x.gather(1, index[..., None].expand(-1, -1, width)) for x in (key, value)]
    if n_noise:
        parts.append(2 * n_keys + randint(generator, n_noise, batch_size, n_slots, 2 * width))
    text = torch.cat(parts, -1)
    decided = torch.zeros(text.shape, dtype=torch.bool)
    decided[..., width : 2 * width] = again[..., None]
    return next_tokens(text.flatten(1), decided.flatten(1))


def selective_copy(generator: Generator, batch_size: int, length: int, n_marked: int, n_symbols: int) -> Texts:
    """`n_marked` symbols among blanks (n_symbols), a separator (n_symbols + 1), and the symbols again in order."""
    room = length - n_marked - 1
    places = distinct(generator, batch_size, room, n_marked).sort(-1).values
    symbols = randint(generator, n_symbols, batch_size, n_marked)
    first = torch.full((batch_size, room), n_symbols).scatter(1, places, symbols)
    return with_copy(first, symbols, separator=n_symbols + 1)


def copy(generator: Generator, batch_size: int, length: int, n_symbols: int) -> Texts:
    """A string, a separator (n_symbols) and the string again."""
    first = randint(generator, n_symbols, batch_size, (length - 1) // 2)
    return with_copy(first, first, separator=n_symbols)


def with_copy(first: Tensor, again: Tensor, separator: int) -> Texts:
    text = torch.cat([first, torch.full_like(first[:, :1], separator), again], 1)
    return next_tokens(text, (torch.arange(text.shape[1]) > first.shape[1]).expand_as(text))


def products(generator: Generator, batch_size: int, length: int, table: Tensor, drawn: Tensor | None = None) -> Texts:
    """Elements g_1, g_2, .. of a group; the target after g_t is g_1 g_2 .. g_t. table[a, b] = a b; 0 is the identity.

    The products are not among the tokens: a model that could read the last product would need no state. The tokens are
    all elements, or those that are in `drawn`.
    """
    drawn = torch.arange(len(table)) if drawn is None else drawn
    elements = drawn[randint(generator, len(drawn), batch_size, length)]
    total, found = torch.zeros(batch_size, dtype=torch.int64), []
    for t in range(length):
        total = table[total, elements[:, t]]
        found.append(total)
    return elements, torch.stack(found, 1)


def multiplication_table(n: int) -> Tensor:
    """The products of all permutations of n things, (n!, n!): [a, b] is `first a, then b`. 0 is the identity."""
    elements = list(all_permutations(range(n)))
    number = {element: i for i, element in enumerate(elements)}
    return torch.tensor([[number[tuple(b[i] for i in a)] for b in elements] for a in elements])


def adjacent_swaps(n: int) -> Tensor:
    """The n - 1 permutations of n things that swap two neighbours: products of these give all others."""
    numbers = {element: i for i, element in enumerate(all_permutations(range(n)))}
    things = range(n)
    return torch.tensor([numbers[(*things[:i], i + 1, i, *things[i + 2 :])] for i in range(n - 1)])


def needle(generator: Generator, batch_size: int, length: int, n_symbols: int, distance: int | None = None) -> Texts:
    """A mark (n_symbols) and a symbol somewhere in random other text, and at the end the mark again with the symbol.

    `distance` is how many tokens lie between the two marks; where it is not given, each row has its own.
    """
    text = n_symbols + 1 + randint(generator, n_symbols, batch_size, length)
    symbol = randint(generator, n_symbols, batch_size, 1)
    far = length - 3 if distance is None else distance
    gap = 1 + randint(generator, far, batch_size, 1) if distance is None else torch.full((batch_size, 1), distance)
    start = length - 3 - gap  # the first mark; the second is at length - 2
    text.scatter_(1, torch.cat([start, start + 1], 1), torch.cat([torch.full_like(symbol, n_symbols), symbol], 1))
    text[:, -2:] = torch.cat([torch.full_like(symbol, n_symbols), symbol], 1)
    return next_tokens(text, (torch.arange(length) == length - 1).expand_as(text))


def induction(generator: Generator, batch_size: int, length: int, n_symbols: int) -> Texts:
    """Different random tokens, then some of them again: what followed each then follows it now."""
    n = min(length // 2, n_symbols)
    first = distinct(generator, batch_size, n_symbols, n)
    index = distinct(generator, batch_size, n - 1, (length - n) // 2)
    again = torch.stack([first.gather(1, index), first.gather(1, index + 1)], -1).flatten(1)
    text = torch.cat([first, again], 1)
    place = torch.arange(text.shape[1])
    return next_tokens(text, ((place > n) & ((place - n) % 2 == 1)).expand_as(text))


def nested(generator: Generator, batch_size: int, length: int, depth: int = 8) -> Texts:
    """Brackets 0 1 (open) and 2 3 (close), 4 announces that the next one closes; its kind is decided by the stack."""
    rows, marks = [], []
    moves = torch.rand(batch_size, length, generator=generator).tolist()
    kinds = randint(generator, 2, batch_size, length).tolist()
    for move, kind in zip(moves, kinds, strict=True):
        text, decided, stack = [], [], []
        for m, k in zip(move, kind, strict=True):
            if stack and (m < 0.5 or len(stack) == depth):
                text, decided = [*text, 4, 2 + stack.pop()], [*decided, False, True]
            else:
                text, decided = [*text, k], [*decided, False]
                stack.append(k)
        rows.append(text[:length])
        marks.append(decided[:length])
    return next_tokens(torch.tensor(rows), torch.tensor(marks))


S3, S5, FLIP = multiplication_table(3), multiplication_table(5), multiplication_table(2)
TASKS = {
    "recall": Task(partial(recall, n_keys=32), 64, 1 / 32, 2500),
    "noisy_recall": Task(partial(recall, n_keys=32, n_noise=16), 80, 1 / 32, 2500),
    "fuzzy_recall": Task(partial(recall, n_keys=16, width=2), 32, 1 / 16, 2500),
    "selective_copy": Task(partial(selective_copy, n_marked=16, n_symbols=14), 16, 1 / 14),
    "copy": Task(partial(copy, n_symbols=30), 31, 1 / 30),
    "parity": Task(partial(products, table=FLIP), 2, 1 / 2),
    "s3": Task(partial(products, table=S3), 6, 1 / 6),
    "s5": Task(partial(products, table=S5, drawn=adjacent_swaps(5)), 120, 1 / 120, 1500),
    "needle": Task(partial(needle, n_symbols=16), 33, 1 / 16),
    "induction": Task(partial(induction, n_symbols=256), 256, 1 / 256, 1500),
    "nested": Task(nested, 5, 1 / 2),
}
