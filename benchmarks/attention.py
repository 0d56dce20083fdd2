"""What each kind of attention costs beside full attention: `python benchmarks/attention.py`.

Attention alone, forward and backward, on one text of `length` tokens with 4 heads of 32. All ways take turns in one
process. A ratio is that to the fused causal kernel in the same turn; the medians are printed. `shown` is the share of
the causal mask's scores that a mask shows.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
import tyro
from measure import machine_line, markdown, now
from torch import Tensor
from tqdm import trange

from llm.console import console
from llm.modules import masks
from llm.modules.attention.big_bird import BigBird
from llm.modules.cache import Places
from llm.modules.kernels.attention import attend
from llm.modules.position_encoding.alibi import ALiBi
from llm.modules.position_encoding.relative import DistanceScores
from llm.modules.position_encoding.t5_bias import T5Bias

HEADS, WIDTH = 4, 32


@dataclass(frozen=True)
class Arguments:
    """Measure attention under masks and with biases, caps and sinks."""

    length: int = 8192
    """Tokens in the text."""
    turns: int = 5
    """Measurements of each, after one that warms up."""
    dtype: str = "bfloat16"
    """bfloat16 or float32."""
    threads: int = 2
    """Threads on a CPU."""


def contestants(length: int, draw: Callable[..., Tensor]) -> dict[str, dict]:
    """Name -> the options of `attend`."""
    return {
        "full attention": {},
        "window of 128": {"mask": masks.Window(128)},
        "StreamingLLM, 4 and 128": {"mask": masks.FirstAndWindow(4, 128)},
        "blocks of 128": {"mask": masks.OwnBlock(128)},
        "summaries, 4 of 128": {"mask": masks.Summaries(128, 4)},
        "strided, 128": {"mask": masks.Strided(128)},
        "dilated, 128 by 4": {"mask": masks.Dilated(128, 4)},
        "BigBird, blocks of 64": {"mask": BigBird(block_size=64, n_global=2, n_window=3, n_random=3)},
        "ALiBi": {"bias": ALiBi(HEADS)},
        "sinks": {"sinks": draw(HEADS)},
        "soft-capping": {"soft_cap": 50.0},
        "T5's bias": {"bias": T5Bias(HEADS)},
        "Transformer-XL": {"bias": DistanceScores(draw(1, HEADS, length, WIDTH), draw(HEADS, WIDTH, length), 0.1)},
    }


@console()
def main(arguments: list[str] | None = None) -> None:
    """The command."""
    flags = tyro.cli(Arguments, args=arguments)
    torch.set_num_threads(flags.threads)
    device, dtype, n = torch.device("cpu"), getattr(torch, flags.dtype), flags.length
    positions = torch.arange(n)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype).requires_grad_()

    q, k, v = (draw(1, HEADS, n, WIDTH) for _ in range(3))
    ways = contestants(n, draw)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in trange(flags.turns + 1, unit="turn"):
        for name, options in ways.items():
            start = now(device)
            attend(q, k, v, Places(positions, positions, whole_text=True), **options).sum().backward()
            if turn:
                seconds[name].append(now(device) - start)
    rows = []
    for name, options in ways.items():
        ratios = [one / full for one, full in zip(seconds[name], seconds["full attention"], strict=True)]
        shown = masks.mean_keys(options["mask"], n) / (n / 2) if "mask" in options else 1
        rows.append(
            (
                name,
                f"{statistics.median(seconds[name]) * 1000:,.0f}",
                f"{statistics.median(ratios):.3f}",
                f"{shown:.3f}",
            )
        )
    print(f"\n{machine_line(device)}; T = {n:,}, {flags.dtype}\n")
    print(markdown(("attention", "ms", "over full attention", "shown"), rows))


if __name__ == "__main__":
    main()
