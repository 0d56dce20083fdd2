"""Train every model on the same tokens, each at its best learning rate, and compare them with the baseline.

    python train_scripts/ladder.py --small                   # small models: hours on two cores
    python train_scripts/ladder.py                           # the default size, on a GPU
    python train_scripts/ladder.py --quick                   # ten minutes: six models, one rate, one seed
    python train_scripts/ladder.py --small --match flops     # feed-forward widths chosen for equal FLOPs
    python train_scripts/ladder.py --small --report          # tables and pictures from the rows that are there

Each model is trained at the reference rate, half of it and twice; its best rate is trained with two more seeds. Each
run is a line of `--out`, so an interrupted ladder goes on where it stopped. Tables and pictures are written beside it.
Differences to the baseline are paired: two runs with one seed read the same windows in the same order.
"""

import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro

from llm.analysis.compare import draw_curves
from llm.analysis.matching import CLOSE
from llm.analysis.results import at_best_rate, find, read_runs
from llm.analysis.studies import Run, Study, complete, mean_and_error, opened, verdict
from llm.config import TrainConfig
from llm.console import console
from llm.files import replacing, write_atomically
from llm.models import MODELS
from llm.training.curve import new_figure, try_to_draw

# At these the small baseline learns best: docs/results/reference.md.
INITIALIZATION, RATE = "truncated_normal", 8e-3
# Models that need other widths for equal parameters than for equal FLOPs.
TOLD_BY_PARAMETERS = (
    *("baseline", "sliding_window", "latent", "mixture_of_experts", "switch_transformer", "gated_delta_net", "mamba2"),
    *("rwkv7", "hybrid"),
)
QUICK = ("baseline", "rope", "output_norm", "swiglu", "grouped_query", "gated_delta_net")
EPOCHS = 10  # at most, at the default size: text that is read more often is memorised


