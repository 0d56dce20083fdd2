"""Find the initialisation and the learning rate at which the baseline learns best, and why norms on the outputs win.

    python train_scripts/reference.py                 # hours on two cores; goes on where it was interrupted
    python train_scripts/reference.py --quick         # ten minutes: two schemes, one rate, one seed
    python train_scripts/reference.py --report        # table and picture from the rows that are there

The baseline, output_norm and sandwich_norm are trained with each scheme of llm/modules/initialization.py at three
learning rates with three seeds. Each run is a line of `--out`; table and picture are written beside it.
"""

import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import tyro

from llm.analysis.results import find, origin, read_runs
from llm.analysis.studies import Run, Study, complete, mean_and_error
from llm.console import console
from llm.files import replacing, write_atomically
from llm.modules.initialization import SCHEMES
from llm.training.curve import new_figure, try_to_draw

MODELS = ("baseline", "output_norm", "sandwich_norm")


@dataclass(frozen=True)
class Arguments:
    """Train three models with every initialisation at three learning rates."""

    rates: tuple[float, ...] = (2e-3, 4e-3, 8e-3)
    """Learning rates."""
    schemes: tuple[str, ...] = tuple(SCHEMES)
    """Names of llm/modules/initialization.py."""
    seeds: int = 3
    """Runs of each model, scheme and rate."""
    data: Path = Path("data/stories")
    """Folder that pre_tokenize.py wrote."""
    out: Path = Path("docs/results/reference.jsonl")
    """A line of JSON for each run."""
    processes: int = 2
    """Runs side by side, each on one core."""
    quick: bool = False
    """Two schemes, one rate, one seed, and rows of their own in runs/."""
    report: bool = False
    """Train nothing; write table and picture from the rows of --out."""


QUICK = Arguments(rates=(4e-3,), schemes=("normal", "truncated_normal"), seeds=1, out=Path("runs/reference.jsonl"))


def runs(a: Arguments) -> list[Run]:
    """The runs, all models with the first seed before the second seed begins."""
    places = product(range(a.seeds), a.rates, a.schemes, MODELS)
    return [Run(model, rate, seed, {"initialization": scheme}) for seed, rate, scheme, model in places]


def losses(rows: list[dict], model: str, scheme: str, rate: float) -> list[float]:
    """The eval losses of all seeds; infinite where a run diverged."""
    found = find(rows, model=model, settings={"initialization": scheme}, rate=rate)
    return [float("inf") if row["diverged"] else row["eval_loss"] for row in found]


def report(rows: list[dict], out: Path) -> None:
    """A Markdown table, models and schemes by rates, and a picture of the best rate of each."""
    rates = sorted({row["rate"] for row in rows})
    schemes = [scheme for scheme in SCHEMES if any(row["settings"]["initialization"] == scheme for row in rows)]
    lines = ["| model | initialization | " + " | ".join(f"rate {rate:g}" for rate in rates) + " |"]
    lines += ["|---" * (2 + len(rates)) + "|"]
    best: dict[tuple[str, str], tuple[float, float]] = {}
    for model, scheme in product(MODELS, schemes):
        cells = []
        for rate in rates:
            values = losses(rows, model, scheme, rate)
            if not values:
                cells.append("")
                continue
            mean, error = mean_and_error(values)
            best[model, scheme] = min(best.get((model, scheme), (float("inf"), 0.0)), (mean, error))
            cells.append(f"{mean:.3f}" + (f" ± {error:.3f}" if len(values) > 1 else "") + f" ({len(values)})")
        lines.append(f"| {model} | {scheme} | " + " | ".join(cells) + " |")
    text = "\n".join(lines) + "\n\nEval loss, mean ± standard error (number of seeds). "
    text += f"{rows[0]['tokens']:,} tokens each. {origin(rows)}\n"
    write_atomically(out.with_suffix(".md"), text.encode())
    print(f"{text}\nwritten to {out.with_suffix('.md')}")
    try_to_draw(draw, best, out.with_suffix(".png"), schemes)


def draw(best: dict[tuple[str, str], tuple[float, float]], path: Path, schemes: list[str]) -> None:
    """A group of points for each scheme, a colour for each model, at the model's best rate."""
    figure = new_figure(figsize=(8, 4), dpi=140, layout="constrained")
    axes = figure.add_subplot()
    for number, model in enumerate(MODELS):
        points = [(i, *best[model, scheme]) for i, scheme in enumerate(schemes) if (model, scheme) in best]
        x, mean, error = zip(*points, strict=True)
        axes.errorbar([i + 0.12 * (number - 1) for i in x], mean, error, fmt="o", label=model, capsize=3)
    axes.set_xticks(range(len(schemes)), schemes)
    axes.set_ylabel("eval loss at the best rate, nats per token")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    with replacing(path) as picture:
        figure.savefig(picture, format="png")


@console()
def main(arguments: list[str] | None = None) -> None:
    a = tyro.cli(Arguments, args=arguments)
    if a.quick:
        a = tyro.cli(Arguments, args=arguments, default=QUICK)
    study = Study("reference", a.out, a.data)
    try:
        if not a.report:
            complete(study, runs(a), a.processes)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
    report(read_runs(a.out), a.out)


if __name__ == "__main__":
    main()
