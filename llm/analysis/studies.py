"""A study: many small training runs, each a line of JSON, from which tables and pictures can be made at any time.

A run is a model, a learning rate, a seed, and the settings that it changes. Its line has what it cost, its eval loss
after each eighth of the training, and where it ran: commit, device, precision. Runs whose line is there are not trained
again, so a study that was interrupted goes on, and two studies may share a file.

Each run computes on one thread, so its result does not depend on how many run side by side.
"""

import hashlib
import json
import math
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from llm.analysis.accounting import describe
from llm.analysis.matching import cost, matched
from llm.analysis.results import find, read_runs
from llm.config import ModelConfig, TrainConfig
from llm.data.files import open_tokens
from llm.models import MODELS
from llm.training.device import find_machine
from llm.training.loop import train
from llm.training.provenance import git_commit
from llm.training.run_directory import read_metrics

TRAIN_FIELDS = {f.name for f in fields(TrainConfig)}
EVALUATIONS = 8
opened = cache(open_tokens)  # which computes the hash of each file


@dataclass(frozen=True)
class Run:
    """One training run. `settings` are fields of the model's config or of TrainConfig, by name."""

    model: str
    rate: float
    seed: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    match: str = "none"
    """none; or parameters or flops: the feed-forward width is chosen so that the model has as many as the baseline."""


