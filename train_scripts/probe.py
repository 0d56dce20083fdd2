"""Train models on small synthetic tasks that tell architectures apart, and show what each can do.

    python train_scripts/probe.py --models baseline rope --tasks recall parity
    python train_scripts/probe.py --models delta_net "delta_net, max_beta = 2" --tasks parity
    python train_scripts/probe.py --models rope "rope, window = 64" --tasks recall needle
    python train_scripts/probe.py --quick                                     # ten minutes
    python train_scripts/probe.py --report                                    # table and picture of what is there

Each run is a line of JSON in `--out`; what is there is not run again, so an interrupted command goes on where it was.
A model is trained at one learning rate after the other until it solves the task (99 %); more seeds follow at its best
rate, and other rates where these fail. Table and heat map show the best one. The tasks: llm/analysis/probes.py.

Muon trains, since with AdamW attention needs about ten times as many steps to find the pairs of `recall`.
"""

import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from llm.analysis.length import set_mask
from llm.analysis.probes import TASKS, UNDECIDED, Task, draw
from llm.analysis.results import SOLVED, at_best_probe_rate, find, origin, probe_accuracy, read_runs
from llm.analysis.studies import side_by_side
from llm.config import TrainConfig
from llm.console import console
from llm.files import replacing, write_atomically
from llm.models import MODELS
from llm.modules.masks import Window
from llm.training.curve import new_figure, try_to_draw
from llm.training.device import find_machine
from llm.training.optim import learning_rate, make_optimizer
from llm.training.provenance import git_commit

DISTANCES = (1, 4, 16, 32, 64, 128, 192, 250)  # between the fact of `needle` and its question, in tokens
LSTM = "lstm"  # no language model of ours, as a control: it keeps a state through time
MODEL_NAMES = (*(name for name, Model in MODELS.items() if Model.causal), LSTM)


@dataclass(frozen=True)
class Arguments:
    """Train each model on each task, and write accuracy at the trained length and beyond."""

    models: tuple[str, ...] = (
        *("baseline", "rope", "alibi", "nope", "sliding_window", "native_sparse", "linear_attention", "retnet"),
        *("gated_linear_attention", "delta_net", "delta_net, max_beta = 2", "gated_delta_net", "kimi_delta", "mamba"),
        *("mamba2", "rwkv7", "hybrid", "parallel_hybrid", LSTM),
    )
    """Causal models of MODELS, or lstm. Settings may follow the name: "delta_net, max_beta = 2". `window` gives every
    layer of attention a window of so many tokens: "rope, window = 64"."""
    tasks: tuple[str, ...] = tuple(TASKS)
    """Names of llm/analysis/probes.py."""
    rates: tuple[float, ...] = (1e-2, 5e-3, 2e-2)
    """Learning rates, in the order in which they are tried; each model is shown at its best one."""
    seeds: int = 1
    """Runs of each model and task at its best rate."""
    steps: int | None = None
    """Optimiser steps; where it is not given, as many as the task needs."""
    batch_size: int = 32
    """Texts in a step; every step has new ones."""
    length: int = 64
    """Tokens of a text in training."""
    longer: tuple[int, ...] = (1, 2, 4)
    """Multiples of that length at which accuracy is measured."""
    d_model: int = 64
    """Width of the models."""
    n_layers: int = 2
    """Blocks of the models."""
    processes: int = 2
    """Runs side by side, each on one core."""
    device: str = "cpu"
    """cpu, or cuda."""
    out: Path = Path("docs/results/probes.jsonl")
    """A line of JSON for each run; table and picture are written beside it."""
    quick: bool = False
    """Five models, four tasks, one rate: ten minutes."""
    report: bool = False
    """Train nothing; write table and picture from the rows of --out."""


QUICK = Arguments(
    models=("rope", "sliding_window", "mamba2", "gated_delta_net", LSTM),
    tasks=("copy", "selective_copy", "parity", "nested"),
    rates=(1e-2,),
    out=Path("runs/probes.jsonl"),
)


