"""What a step of each model costs beside the baseline's: `python benchmarks/models.py`.

Each model lives in a process of its own, so its peak memory is its own, and takes turns with the baseline, so that what
else the machine does falls on both alike; ratios are medians over the turns. A step is forward, backward, clipping and
AdamW on one micro-batch of random tokens; decoding is greedy, through the cache where there is one, at batch 1 after a
prompt of 32.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
import tyro
from measure import Contestant, answer, check_models, machine_line, markdown, median, now, peak_memory, ratio
from torch import nn
from tqdm import tqdm

from llm.analysis.accounting import describe, units
from llm.config import TrainConfig
from llm.console import console
from llm.generate.sampling import greedy
from llm.models import MODELS
from llm.models.transformer import Transformer
from llm.training.device import find_machine, keep_freed_memory
from llm.training.optim import make_optimizer


@dataclass(frozen=True)
class Arguments:
    """Measure a training step and a decoding step of every model beside the baseline's, in turn."""

    models: tuple[str, ...] = tuple(MODELS)
    """Which models."""
    small: bool = False
    """d_model 128 and context 256 instead of each model's default size."""
    batch: int = 8
    """Windows in a step."""
    turns: int = 5
    """How often each pair is measured, after one turn that warms up."""
    warm_up: int = 12
    """Steps before that: while experts meet new numbers of rows, a CPU makes new kernels for them."""
    new_tokens: int = 32
    """Tokens decoded in a turn."""
    device: str = "auto"
    """auto, cuda, mps or cpu."""
    compile: bool = False
    """Compile the loss."""


def compete(name: str, flags: Arguments) -> None:
    """The child: one model. Its figures are counted by formula once, and measured at each turn."""
    machine = find_machine(TrainConfig(device=flags.device))
    device = machine.device
    keep_freed_memory(device)
    Model = MODELS[name]
    torch.manual_seed(0)
    model: Transformer = Model(Model.Config(**Model.Config.small if flags.small else {})).to(device)
    optimizer = make_optimizer(model, TrainConfig())
    loss = torch.compile(model.loss) if flags.compile else model.loss
    context = model.config.max_seq_len
    tokens = torch.randint(model.config.vocab_size, (flags.batch, context + 1), device=device)
    costs = describe(model)
    counted = {"flops": costs["training_flops_per_token"], "cache": costs["cache_bytes_per_token"]}
    counted["tokens"] = flags.batch * context

    def step() -> float:
        start = now(device)
        with machine.autocast():
            value, _ = loss(tokens)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        model.after_step()
        return now(device) - start

    def decode() -> float:
        model.eval()
        start = now(device)
        steps = model.generate(tokens[:1, :32], flags.new_tokens + 1, greedy)
        next(steps)  # the prompt, and in models that see later tokens the whole text
        if model.causal:
            start = now(device)
        for _ in steps:
            pass
        seconds = (now(device) - start) / (flags.new_tokens + (not model.causal))
        model.train()
        return seconds

    for _ in range(flags.warm_up):
        step()
    answer(lambda: counted | {"step": step(), "memory": peak_memory(device), "decode": decode()})


def rows(flags: Arguments) -> Iterator[list[str]]:
    """A row for each model, as soon as it is measured."""
    child = json.dumps(asdict(flags))
    baseline = Contestant([__file__, "--compete", "baseline", child])
    for name in tqdm(flags.models, unit="model", dynamic_ncols=True):
        model = Contestant([__file__, "--compete", name, child])
        pairs = [(model.measure(), baseline.measure()) for _ in range(flags.turns + 1)][1:]
        model.end()
        ours, base = zip(*pairs, strict=True)
        slower = ratio(ours, base, "step")
        yield [
            name,
            f"{median(ours, 'step') * 1000:,.0f}",
            f"{slower:.2f}",
            f"{slower * base[0]['flops'] / ours[0]['flops']:.2f}",
            f"{median([{'rate': turn['tokens'] / turn['step']} for turn in ours], 'rate'):,.0f}",
            f"{ours[-1]['memory'] / 2**20:,.0f}",
            f"{1 / median(ours, 'decode'):,.0f}",
            f"{ratio(base, ours, 'decode'):.2f}",
            f"{units(ours[0]['cache'])}B",
        ]
    baseline.end()


@console()
def main(arguments: list[str] | None = None) -> None:
    """The command."""
    flags = tyro.cli(Arguments, args=arguments)
    check_models(flags.models, MODELS)
    machine = find_machine(TrainConfig(device=flags.device))
    table = list(rows(flags))
    size = "small size" if flags.small else "default size"
    print(f"\n{machine_line(machine.device)}; {machine.precision}, {size}, {flags.batch} windows a step\n")
    columns = ("model", "ms a step", "over the baseline", "the same by FLOPs", "tokens / s", "memory, MiB")
    print(markdown((*columns, "decoded / s", "over the baseline", "cache / token"), table))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--compete"]:
        compete(sys.argv[2], Arguments(**json.loads(sys.argv[3])))
    else:
        main()