@dataclass(frozen=True)
class Study:
    """What all runs of a study have in common."""

    name: str
    rows: Path
    """The file of JSON lines, a line for each finished run."""
    data: Path
    """Folder of token arrays."""
    steps: int = 512
    tokens_per_step: int = 512
    max_seq_len: int = 128
    eval_windows: int = 64
    small: bool = True
    """The models' small size; False: their default size."""

    def description(self, run: Run) -> dict[str, Any]:
        """What identifies the line of a run, without the data."""
        budget = ("steps", "tokens_per_step", "max_seq_len", "eval_windows", "small")
        return {"study": self.name, **asdict(run), **{name: getattr(self, name) for name in budget}}

    def key(self, run: Run) -> dict[str, Any]:
        """What identifies the line of a run."""
        return self.description(run) | {"data": opened(self.data).train_sha256[:12]}

    def model_config(self, name: str, **changes: Any) -> ModelConfig:
        """The config of a model at the study's size."""
        Config = MODELS[name].Config
        sizes = {"max_seq_len": self.max_seq_len, "vocab_size": opened(self.data).vocab_size}
        return Config(**{**(Config.small if self.small else {}), **sizes, **changes})

    def configs(self, run: Run) -> tuple[ModelConfig, TrainConfig]:
        """The configs of a run. Raises ValueError for settings that cannot work."""
        changes = {name: value for name, value in run.settings.items() if name not in TRAIN_FIELDS}
        model = self.model_config(run.model, **changes)
        if run.match != "none":
            target = cost(MODELS["baseline"], self.model_config("baseline"), run.match)
            model = matched(MODELS[run.model], model, target, run.match)
        recipe = dict(max_lr=run.rate, min_lr=run.rate / 10, warmup_steps=self.steps // 10, seed=run.seed)
        recipe |= dict(eval_every=max(self.steps // EVALUATIONS, 1), save_every=max(self.steps // 2, 1))
        recipe |= dict(precision="fp32", compile="off") if self.small else {}  # compiling takes longer than the run
        recipe |= {name: value for name, value in run.settings.items() if name in TRAIN_FIELDS}
        budget = dict(steps=self.steps, tokens_per_step=self.tokens_per_step, eval_windows=self.eval_windows)
        return model, TrainConfig(
            data=self.data, micro_batch_size=16, illustrate=False, wandb="off", **budget, **recipe
        )


def complete(study: Study, runs: list[Run], processes: int = 1) -> list[dict]:
    """Train the runs that have no line yet, write a line for each, and return the lines of `runs` in order.

    Raises ValueError for settings that cannot work, before anything is trained.
    """
    there = read_runs(study.rows)
    todo = [run for run in runs if not find(there, **study.key(run))]
    for run in todo:
        study.configs(replace(run, match="none"))
    study.rows.parent.mkdir(parents=True, exist_ok=True)
    results = side_by_side(partial(execute, study), todo, processes)
    for run, row in tqdm(results, study.name, len(todo), unit="run", disable=not todo):
        with open(study.rows, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        loss = "diverged" if row["diverged"] else f"{row['eval_loss']:.4f}"
        tqdm.write(f"{in_words(run)}: {loss} ({row['seconds']:.0f} s)")
    there = read_runs(study.rows)
    return [find(there, **study.key(run))[0] for run in runs]


def in_words(run: Run) -> str:
    changes = [f"{name} {value}" for name, value in run.settings.items()]
    changes += [] if run.match == "none" else [f"equal {run.match}"]
    return ", ".join([run.model, *changes, f"rate {run.rate:g}", f"seed {run.seed}"])


def side_by_side(function: Callable[..., dict], runs: list, processes: int) -> Iterator[tuple[Any, dict]]:
    """`(run, function(run))` as soon as it is there, each computed on one thread; with several, in processes."""
    if processes == 1:
        torch.set_num_threads(1)
        yield from ((run, function(run)) for run in runs)
        return
    pool = ProcessPoolExecutor(
        processes, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=[1]
    )
    try:
        futures = {pool.submit(function, run): number for number, run in enumerate(runs)}
        for future in as_completed(futures):
            yield runs[futures[future]], future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def execute(study: Study, run: Run) -> dict:
    """Train one run in this process and return its row. A run that diverges has a row without a loss."""
    model_config, config = study.configs(run)
    name = hashlib.sha256(json.dumps(study.key(run), sort_keys=True).encode()).hexdigest()[:16]
    folder = Path("runs") / study.name / f"{run.model}-{name}"
    Model, data, machine = MODELS[run.model], opened(study.data), find_machine(config, 0)
    start, diverged = time.perf_counter(), False
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.txt", "a", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            train(Model, model_config, replace(config, out=folder), data)
        except FloatingPointError:
            diverged = True
    lines = read_metrics(folder / "metrics.jsonl")
    evaluations = [line for line in lines if line.get("eval_loss") is not None]
    last = {k: v for k, v in evaluations[-1].items() if k.startswith("eval_")}
    late = [line for line in lines if line["step"] > study.steps * (1 - 1 / EVALUATIONS)]
    loads = [[v for k, v in line.items() if k.startswith("expert_load/")] for line in late]
    loads = [layers for layers in loads if layers]
    with torch.device("meta"):
        costs = describe(Model(model_config))
    shutil.rmtree(folder)
    return {
        **study.key(run),
        **costs,
        "tokens": study.steps * study.tokens_per_step,
        **(dict.fromkeys(last) if diverged else last),
        "diverged": diverged,
        **({"expert_load": torch.tensor(loads).mean(0).tolist()} if loads else {}),
        "curve": [[line["tokens"], line["eval_loss"]] for line in evaluations],
        "commit": git_commit(),
        "device": machine.name,
        "precision": machine.precision,
        "seconds": round(time.perf_counter() - start, 1),
    }


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """The mean of independent values and its standard error, NaN for a single value."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.mean(values), error


T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}


def t_95(n: int) -> float:
    """The mean of n values differs from zero (p < 0.05, two-sided t-test) where it is beyond so many standard errors.
    For more than eight values the number for eight is taken, which is a little too strict."""
    return T_95.get(n, T_95[8]) if n > 1 else math.inf


def verdict(differences: list[float]) -> str:
    """Whether paired differences of a loss are lower, higher, or cannot be told from noise (t-test, 95 percent)."""
    mean, error = mean_and_error(differences)
    if not abs(mean) > t_95(len(differences)) * error:
        return "cannot be told"
    return "better" if mean < 0 else "worse"
