"""Train on short texts, then read texts up to eight times as long: how the loss changes with the length of the text.

    python train_scripts/extend_context.py                               # an hour or two on two cores
    python train_scripts/extend_context.py --quick                       # ten minutes: three models, fewer tokens
    python train_scripts/extend_context.py --models rope --scalings YaRN

Models differ in what they do at positions that training never had. A RoPE model is also read with each scaling of
llm/modules/position_encoding/context_extension.py, as it is and after a short training on long texts; and through a
window as long as the texts of training, with and without the first four tokens (StreamingLLM, arXiv 2309.17453).
The last `short` tokens of a text are scored with ever more of the text before them, so all lengths score the same
tokens.

Each result is a line of JSON in `--out`; what is there is not computed again. Table and picture are written beside it.
Blog: Position encoding, longer context.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import tyro
from torch import nn
from tqdm import tqdm

from llm.analysis.length import loss_as_texts_grow, scalings, set_mask, set_scaling, windows_of
from llm.analysis.results import find, origin, read_runs
from llm.analysis.studies import mean_and_error, opened, side_by_side
from llm.config import TrainConfig
from llm.console import console
from llm.data.files import Data
from llm.data.windows import eval_windows, step_batches
from llm.files import replacing, write_atomically
from llm.generate.load import load_run
from llm.models import MODELS
from llm.models.transformer import Transformer
from llm.training.curve import new_figure, try_to_draw
from llm.training.device import find_machine
from llm.training.loop import train
from llm.training.optim import make_optimizer
from llm.training.provenance import git_commit

POSITIONS = ("baseline", "learned_position", "relative_position", "t5_bias", "rope", "alibi", "nope")
WINDOWS = ("sliding_window", "sparse", "streaming", "big_bird", "native_sparse", "block_mixture")
STATES = (
    *("linear_attention", "retnet", "gated_linear_attention", "delta_net", "gated_delta_net", "kimi_delta", "mamba"),
    *("mamba2", "rwkv7", "hybrid", "parallel_hybrid"),
)
SCALINGS = tuple(scalings(1, 2))
TUNING = 20  # a twentieth of the training
IDENTITY = ("model", "seed", "short", "times", "steps", "rate", "windows", "data", "scaling", "tuned")


@dataclass(frozen=True)
class Arguments:
    """Train models on short windows and evaluate them on long ones."""

    models: tuple[str, ...] = (*POSITIONS, *WINDOWS, *STATES)
    """Names of causal models of MODELS."""
    scalings: tuple[str, ...] = SCALINGS
    """Ways to extend the context of `rope`, which is read with and without more training."""
    short: int = 64
    """Tokens in a window of training."""
    times: int = 8
    """Texts of evaluation are up to so many times as long."""
    steps: int = 512
    """Optimiser steps of 512 tokens."""
    rate: float = 8e-3
    """Learning rate."""
    seeds: int = 3
    """Runs of each model."""
    windows: int = 64
    """Windows of evaluation."""
    data: Path = Path("data/stories")
    """Folder that pre_tokenize.py wrote."""
    processes: int = 2
    """Models side by side, each on one core."""
    out: Path = Path("docs/results/context.jsonl")
    """A line of JSON for each model, scaling and seed."""
    quick: bool = False
    """rope, alibi and gated_delta_net, one seed, a quarter of the tokens, and rows of their own in runs/."""
    report: bool = False
    """Train nothing; write table and picture from the rows of --out."""

    def __post_init__(self):
        if self.short < 2 or self.times < 2:
            raise ValueError(f"short = {self.short} and times = {self.times} must be 2 at least (--short, --times)")
        for kind, names, known in (
            ("causal model", self.models, tuple(name for name, Model in MODELS.items() if Model.causal)),
            ("scaling", self.scalings, SCALINGS),
        ):
            if unknown := [name for name in names if name not in known]:
                raise ValueError(f"no {kind} is called {', '.join(unknown)}; there are {', '.join(known)}")

    @property
    def long(self) -> int:
        return self.short * self.times


QUICK = Arguments(
    models=("rope", "alibi", "gated_delta_net"),
    seeds=1,
    steps=Arguments.steps // 4,
    out=Path("runs/context.jsonl"),
)


def trained_model(name: str, seed: int, a: Arguments, data: Data) -> Transformer:
    """The model after training on short windows: from its run directory where it is finished."""
    Config = MODELS[name].Config
    sizes = {"max_seq_len": a.short, "vocab_size": data.vocab_size, "initialization": "truncated_normal"}
    budget = dict(steps=a.steps, tokens_per_step=512, warmup_steps=a.steps // 10, max_lr=a.rate, min_lr=a.rate / 10)
    machine = dict(wandb="off", illustrate=False, eval_every=a.steps, save_every=a.steps)
    machine |= dict(precision="fp32", compile="off")  # compiling takes longer than the run
    out = Path("runs/context") / f"{name}-{a.short}-{a.steps}-{a.rate:g}-{seed}"
    config = TrainConfig(data=a.data, out=out, seed=seed, **budget, **machine)
    train(MODELS[name], Config(**{**Config.small, **sizes}), config, data)
    return load_run(out, find_machine(config, 0).device, max_seq_len=a.long if name != "learned_position" else None)[0]


def tune(model: Transformer, seed: int, a: Arguments, data: Data) -> None:
    """Train a little on long windows, at a tenth of the learning rate."""
    steps = max(a.steps // TUNING, 1)
    optimizer = make_optimizer(model, TrainConfig(max_lr=a.rate / 10, min_lr=0))
    n_windows = max(1024 // a.long, 1)
    batches = step_batches(
        data.train,
        seq_len=a.long,
        micro_batch_size=n_windows,
        windows_per_step=n_windows,
        seed=seed,
        first_step=0,
        last_step=steps,
        to_device=lambda batch: batch.to(model.tok_embed.weight.device),
    )
    model.train()
    for ((_, batch),) in batches:
        model.loss(batch)[0].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def results(name: str, seed: int, a: Arguments, data: Data) -> Iterator[dict]:
    """A line for the model as it is; RoPE has one for each window, and two for each scaling."""
    windows, ways = eval_windows(data.eval, a.long, a.windows), scalings(a.short, a.long)
    model = trained_model(name, seed, a, data)
    yield {"scaling": None, "tuned": False, "loss": loss_as_texts_grow(model, windows, a.short)}
    for scaling in a.scalings if name == "rope" else ():
        set_scaling(model, ways[scaling])
        yield {"scaling": scaling, "tuned": False, "loss": loss_as_texts_grow(model, windows, a.short)}
    set_scaling(model, None)
    for window, mask in windows_of(a.short).items() if name == "rope" else ():
        set_mask(model, mask)
        yield {"scaling": window, "tuned": False, "loss": loss_as_texts_grow(model, windows, a.short)}
    for scaling in (None, *a.scalings) if name == "rope" else ():
        tuned = trained_model(name, seed, a, data)
        set_scaling(tuned, scaling and ways[scaling])
        tune(tuned, seed, a, data)
        yield {"scaling": scaling, "tuned": True, "loss": loss_as_texts_grow(tuned, windows, a.short)}


def key(place: tuple[str, int], a: Arguments, data: Data) -> dict:
    """What identifies the lines of a model and a seed."""
    sizes = dict(short=a.short, times=a.times, steps=a.steps, rate=a.rate, windows=a.windows)
    return {"model": place[0], "seed": place[1], **sizes, "data": data.train_sha256[:12]}


def lines_of(a: Arguments, place: tuple[str, int]) -> list[dict]:
    """The lines of a model and a seed, after training it in this process."""
    data = opened(a.data)
    with open(os.devnull, "w") as log, redirect_stdout(log), redirect_stderr(log):
        return [
            {**key(place, a, data), **line, "commit": git_commit(), "device": "cpu"}
            for line in results(*place, a, data)
        ]


def compute(a: Arguments) -> None:
    """Write the lines of the models and seeds that have none."""
    data, there = opened(a.data), read_runs(a.out)
    a.out.parent.mkdir(parents=True, exist_ok=True)

    def done(place: tuple[str, int]) -> bool:
        found = {(row["scaling"], row["tuned"]) for row in find(there, **key(place, a, data))}
        return found >= {(None, False), *((scaling, True) for scaling in a.scalings if place[0] == "rope")}

    todo = [place for place in product(a.models, range(a.seeds)) if not done(place)]
    todo.sort(key=lambda place: place[1])  # all models with the first seed before the second seed begins
    for _, lines in tqdm(side_by_side(partial(lines_of, a), todo, a.processes), "models", len(todo), disable=not todo):
        new = [line for line in lines if not find(there, **{name: line[name] for name in IDENTITY})]
        with open(a.out, "a", encoding="utf-8") as file:  # all lines of a model at once, or none
            file.write("".join(json.dumps(line) + "\n" for line in new))


Losses = dict[str, list[tuple[float, float] | None]]
"""For each way of reading, mean and standard error of the loss at each length; None where it has no positions."""


def losses_by_way(rows: list[dict]) -> Losses:
    """The rows' losses, averaged over seeds."""
    ways: dict[str, list[list[float | None]]] = {}
    for row in rows:
        name = row["model"] + (f", {row['scaling']}" if row["scaling"] else "") + (", tuned" if row["tuned"] else "")
        ways.setdefault(name, []).append(row["loss"])
    return {
        name: [None if None in stretch else mean_and_error(list(stretch)) for stretch in zip(*seeds, strict=True)]
        for name, seeds in ways.items()
    }


