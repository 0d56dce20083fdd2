"""What one recurrent layer costs beside one of attention, and how both grow: `python benchmarks/recurrent.py`.

Training: forward and backward of the first mixer of each model (d_model 512), in its chunked form, on 8 texts of 512
tokens and on one of 8,192. All take turns in one process. `over attention` is the time over that of the baseline's
mixer in the same turn. `growth` is the time of a token in the long text over that in the short ones.

Writing: a step of one token after 100 and after 8,000 tokens, through the cache, and the bytes that the cache holds.
"""

import statistics
from dataclasses import dataclass, replace

import torch
import tyro
from measure import check_models, machine_line, markdown, now
from torch import Tensor, nn
from tqdm import tqdm

from llm.config import TrainConfig
from llm.console import console
from llm.models import MODELS
from llm.training.device import Machine, find_machine, keep_freed_memory

FAMILY = (
    "baseline", "linear_attention", "retnet", "gated_linear_attention", "delta_net", "gated_delta_net", "kimi_delta",
    "rwkv7", "mamba", "mamba2", "minimax", "recurrent_gemma", "lfm2",
)  # fmt: skip


@dataclass(frozen=True)
class Arguments:
    """Measure one layer of each recurrent model beside one of attention."""

    models: tuple[str, ...] = FAMILY
    """Which models; the first is what the others are compared with."""
    short: tuple[int, int] = (8, 512)
    """Texts and their length."""
    long: tuple[int, int] = (1, 8192)
    """The same for the long text."""
    written: tuple[int, int] = (100, 8000)
    """Tokens that are there before a step of writing."""
    turns: int = 5
    """Measurements of each, after one that warms up."""
    device: str = "auto"
    """auto, cuda, mps or cpu."""


def make_mixer(name: str, length: int, device: torch.device) -> nn.Module:
    """The first mixer of a model at its default size."""
    torch.manual_seed(0)
    Model = MODELS[name]
    return Model(replace(Model.Config(), max_seq_len=length, n_layers=1)).blocks[0].mixer.to(device)


def train(mixer: nn.Module, x: Tensor, machine: Machine) -> float:
    """Seconds of a forward and a backward pass."""
    start = now(machine.device)
    with machine.autocast():
        y = mixer(x, torch.arange(x.shape[1], device=x.device), None)
    (y[0] if isinstance(y, tuple) else y).sum().backward()  # RWKV-7 also returns its values, for later layers
    mixer.zero_grad()
    return now(machine.device) - start


@torch.inference_mode()
def write(mixer: nn.Module, n_tokens: int, machine: Machine, steps: int = 32) -> tuple[float, int]:
    """Seconds of a step after `n_tokens` tokens, and the bytes of the cache."""
    width = MODELS["baseline"].Config().d_model
    cache = mixer.make_cache(1, n_tokens + steps)
    x = torch.randn(1, n_tokens + steps, width, device=machine.device)
    positions = torch.arange(n_tokens + steps, device=machine.device)[None]
    mixer(x[:, :n_tokens], positions[:, :n_tokens], cache)
    start = now(machine.device)
    for t in range(n_tokens, n_tokens + steps):
        mixer(x[:, t : t + 1], positions[:, t : t + 1], cache)
    return (now(machine.device) - start) / steps, sum(t.nbytes for t in cache.values() if t.is_floating_point())


def measure(flags: Arguments, machine: Machine) -> dict[str, list[dict]]:
    """By model, what each turn found."""
    length = max(flags.long[1], flags.written[1] + 64)
    mixers = {name: make_mixer(name, length, machine.device) for name in flags.models}
    found: dict[str, list[dict]] = {name: [] for name in mixers}
    turns = [(turn, name) for turn in range(flags.turns + 1) for name in mixers]
    width = MODELS["baseline"].Config().d_model
    for turn, name in tqdm(turns, unit="measurement", dynamic_ncols=True):
        row = {}
        for shape in (flags.short, flags.long):
            row[shape] = train(mixers[name], torch.randn(*shape, width, device=machine.device), machine)
        for n_tokens in flags.written:
            row[n_tokens], row[f"cache {n_tokens}"] = write(mixers[name], n_tokens, machine)
        if turn:
            found[name].append(row)
    return found


def median(pairs: list[tuple[float, float]]) -> float:
    """The median ratio."""
    return statistics.median(one / other for one, other in pairs)


def training_row(turns: list[dict], attention: list[dict], flags: Arguments) -> list[str]:
    cells = []
    for shape in (flags.short, flags.long):
        over = median([(a[shape], b[shape]) for a, b in zip(turns, attention, strict=True)])
        cells += [f"{statistics.median(t[shape] for t in turns) * 1000:,.0f}", f"{over:.2f}"]
    tokens = [shape[0] * shape[1] for shape in (flags.long, flags.short)]
    growth = median([(t[flags.long] / tokens[0], t[flags.short] / tokens[1]) for t in turns])
    return [*cells, f"{growth:.2f}"]


def writing_row(turns: list[dict], flags: Arguments) -> list[str]:
    early, late = flags.written
    times = [f"{statistics.median(t[n] for t in turns) * 1e6:,.0f}" for n in flags.written]
    kilobytes = [f"{turns[0][f'cache {n}'] / 1000:,.0f}" for n in flags.written]
    return [*times, f"{median([(t[late], t[early]) for t in turns]):.2f}", *kilobytes]


@console()
def main(arguments: list[str] | None = None) -> None:
    """The command."""
    flags = tyro.cli(Arguments, args=arguments)
    check_models(flags.models, MODELS)
    machine = find_machine(TrainConfig(device=flags.device))
    keep_freed_memory(machine.device)
    found = measure(flags, machine)
    attention = found[flags.models[0]]
    (texts, length), (n_long, long) = flags.short, flags.long
    print(f"\n{machine_line(machine.device)}; {machine.precision}; {flags.turns} turns\n\nTraining:\n")
    shapes = (f"{texts} x {length:,}, ms", "over attention", f"{n_long} x {long:,}, ms", "over attention", "growth")
    print(markdown(("layer", *shapes), [[name, *training_row(t, attention, flags)] for name, t in found.items()]))
    early, late = flags.written
    steps = (f"after {early:,}, µs a step", f"after {late:,}", "ratio", f"cache after {early:,}, kB", f"after {late:,}")
    print("\nWriting:\n")
    print(markdown(("layer", *steps), [[name, *writing_row(t, flags)] for name, t in found.items()]))


if __name__ == "__main__":
    main()
