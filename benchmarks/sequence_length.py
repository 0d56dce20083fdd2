"""How time and memory of attention grow with the length of the text: `python benchmarks/sequence_length.py`.

One text of T tokens, forward and backward, in the small model (d_model 128, 4 layers, 4 heads). Each variant and length
is a process of its own, which may hold a limited amount of memory; what does not fit is left out. The embedding and
head cost the same in all. Prints a table and draws it.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import tyro
from measure import Contestant, answer, check_models, machine_line, markdown, median, now, peak_memory
from torch import Tensor
from tqdm import tqdm

from llm.config import TrainConfig
from llm.console import console
from llm.models import MODELS
from llm.modules.attention import multi_head
from llm.modules.attention.core import explicit_attention
from llm.modules.cache import Places
from llm.modules.masks import Mask, visibility
from llm.training.curve import new_figure, try_to_draw
from llm.training.device import find_machine

ATTENTION = (
    "baseline", "multi_query", "grouped_query", "sliding_window", "sparse", "big_bird", "streaming", "attention_sink",
    "latent", "alibi", "t5_bias", "relative_position", "soft_capping", "flash_attention",
)  # fmt: skip
CHOSEN = ("native_sparse", "block_mixture", "deepseek_v3_2")
RECURRENT = (
    "linear_attention", "retnet", "gated_linear_attention", "delta_net", "gated_delta_net", "kimi_delta", "rwkv7",
    "mamba", "mamba2", "hybrid", "parallel_hybrid",
)  # fmt: skip


@dataclass(frozen=True)
class Arguments:
    """Measure forward and backward of attention variants and recurrent models on longer and longer texts."""

    models: tuple[str, ...] = ("explicit", *ATTENTION, *CHOSEN, *RECURRENT)
    """Which variants; `explicit` is the baseline with the equation instead of the fused kernel."""
    lengths: tuple[int, ...] = (256, 512, 1024, 2048, 4096, 8192)
    """Tokens in the text."""
    turns: int = 3
    """Measurements of each, after one that warms up."""
    limit_gib: float = 16.0
    """Memory that a process may hold on a CPU."""
    device: str = "auto"
    """auto, cuda, mps or cpu."""
    picture: Path = Path("docs/sequence_length.png")
    """Where the picture goes."""


def compete(name: str, length: int, flags: Arguments) -> None:
    """The child: one variant at one length. Memory is what the step added to what the process held before."""
    machine = find_machine(TrainConfig(device=flags.device))
    device = machine.device
    if device.type == "cpu":
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (int(flags.limit_gib * 2**30),) * 2)
    if name == "explicit":
        multi_head.attend = explicit
    Model = MODELS["baseline" if name == "explicit" else name]
    torch.manual_seed(0)
    model = Model(replace(Model.Config(**Model.Config.small), max_seq_len=length)).to(device)
    tokens = torch.randint(model.config.vocab_size, (1, length + 1), device=device)
    before = peak_memory(device)

    def turn() -> dict:
        start = now(device)
        with machine.autocast():
            loss, _ = model.loss(tokens)
        loss.backward()
        model.zero_grad()
        return {"seconds": now(device) - start, "memory": peak_memory(device) - before}

    answer(turn)


def explicit(q: Tensor, k: Tensor, v: Tensor, places: Places, mask: Mask, **rest: object) -> Tensor:
    """Attention as the equation says it, with T x T scores."""
    return explicit_attention(q, k, v, visibility(mask, places.q, places.k))


def measure(name: str, length: int, flags: Arguments) -> dict | None:
    """Medians of a variant at a length; None where it does not fit."""
    child = Contestant([__file__, "--compete", json.dumps([name, length, asdict(replace(flags, picture=""))])],
                       stderr=subprocess.DEVNULL)  # fmt: skip
    try:
        turns = [child.measure() for _ in range(flags.turns + 1)][1:]
    except (RuntimeError, BrokenPipeError):
        return None
    child.end()
    return {"seconds": median(turns, "seconds"), "memory": median(turns, "memory")}


def draw(results: dict[str, dict[int, dict]], path: Path) -> None:
    """Two panels on logarithmic axes: time and memory against length."""
    figure = new_figure(figsize=(13, 5.5), layout="constrained")
    from matplotlib import colormaps

    panels, colours = figure.subplots(1, 2), colormaps["tab20"].colors
    for panel, what, factor, label in zip(
        panels,
        ("seconds", "memory"),
        (1, 2**-20),
        ("seconds, forward and backward", "MiB that the step adds"),
        strict=True,
    ):
        for number, (name, by_length) in enumerate(results.items()):
            points = [(length, found[what] * factor) for length, found in by_length.items() if found]
            line = (
                dict(color="black", linewidth=2.5)
                if name == "baseline"
                else dict(color=colours[number % 20], linestyle="-" if number < 20 else "--")
            )
            panel.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name, **line)
        panel.set(xscale="log", yscale="log", xlabel="tokens in the text", ylabel=label)
        panel.set_xticks(lengths := sorted({n for r in results.values() for n in r}), [f"{n:,}" for n in lengths])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def table(results: dict[str, dict[int, dict]], what: str, show: Callable[[float], str]) -> str:
    """One row a variant, one column a length."""
    lengths = list(next(iter(results.values())))
    cells = ([show(found[n][what]) if found[n] else "too large" for n in lengths] for found in results.values())
    return markdown(("model", *map(str, lengths)), [[name, *row] for name, row in zip(results, cells, strict=True)])


@console()
def main(arguments: list[str] | None = None) -> None:
    """The command."""
    flags = tyro.cli(Arguments, args=arguments)
    check_models(flags.models, ("explicit", *MODELS))
    machine = find_machine(TrainConfig(device=flags.device))
    pairs = tqdm([(n, length) for length in flags.lengths for n in flags.models], unit="variant", dynamic_ncols=True)
    results: dict[str, dict[int, dict]] = {name: {} for name in flags.models}
    for name, length in pairs:
        pairs.set_postfix_str(f"{name}, {length}")
        results[name][length] = measure(name, length, flags)
    print(f"\n{machine_line(machine.device)}; {machine.precision}\n\nMilliseconds, forward and backward:\n")
    print(table(results, "seconds", lambda s: f"{s * 1000:,.0f}"))
    print("\nMiB that the step adds:\n")
    print(table(results, "memory", lambda n: f"{n / 2**20:,.0f}"))
    try_to_draw(draw, results, flags.picture)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--compete"]:
        name, length, settings = json.loads(sys.argv[2])
        compete(name, length, Arguments(**settings))
    else:
        main()