def table(losses: Losses, short: int) -> str:
    """A Markdown table of the mean loss of the last `short` tokens, by the length of the text."""
    n = len(next(iter(losses.values())))
    lines = ["| text of | " + " | ".join(f"{(i + 1) * short}" for i in range(n)) + " |"]
    lines += ["|---" * (n + 1) + "|"]
    for name, stretches in losses.items():
        cells = ["none" if s is None else f"{s[0]:.3f}" + ("" if s[1] != s[1] else f" ± {s[1]:.3f}") for s in stretches]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(losses: Losses, path: Path, short: int) -> None:
    """Three panels: position schemes, windows and states, scalings of RoPE. RoPE is black in each."""
    scalings = [name for name in losses if "," in name]
    positions = [name for name in losses if name in POSITIONS]
    others = [name for name in losses if name not in (*scalings, *positions)]
    panels = [names for names in (positions, others, scalings) if names]
    figure = new_figure(figsize=(5.2 * len(panels), 5.6), dpi=120, layout="constrained")
    for names, axes in zip(panels, figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], strict=True):
        for number, name in enumerate(dict.fromkeys(("rope", *names))):
            points = [(i + 1, s[0]) for i, s in enumerate(losses.get(name, ())) if s]
            dashed = "tuned" in name or number > 10  # the colours begin anew after ten lines
            style = {"color": "black", "linewidth": 2} if name == "rope" else {"linestyle": "--" if dashed else "-"}
            axes.plot(*zip(*points, strict=True), marker=".", label=name, **style)
        axes.set_xlabel(f"text length, times the {short} tokens of training")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(
            frameon=False, fontsize=7, ncols=2, handlelength=3, loc="upper center", bbox_to_anchor=(0.5, -0.13)
        )  # below
    figure.axes[0].set_ylabel(f"eval loss of the last {short} tokens, nats per token")
    with replacing(path) as picture:
        figure.savefig(picture, format="png")


@console()
def main(arguments: list[str] | None = None) -> None:
    a = tyro.cli(Arguments, args=arguments)
    if a.quick:
        a = tyro.cli(Arguments, args=arguments, default=QUICK)
    if not a.report:
        compute(a)
    rows = find(read_runs(a.out), short=a.short, times=a.times, steps=a.steps, rate=a.rate, windows=a.windows)
    if not rows:
        raise ValueError(f"{a.out} has no rows of {a.steps} steps with --short {a.short}: run without --report first")
    losses = losses_by_way(rows)
    text = table(losses, a.short) + "\n" + origin(rows) + f" {512 * a.steps:,} tokens of training each.\n"
    write_atomically(a.out.with_suffix(".md"), text.encode())
    print(f"\n{text}\nwritten to {a.out.with_suffix('.md')}")
    try_to_draw(draw, losses, a.out.with_suffix(".png"), a.short)


if __name__ == "__main__":
    try:
        main()
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
