"""Compare runs: a Markdown table of each model's costs and losses, and their loss curves in one picture.

    python -m llm.compare runs/ladder/* --out runs/ladder

Runs that differ in the seed only share a row, which has their mean and standard deviation. A run with another recipe
(optimiser, learning rates, ..) than the first run, or with other settings than the first run of its model, has a row of
its own that names the difference. Only runs on the same data, with the same number of tokens and the same context are
compared; for others there is an error that names them. Where a loss is a bound, as of diffusion models, "≤" marks it.
"""

import math
import statistics
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from llm.console import console
from llm.files import replacing, write_atomically
from llm.training.curve import new_figure, try_to_draw
from llm.training.run_directory import RunDirectoryError, existing_config, read_metrics

HEADER = "| model | seeds | parameters (active) | MFLOPs / token | eval loss | bits / byte | tokens / s "
HEADER += "| memory, MiB | cache, B / token |"
SAME = ("steps", "tokens_per_step", "eval_windows")
RECIPE = ("optimizer", "max_lr", "min_lr", "warmup_steps", "weight_decay", "beta1", "beta2", "grad_clip")


@dataclass(frozen=True)
class Result:
    """One finished run: its config.json and its metrics, split into logged steps and evaluations."""

    name: str
    config: dict
    steps: list[dict]
    evaluations: list[dict]

    @property
    def last(self) -> dict:
        """The evaluation after the last step."""
        return self.evaluations[-1]

    @property
    def setting(self) -> dict:
        """The settings that must be equal for a fair comparison."""
        same = {name: self.config["train"][name] for name in SAME}
        data = self.config["data"]
        return same | {
            "tokenizer": data["tokenizer_sha256"][:12],
            "training text": data["train_sha256"][:12],
            "eval text": data["eval_sha256"][:12],
            "max_seq_len": self.config["model"]["max_seq_len"],
            "precision": self.config["precision"],
            "device": self.config["device"],
        }


def read_run(path: Path) -> Result:
    """Raises RunDirectoryError where `path` is no run directory, or the run has not reached its last step."""
    config = existing_config(path)
    metrics = read_metrics(path / "metrics.jsonl")
    evaluations = [line for line in metrics if line.get("eval_loss") is not None]
    if config is None or not evaluations:
        raise RunDirectoryError(f"{path} is no run directory with an evaluation: name folders that training wrote")
    if evaluations[-1]["step"] < config["train"]["steps"]:
        raise RunDirectoryError(
            f"{path} stopped at step {evaluations[-1]['step']} of {config['train']['steps']}: finish it first, with "
            f"the command that began it"
        )
    return Result(config["model_name"], config, [line for line in metrics if "loss" in line], evaluations)


def name_apart(results: list[Result]) -> list[Result]:
    """The same results, renamed where they differ in more than the seed: "baseline, optimizer = muon".

    Raises ValueError where a run occurs twice, since two equal runs would be taken for two seeds.
    """
    named, first_of = [], {}
    for result in results:
        first = first_of.setdefault(result.name, result)
        settings = [(result.config["train"], results[0].config["train"], name) for name in RECIPE]
        settings += [(result.config["model"], first.config["model"], name) for name in result.config["model"]]
        apart = [f"{name} = {mine[name]}" for mine, others, name in settings if mine[name] != others[name]]
        named.append(replace(result, name=", ".join([result.name, *apart])))
    seen = set()
    for result in named:
        run = (result.name, seed := result.config["train"]["seed"])
        if run in seen:
            raise ValueError(f"{result.name} with seed {seed} is there twice: repetitions need seeds of their own")
        seen.add(run)
    return named


def check_fair(results: list[Result]) -> None:
    """Raises ValueError, naming what differs, where runs cannot be compared."""
    first = results[0]
    for other in results[1:]:
        different = {k: (v, other.setting[k]) for k, v in first.setting.items() if v != other.setting[k]}
        if different:
            lines = "; ".join(f"{name}: {one} and {two}" for name, (one, two) in different.items())
            raise ValueError(f"{first.name} and {other.name} were not trained alike: {lines}")


def table(results: list[Result]) -> str:
    """A Markdown table with one row a model, in the order given."""
    rows = defaultdict(list)
    for result in results:
        rows[result.name].append(result)
    lines = [HEADER, "|---" * (HEADER.count("|") - 1) + "|"]
    lines += ["| " + " | ".join(cells(name, seeds)) + " |" for name, seeds in rows.items()]
    return "\n".join(lines) + "\n"


