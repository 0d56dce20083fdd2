"""What FlashAttention 1 to 3 read, write and compute beside standard attention: `python benchmarks/flash.py`.

Nothing is timed. The versions run in Python and count the numbers that they load from slow memory and store to it
(llm/modules/attention/slow_memory.py). FLOPs of products are counted by torch. The others
(softmax, rescaling, sums) are counted here: one for each number that an operation gives, or takes in where it sums.
With M = 4 d^2 all tiles have d queries and d keys. docs/speed.md has the table.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import tyro
from measure import markdown
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from llm.console import console
from llm.modules.attention import flash, flash1, flash3
from llm.modules.attention.slow_memory import SlowMemory, standard_attention, standard_backward, tile_sizes
from llm.modules.cache import Places
from llm.modules.masks import everything


@dataclass(frozen=True)
class Arguments:
    """Count reads, writes and FLOPs of one head without a mask."""

    length: int = 1024
    """Queries and keys, N."""
    width: int = 64
    """Channels of a head, d."""
    fast_memory: int = 16_384
    """Numbers that fit into fast memory, M."""


class OtherFlops(TorchDispatchMode):
    """Counts one FLOP for each number that an elementwise operation gives, and that a sum or maximum takes in."""

    total = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result, name = function(*arguments, **(named or {})), function.overloadpacket.__name__
        if name in ("sum", "amax"):
            self.total += arguments[0].numel()
        elif name == "_softmax":
            self.total += 5 * result.numel()  # maximum, difference, exponential, sum, quotient
        elif torch.Tag.pointwise in function.tags and name not in ("fill_", "copy_", "_to_copy"):
            self.total += result.numel()
        return result


def counted(run: Callable[..., Any], *arguments: Any, memory: SlowMemory) -> tuple[Any, list[int]]:
    """The result of run(*arguments), and its reads, writes, FLOPs of products and other FLOPs."""
    reads, writes = memory.reads, memory.writes
    with FlopCounterMode(display=False) as products, OtherFlops() as others:
        result = run(*arguments)
    return result, [memory.reads - reads, memory.writes - writes, products.get_total_flops(), others.total]


def count(length: int, width: int, fast_memory: int) -> dict[str, list[int]]:
    """Name of a pass -> reads, writes, FLOPs of products, other FLOPs."""
    q, k, v, d_out = torch.randn(4, 1, 1, length, width, generator=torch.Generator().manual_seed(0))
    positions, (many, few), counts = torch.arange(length), tile_sizes(fast_memory, width), {}

    memory, places = SlowMemory(), Places(positions, positions, whole_text=True)
    (_, p), counts["standard, forward"] = counted(standard_attention, q, k, v, memory, memory=memory)
    _, counts["standard, backward"] = counted(standard_backward, q, k, v, p, d_out, memory, memory=memory)
    for name, version, q_tile, k_tile in (
        ("FlashAttention-1", flash1, few, many),
        ("FlashAttention-2", flash, many, few),
    ):
        forward = flash.Tiling(places, everything, width**-0.5, q_tile, k_tile, memory)
        backward = replace(forward, q_tile=few, k_tile=many)  # the outer loop is over keys in both
        kept, counts[f"{name}, forward"] = counted(version.forward_tiles, q, k, v, forward, memory=memory)
        _, counts[f"{name}, backward"] = counted(version.backward_tiles, q, k, v, *kept, d_out, backward, memory=memory)
    _, counts["FlashAttention-3, forward"] = counted(flash3.forward_tiles, q, k, v, forward, memory=memory)
    return counts


COLUMNS = ("", "reads", "writes", "both / (4 N d + 4 N^2)", "both / (N^2 d^2 / M)", "FLOPs of products", "other FLOPs")


def table(length: int, width: int, fast_memory: int) -> str:
    """As Markdown, counts in thousands."""
    standard, flashed = 4 * length * width + 4 * length**2, length**2 * width**2 / fast_memory
    rows = []
    for name, (reads, writes, products, others) in count(length, width, fast_memory).items():
        reads_k, writes_k, products_k, others_k = (f"{n / 1000:,.0f}" for n in (reads, writes, products, others))
        ratios = f"{(reads + writes) / standard:.2f}", f"{(reads + writes) / flashed:.1f}"
        rows.append((name, reads_k, writes_k, *ratios, products_k, others_k))
    return markdown(COLUMNS, rows)


@console()
def main(arguments: list[str] | None = None) -> None:
    """The command."""
    flags = tyro.cli(Arguments, args=arguments)
    print(f"N = {flags.length:,} queries and keys, d = {flags.width}, M = {flags.fast_memory:,}; in thousands\n")
    print(table(flags.length, flags.width, flags.fast_memory))


if __name__ == "__main__":
    main()