@dataclass(frozen=True)
class Arguments:
    """Train every model on the same tokens and compare them."""

    models: tuple[str, ...] = tuple(MODELS)
    """Which models, in the order of the table; with --match parameters nine, where it is not given. The baseline is
    always trained, too."""
    small: bool = False
    """262,144 tokens each at d_model 128, 4 layers, context 128; otherwise the default size, 10 epochs at most."""
    match: Literal["none", "flops", "parameters"] = "none"
    """Choose the feed-forward widths so that each model has the baseline's training FLOPs or parameters within 1 %."""
    rates: tuple[float, ...] | None = None
    """Learning rates; where it is not given, the reference rate, half of it and twice."""
    seeds: int = 3
    """Runs of each model at its best rate."""
    data: Path | None = None
    """Folder that pre_tokenize.py wrote; where it is not given, data/stories with --small, else data/tinystories."""
    out: Path | None = None
    """A line of JSON for each run; default: docs/results/ladder.jsonl with --small, else (and with --quick)
    runs/ladder.jsonl."""
    processes: int | None = None
    """Runs side by side, each on one CPU core; where it is not given, 2 with --small, else 1."""
    quick: bool = False
    """Six small models, one rate, one seed, a quarter of the tokens."""
    report: bool = False
    """Train nothing; write tables and pictures from the rows of --out."""

    def study(self) -> Study:
        """Raises FileNotFoundError or ValueError where the data are not there."""
        small = self.small or self.quick
        data = self.data or Path("data/stories" if small else "data/tinystories")
        out = self.out or Path("docs/results/ladder.jsonl" if self.small and not self.quick else "runs/ladder.jsonl")
        if small:
            return Study("ladder", out, data, steps=128 if self.quick else 512)
        train = TrainConfig()
        steps = max(min(train.steps, EPOCHS * len(opened(data).train) // train.tokens_per_step), 1)
        sizes = dict(tokens_per_step=train.tokens_per_step, max_seq_len=512, eval_windows=train.eval_windows)
        return Study("ladder", out, data, steps=steps, small=False, **sizes)

    def settings(self) -> dict[str, str]:
        """What every run changes."""
        return {"initialization": INITIALIZATION} if self.small or self.quick else {}

    def tried_rates(self) -> tuple[float, ...]:
        middle = RATE if self.small or self.quick else TrainConfig().max_lr
        return self.rates or ((middle,) if self.quick else (middle, middle / 2, 2 * middle))


def run_all(a: Arguments, study: Study) -> None:
    """One seed at each rate for every model, then more seeds at each model's best rate."""
    processes = a.processes or (2 if study.small else 1)
    first = [Run(name, rate, 0, a.settings(), a.match) for rate in a.tried_rates() for name in a.models]
    rows = complete(study, first, processes)
    rates = {name: next(iter(seeds.values()))["rate"] for name, seeds in at_best_rates(rows).items()}
    more = [Run(name, rates[name], seed, a.settings(), a.match) for seed in range(1, a.seeds) for name in a.models]
    complete(study, more, processes)


def recorded(a: Arguments, study: Study) -> list[dict]:
    """All rows that such runs left, also those of other models. Raises ValueError where they are of several texts."""
    any_run = study.description(Run("baseline", 0.0, 0, a.settings(), a.match))
    rows = find(read_runs(study.rows), **{k: v for k, v in any_run.items() if k not in ("model", "rate", "seed")})
    if not a.report:
        return find(rows, data=opened(study.data).train_sha256[:12])
    if len({row["data"] for row in rows}) > 1:
        raise ValueError(f"{study.rows} has runs on several texts: run without --report, and with --data")
    return rows


def score(row: dict) -> float:
    """Higher is better; a run that diverged is the worst."""
    return float("-inf") if row["diverged"] else -row["eval_loss"]


def at_best_rates(rows: list[dict]) -> dict[str, dict[int, dict]]:
    """By model and seed, the rows at the model's best rate, in the order of MODELS."""
    names = [name for name in MODELS if find(rows, model=name)]
    return {name: {row["seed"]: row for row in at_best_rate(find(rows, model=name), score)} for name in names}


def differences(seeds: dict[int, dict], reference: dict[int, dict]) -> list[float]:
    """The loss minus the reference's, for each seed that both have."""
    pairs = [(seeds[seed], reference[seed]) for seed in sorted(seeds.keys() & reference.keys())]
    return [one["eval_loss"] - other["eval_loss"] for one, other in pairs if not (one["diverged"] or other["diverged"])]


HEADER = "| model | rate | seeds | parameters (active) | MFLOPs / token, training | of the baseline's | eval loss "
HEADER += "| minus the baseline's | | bits / byte | cache, B / token |"


def table(models: dict[str, dict[int, dict]], reference: dict[int, dict], quantity: str) -> str:
    """A Markdown table with one row a model. `quantity`: the cost whose ratio to the baseline's is shown."""
    lines = [HEADER, "|---" * (HEADER.count("|") - 1) + "|"]
    for name, seeds in models.items():
        row, apart = next(iter(seeds.values())), differences(seeds, reference)
        losses = [one["eval_loss"] for one in seeds.values() if not one["diverged"]]
        bits = [one["eval_bits_per_byte"] for one in seeds.values() if not one["diverged"]]
        total, active = row["parameters"], row["active_parameters"]
        bound = "≤ " if row.get("eval_loss_error") else ""
        mean, error = mean_and_error(apart) if apart else (float("nan"), float("nan"))
        told = "" if name == "baseline" else verdict(apart) if len(apart) > 1 else "one seed"
        cells = [
            name,
            f"{row['rate']:g}",
            str(len(seeds)) + (f", {len(seeds) - len(losses)} diverged" if len(losses) < len(seeds) else ""),
            f"{total / 1e6:.2f} M" + (f" ({active / 1e6:.2f} M)" if active < total else ""),
            f"{row['training_flops_per_token'] / 1e6:.2f}",
            f"{row[quantity] / next(iter(reference.values()))[quantity]:.2f}",
            f"{bound}{statistics.mean(losses):.3f}" + deviation(losses) if losses else "diverged",
            "" if name == "baseline" or not apart else f"{mean:+.3f}" + (f" ± {error:.3f}" if len(apart) > 1 else ""),
            told,
            f"{bound}{statistics.mean(bits):.3f}" if bits else "",
            f"{row['cache_bytes_per_token']:,.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def cost_ratios(models: dict[str, dict[int, dict]], quantity: str) -> dict[str, float]:
    """Each model's cost over the baseline's."""
    costs = {name: next(iter(seeds.values()))[quantity] for name, seeds in models.items()}
    return {name: cost / costs["baseline"] for name, cost in costs.items()}


def deviation(values: list[float]) -> str:
    return f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""


EXPLANATION = (
    "Eval loss: mean ± standard deviation over seeds. Minus the baseline's: mean ± standard error of the differences "
    "with the same seed; better or worse where a t-test says so (p < 0.05). Of the baseline's: {}.\n"
)


def report(rows: list[dict], match: str, out: Path) -> None:
    """Write tables and pictures of the rows with this kind of matching. Models whose loss is a bound stand apart."""
    models = at_best_rates(rows)
    if "baseline" not in models:
        raise ValueError(f"{out} has no run of the baseline with match {match}: train it first (without --report)")
    quantity = "parameters" if match == "parameters" else "training_flops_per_token"
    exact = {name: seeds for name, seeds in models.items() if not next(iter(seeds.values())).get("eval_loss_error")}
    bounds = {name: seeds for name, seeds in models.items() if name not in exact}
    text = table(exact, models["baseline"], quantity)
    if bounds:
        text += "\nModels whose loss is a bound on theirs, by the Monte-Carlo estimate of llm/training/evaluate.py:\n\n"
        text += table(bounds, models["baseline"], quantity)
    first = next(iter(models["baseline"].values()))
    missed = [
        f"{name} ({ratio:.2f})" for name, ratio in cost_ratios(models, quantity).items() if abs(ratio - 1) > CLOSE
    ]
    if match != "none" and missed:
        text += f"\nNo feed-forward width brings these within 1 % of the baseline: {', '.join(missed)}.\n"
    ran = sorted({f"{row['device']}, {row['precision']}, commit {str(row['commit'])[:7]}" for row in rows})
    text += "\n" + EXPLANATION.format("parameters" if match == "parameters" else "training FLOPs")
    text += f"{first['tokens']:,} tokens a run. Ran on: {'; '.join(ran)}.\n"
    name = out.stem if match == "none" else f"{out.stem}_{match}"
    write_atomically(out.with_name(f"{name}.md"), text.encode())
    print(f"{text}\nwritten to {out.with_name(f'{name}.md')}")
    try_to_draw(draw_differences, exact, out.with_name(f"{name}.png"), models["baseline"])
    curves = {n: [in_millions(row["curve"]) for row in seeds.values()] for n, seeds in exact.items()}
    try_to_draw(draw_curves, curves, out.with_name(f"{name}_curves.png"))


def in_millions(curve: list[list[float]]) -> list[tuple[float, float]]:
    """The points after training began, in millions of tokens."""
    return [(tokens / 1e6, loss) for tokens, loss in curve if tokens and loss is not None]


FARTHEST = 0.45  # nats from the baseline, the end of the axis


def draw_differences(models: dict[str, dict[int, dict]], path: Path, reference: dict[int, dict]) -> None:
    """A point for each model, the difference to the baseline, with its standard error; the best model on top."""
    apart = {n: mean_and_error(d) for n, s in models.items() if n != "baseline" and (d := differences(s, reference))}
    names = sorted(apart, key=lambda name: -apart[name][0])
    figure = new_figure(figsize=(7, 1 + 0.2 * len(names)), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlim(-FARTHEST, FARTHEST)
    for y, name in enumerate(names):
        if (mean := apart[name][0]) > FARTHEST:
            axes.text(FARTHEST, y, f"{mean:+.2f} → ", ha="right", va="center", fontsize=8)
    means, errors = zip(*(apart[name] for name in names), strict=True) if names else ((), ())
    axes.errorbar(means, range(len(names)), xerr=[0 if e != e else e for e in errors], fmt="o", markersize=4, capsize=2)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.axvline(0, color="black", linewidth=1)
    axes.set_xlabel("eval loss minus the baseline's, nats per token (lower is better)")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    with replacing(path) as picture:
        figure.savefig(picture, format="png")


@console()
def main(arguments: list[str] | None = None) -> None:
    a = tyro.cli(Arguments, args=arguments)
    if unknown := [name for name in a.models if name not in MODELS]:
        sys.exit(f"error: no model is called {', '.join(unknown)}; there are {', '.join(MODELS)} (--models)")
    if a.models == tuple(MODELS) and a.match == "parameters":
        a = replace(a, models=TOLD_BY_PARAMETERS)
    if a.quick:
        a = replace(a, models=QUICK if a.models in (tuple(MODELS), TOLD_BY_PARAMETERS) else a.models, seeds=1)
    a = replace(a, models=tuple(dict.fromkeys(("baseline", *a.models))))
    try:
        study = a.study()
        if not a.report:
            run_all(a, study)
        report(recorded(a, study), a.match, study.rows)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