def cells(name: str, seeds: list[Result]) -> list[str]:
    """The cells of one row."""
    costs = seeds[0].config["costs"]
    total, active = costs["parameters"], costs["active_parameters"]
    speeds = [line["tokens_per_second"] for run in seeds for line in run.steps]
    memory = [run.last["peak_memory_bytes"] for run in seeds if run.last.get("peak_memory_bytes")]
    return [
        name,
        str(len(seeds)),
        f"{total / 1e6:.2f} M" + (f" ({active / 1e6:.2f} M)" if active < total else ""),
        f"{costs['flops_per_token'] / 1e6:.2f}",
        bounded(seeds, "eval_loss"),
        bounded(seeds, "eval_bits_per_byte"),
        f"{statistics.median(speeds):,.0f}" if speeds else "",
        f"{max(memory) / 2**20:,.0f}" if memory else "",
        f"{costs['cache_bytes_per_token']:,.0f}",
    ]


def bounded(seeds: list[Result], name: str) -> str:
    """The spread of a metric. A bound begins with "≤" and ends with the standard error of its random draws, the largest
    of the seeds."""
    text = spread([run.last[name] for run in seeds])
    errors = [run.last.get(f"{name}_error") for run in seeds]
    return text if errors[0] is None else f"≤ {text} (draws: {max(errors):.4f})"


def spread(values: list[float]) -> str:
    """The mean, and the standard deviation where there are several values."""
    deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{deviation}"


Curve = list[tuple[float, float]]
"""Millions of training tokens, and the eval loss after them."""
IN_A_PANEL = 9  # more curves are hard to tell apart


def curves_of(results: list[Result]) -> dict[str, list[Curve]]:
    """By name, the curves of eval loss against training tokens, one for each seed."""
    curves = defaultdict(list)
    for result in results:
        curves[result.name].append([(e["tokens"] / 1e6, e["eval_loss"]) for e in result.evaluations if e["tokens"]])
    return curves


def draw_curves(curves: dict[str, list[Curve]], path: Path) -> None:
    """Draw all curves, in panels of a few models in the order given. The first model, the reference, is black in each
    panel."""
    reference, *others = curves
    n_panels = max(1, math.ceil(len(others) / IN_A_PANEL))
    n_columns = min(3, n_panels)
    n_rows = math.ceil(n_panels / n_columns)
    figure = new_figure(figsize=(1 + 5 * n_columns, 4.5 * n_rows), layout="constrained")
    panels = figure.subplots(n_rows, n_columns, sharey=True, squeeze=False)
    for number, panel in enumerate(panels.flat):
        if number >= n_panels:
            panel.remove()
            continue
        for colour, name in enumerate([reference, *others[number * IN_A_PANEL : (number + 1) * IN_A_PANEL]]):
            style = {"color": f"C{colour - 1}"} if colour else {"color": "black", "linewidth": 2.2, "zorder": 3}
            for seed, curve in enumerate(curves[name]):
                panel.plot(*zip(*curve, strict=True), label=None if seed else name, **style)
        panel.set_xlabel("training tokens, millions")
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(fontsize=8, frameon=False)
    for panel in panels[:, 0]:
        panel.set_ylabel("eval loss, nats per token")
    with replacing(path) as picture:
        figure.savefig(picture, format="png", dpi=110)


@dataclass(frozen=True)
class Arguments:
    """Compare finished runs: print a Markdown table, and write it with a picture of the curves."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories; the first model is the reference. Folders without a run are left out."""
    out: Path = Path("runs")
    """Folder for comparison.md and comparison.png."""


@console()
def main(arguments: list[str] | None = None) -> None:
    """The command."""
    flags = tyro.cli(Arguments, args=arguments, prog="python -m llm.compare")
    folders = [path for path in flags.runs if (path / "config.json").is_file()]
    if not folders:
        raise ValueError(f"none of {', '.join(map(str, flags.runs)) or 'nothing'} is a run directory")
    compare([read_run(path) for path in folders], flags.out)


def compare(results: list[Result], out: Path) -> None:
    """Print the table; write it and the picture to `out`. Raises ValueError for runs that were not trained alike."""
    check_fair(results)
    results = name_apart(results)
    out.mkdir(parents=True, exist_ok=True)
    text = table(results)
    write_atomically(out / "comparison.md", text.encode())
    print(f"{text}\nwritten to {out / 'comparison.md'}")
    try_to_draw(draw_curves, curves_of(results), out / "comparison.png")
