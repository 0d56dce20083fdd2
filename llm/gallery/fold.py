"""Blocks that are alike are drawn once: 24 x one block, or 4 x (5 local, 1 global).

Of all ways to write a list of layers as some first layers, each drawn alone, and a pattern that repeats to the end,
`fold` takes the one that draws the fewest blocks.
"""

from itertools import groupby

from llm.gallery.diagram import Block, Stack


def fold(blocks: list[Block]) -> tuple[Stack, ...]:
    """The stacks of a model, from its first layer to its last."""
    best = tuple(Stack(1, (run,)) for run in runs(blocks))
    for start in range(len(blocks)):
        for period in range(2, (len(blocks) - start) // 2 + 1):
            tail = blocks[start:]
            if all(a == b for a, b in zip(tail, tail[period:], strict=False)):
                candidate = repeated(blocks[:start], tail, period)
                if drawn(candidate) < drawn(best):
                    best = candidate
                break
    return best


def repeated(first: list[Block], tail: list[Block], period: int) -> tuple[Stack, ...]:
    whole, left = divmod(len(tail), period)
    stacks = [Stack(1, (run,)) for run in runs(first)]
    stacks.append(Stack(whole, tuple(runs(tail[:period]))))
    rest = runs(tail[whole * period :]) if left else []
    return (*stacks, *(Stack(1, (run,)) for run in rest))


def runs(blocks: list[Block]) -> list[tuple[int, Block]]:
    return [(len(same), same[0]) for same in (list(group) for _, group in groupby(blocks))]


def drawn(stacks: tuple[Stack, ...]) -> int:
    return sum(len(stack.blocks) for stack in stacks)