class Lstm(nn.Module):
    """Embedding, LSTM and head, with the methods of a model that this script calls."""

    def __init__(self, vocab_size: int, d_model: int, n_layers: int):
        super().__init__()
        self.blocks = nn.ModuleList()  # none of the kind that Muon looks for
        self.embed, self.head = nn.Embedding(vocab_size, d_model), nn.Linear(d_model, vocab_size)
        self.lstm = nn.LSTM(d_model, d_model, n_layers, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.lstm(self.embed(tokens))[0])

    def pop_losses(self) -> list[Tensor]:
        return []

    def after_step(self) -> None:
        pass


def make_model(name: str, vocab_size: int, a: Arguments) -> nn.Module:
    """A model at the size of the probes, with a context for the longest texts."""
    name, settings = name_and_settings(name)
    if name == LSTM:
        if settings:
            raise ValueError(f"{LSTM} has no settings, and was given {', '.join(settings)} (--models)")
        return Lstm(vocab_size, a.d_model, a.n_layers)
    window = settings.pop("window", None)
    Config = MODELS[name].Config
    widths = {key: Config.small[key] * a.d_model // Config.small["d_model"] for key in ("d_ff",) if key in Config.small}
    context = {"max_seq_len": max(a.longer) * a.length, "vocab_size": vocab_size}
    sizes = {"d_model": a.d_model, "n_layers": a.n_layers, "initialization": "truncated_normal"}
    settings = {**Config.small, **widths, **context, **sizes, **settings}
    pattern = settings.get("layer_types", getattr(Config, "layer_types", None))
    if pattern:  # of "three recurrent layers, then attention" two layers have one of each
        settings["layer_types"] = tuple(pattern[-settings["n_layers"] :])
    model = MODELS[name](Config(**settings))
    if window is not None:
        set_mask(model, Window(window))
    return model


def name_and_settings(text: str) -> tuple[str, dict[str, Any]]:
    """ "delta_net, max_beta = 2" -> ("delta_net", {"max_beta": 2}). Raises ValueError where it cannot be read."""
    name, *pairs = (part.strip() for part in text.split(","))
    try:
        return name, {key.strip(): json.loads(value) for key, value in (pair.split("=") for pair in pairs)}
    except ValueError:
        raise ValueError(f'{text!r} is no model with settings: write "delta_net, max_beta = 2" (--models)') from None


def train(run: dict, a: Arguments) -> dict[str, dict[str, float]]:
    """Accuracy on new texts after training, by multiple of the trained length; for `needle` also by distance, in the
    longest texts."""
    name, task, rate, seed, steps = (run[key] for key in ("model", "task", "rate", "seed", "steps"))
    torch.manual_seed(seed)
    model = make_model(name, TASKS[task].vocab_size, a).to(a.device)
    optimizer = "adamw" if name == LSTM else "muon"  # which needs matrices in blocks
    config = TrainConfig(optimizer=optimizer, max_lr=rate, min_lr=rate / 10, steps=steps, warmup_steps=steps // 10)
    optimizer = make_optimizer(model, config)
    words = f"{name}, {task}, rate {rate:g}, seed {seed}"
    bar = tqdm(range(1, steps + 1), desc=words, leave=False, disable=a.processes > 1)
    for step in bar:
        texts = draw(TASKS[task], seed, step, run["batch_size"], run["length"])
        tokens, targets = (x.to(a.device) for x in texts)
        loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), ignore_index=UNDECIDED)
        sum([loss, *model.pop_losses()]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        optimizer.step()
        optimizer.zero_grad()
        model.after_step()
        if a.processes == 1:
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.eval()
    result = {"accuracy": {str(n): accuracy(model, run, TASKS[task], n * run["length"], a.device) for n in a.longer}}
    if task == "needle":
        longest = max(a.longer) * run["length"]
        far = [distance for distance in DISTANCES if distance <= longest - 3]
        result["accuracy_at_distance"] = {str(d): accuracy(model, run, needle_at(d), longest, a.device) for d in far}
    return result


def needle_at(distance: int) -> Task:
    """The task `needle` with a given number of tokens between the fact and the question."""
    known = TASKS["needle"]
    return replace(known, draw=partial(known.draw, distance=distance))


@torch.no_grad()
def accuracy(model: nn.Module, run: dict, task: Task, length: int, device: str, n_texts: int = 256) -> float:
    """The share of targets that are the likeliest token, on texts that training did not draw (step 0 and below)."""
    tokens, targets = draw(task, run["seed"], -length, n_texts, length)
    decided = targets != UNDECIDED
    found = torch.cat([model(part.to(device)).argmax(-1).cpu() for part in tokens.split(32)])
    return (found == targets)[decided].double().mean().item()


def timed(a: Arguments, run: dict) -> dict:
    """The accuracy of a run and how long it took."""
    start = time.perf_counter()
    result = train(run, a)
    return {**result, "seconds": round(time.perf_counter() - start, 1)}


def described(a: Arguments, task: str, model: str) -> dict:
    """What the runs of a model on a task have in common."""
    budget = {"steps": a.steps or TASKS[task].steps, "batch_size": a.batch_size, "length": a.length}
    return {"task": task, "model": model, **budget, "d_model": a.d_model, "n_layers": a.n_layers}


def missing_runs(a: Arguments, found: list[dict], rate: float) -> Iterator[dict]:
    """The first seed at this rate, where no run is there and no other rate solves the task with all seeds so far."""
    for task, model in product(a.tasks, a.models):
        run = {**described(a, task, model), "seed": 0}
        rows = find(found, **described(a, task, model))
        solved = any(all(row["accuracy"]["1"] >= SOLVED for row in find(rows, rate=row["rate"])) for row in rows)
        if not find(rows, seed=0, rate=rate) and not solved:
            yield {**run, "rate": rate}


def missing_seeds(a: Arguments, found: list[dict]) -> Iterator[dict]:
    """The other seeds at each model's best rate."""
    for task, model, seed in product(a.tasks, a.models, range(1, a.seeds)):
        run = described(a, task, model)
        best = at_best_probe_rate(find(found, **run))[0]["rate"]
        run |= {"seed": seed, "rate": best}
        if not find(found, **run):
            yield run


def complete(a: Arguments, found: list[dict], todo: list[dict]) -> None:
    """Train these, and write a line for each into the file and into `found`."""
    for run, result in tqdm(side_by_side(partial(timed, a), todo, a.processes), "probes", len(todo), unit="run"):
        line = {**run, **result, "commit": git_commit(), "device": find_machine(TrainConfig(device=a.device)).name}
        with open(a.out, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        found.append(line)
        shown = ", ".join(f"{value:.0%} at {times} x" for times, value in line["accuracy"].items())
        tqdm.write(f"{run['model']}, {run['task']}, rate {run['rate']:g}: {shown} ({line['seconds']:.0f} s)")


def report(runs: list[dict], a: Arguments) -> None:
    """Write a Markdown table and a heat map of accuracies, models by tasks, for each length."""
    tasks = [task for task in TASKS if any(run["task"] == task for run in runs)]
    there = [run["model"] for run in runs]
    models = [model for model in dict.fromkeys((*a.models, *there)) if model in there]
    lines = []
    tables = {
        t: [[probe_accuracy(runs, model, task, t) for task in tasks] for model in models] for t in map(str, a.longer)
    }
    for times, values in tables.items():
        lines += [f"Texts of {times} times the trained length, accuracy in percent:", ""]
        lines += ["| model | " + " | ".join(tasks) + " |", "|---" * (len(tasks) + 1) + "|"]
        rows = zip(models, values, strict=True)
        lines += [
            f"| {m} | " + " | ".join("" if v is None else f"{100 * v:.0f}" for v in row) + " |" for m, row in rows
        ]
        lines += [f"| chance | {' | '.join(f'{100 * TASKS[task].chance:.0f}' for task in tasks)} |", ""]
    budget = ", ".join(f"{task}: {TASKS[task].steps}" for task in tasks)
    lines += [f"{origin(runs)} {a.batch_size} texts of {a.length} tokens a step; steps of {budget}.", ""]
    write_atomically(a.out.with_suffix(".md"), "\n".join(lines).encode())
    print("\n".join(lines))
    try_to_draw(draw_tables, tables, a.out.with_suffix(".png"), models, tasks)
    if needles := by_distance(runs):
        try_to_draw(draw_needles, needles, a.out.with_name(f"{a.out.stem}_needle.png"))


def by_distance(runs: list[dict]) -> dict[str, dict[int, float]]:
    """For each model, the accuracy of `needle` by distance: the mean over seeds at its best rate."""
    found = [run for run in runs if "accuracy_at_distance" in run]
    curves = {}
    for model in dict.fromkeys(run["model"] for run in found):
        best = at_best_probe_rate(find(found, model=model))
        distances = map(int, best[0]["accuracy_at_distance"])
        curves[model] = {d: statistics.mean(run["accuracy_at_distance"][str(d)] for run in best) for d in distances}
    return curves


def draw_needles(curves: dict[str, dict[int, float]], path: Path) -> None:
    """Accuracy against the distance of the needle, a line for each model."""
    figure = new_figure(figsize=(8, 4), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    for number, (model, curve) in enumerate(curves.items()):
        percent = [100 * value for value in curve.values()]
        axes.plot(curve.keys(), percent, "-" if number < 10 else "--", marker=".", label=model)
    axes.set_xscale("log", base=2)
    axes.set_xticks(DISTANCES, ["" if distance == 192 else f"{distance}" for distance in DISTANCES])
    axes.set_xlabel("tokens between the fact and its question")
    axes.set_ylabel("accuracy, percent")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    with replacing(path) as picture:
        figure.savefig(picture, format="png")


def draw_tables(tables: dict[str, list[list[float | None]]], path: Path, models: list[str], tasks: list[str]) -> None:
    """One panel for each length: a row for each model, a column for each task, accuracy in percent."""
    figure = new_figure(figsize=(1.5 + 0.62 * len(tasks) * len(tables), 1.8 + 0.28 * len(models)), dpi=130)
    panels = figure.subplots(1, len(tables), sharey=True, squeeze=False)[0]
    for (times, values), panel in zip(tables.items(), panels, strict=True):
        shown = torch.tensor([[float("nan") if v is None else v for v in row] for row in values])
        panel.imshow(shown, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        for y, x in shown.isfinite().nonzero().tolist():
            value, options = shown[y, x].item(), dict(ha="center", va="center", fontsize=7)
            panel.text(x, y, f"{100 * value:.0f}", color="black" if value > 0.6 else "white", **options)
        panel.set_title(f"{times} x trained length", fontsize=9)
        panel.set_xticks(range(len(tasks)), tasks, rotation=60, ha="right", fontsize=8)
        panel.set_yticks(range(len(models)), models, fontsize=8)
    with replacing(path) as picture:
        figure.savefig(picture, format="png", bbox_inches="tight")


@console()
def main(arguments: list[str] | None = None) -> None:
    a = tyro.cli(Arguments, args=arguments)
    if a.quick:
        a = tyro.cli(Arguments, args=arguments, default=QUICK)
    try:
        run(a)
    except ValueError as error:
        sys.exit(f"error: {error}")


def run(a: Arguments) -> None:
    """Train what is missing and write the report. Raises ValueError for names that are not known."""
    models = tuple(name_and_settings(name)[0] for name in a.models)
    kinds = (("causal model", models, MODEL_NAMES), ("task", a.tasks, tuple(TASKS)))
    for kind, names, known in kinds:
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"no {kind} is called {', '.join(unknown)}; there are {', '.join(known)}")
    if 1 not in a.longer or min(a.longer) < 1:
        raise ValueError(f"--longer {a.longer} must have 1, the trained length, at which the best rate is chosen")
    if a.out.is_dir():
        raise ValueError(f"{a.out} is a folder: name a file for the runs (--out {a.out / 'probes.jsonl'})")
    a.out.parent.mkdir(parents=True, exist_ok=True)
    if not a.report:
        fill(a)
    report(read_runs(a.out), a)


def fill(a: Arguments) -> None:
    """Train what is missing. Raises ValueError for settings that cannot work, before anything is trained."""
    for name in a.models:
        make_model(name, 2, a)
    found, before = read_runs(a.out), -1
    while len(found) > before:  # a rate that solves the task with the first seed may fail with the others
        before = len(found)
        for rate in a.rates:
            complete(a, found, list(missing_runs(a, found, rate)))
        complete(a, found, list(missing_seeds(a, found)))


if __name__ == "__main__":
    main()
