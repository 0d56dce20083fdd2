"""Try the papers' claims again: train what each compares, and write docs/claims.md from the results.

    python train_scripts/claims.py                # the runs that are missing, then the page
    python train_scripts/claims.py --report       # the page, from the rows that are there
    python train_scripts/claims.py --quick        # ten minutes: two claims with a quarter of the tokens, no page

Runs with settings of their own are trained here, and three seeds of each probe that a claim compares. The other claims
are judged by the rows of `ladder.py --small --match flops` and extend_context.py. The claims: llm/analysis/claims.py.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import ladder
import probe
import tyro

from llm.analysis.claims import CLAIMS, SEEDS, Arm, Best, Claim, Long, Probe, Result, Side, judge
from llm.analysis.results import at_best_rate, find, read_runs
from llm.analysis.studies import Run, Study, complete
from llm.console import console
from llm.files import write_atomically


@dataclass(frozen=True)
class Arguments:
    """Train what the claims compare and write the page."""

    data: Path = Path("data/stories")
    """Folder that pre_tokenize.py wrote."""
    results: Path = Path("docs/results")
    """Folder of ladder.jsonl, probes.jsonl and context.jsonl."""
    out: Path = Path("docs/claims.md")
    """The page."""
    processes: int = 2
    """Runs side by side, each on one core."""
    quick: bool = False
    """The first two claims, with a quarter of the tokens and rows of their own."""
    report: bool = False
    """Train nothing; write the page from the rows that are there."""


def runs_of(side: Side) -> list[Run]:
    """The training runs of a side of a claim: none where other scripts find its evidence."""
    return side.runs(ladder.RATE, {"initialization": ladder.INITIALIZATION}) if isinstance(side, Arm) else []


def probed(claims: list[Claim]) -> dict[str, tuple[str, ...]]:
    """The models whose accuracy is compared, by task."""
    sides = [side for claim in claims for side in (claim.first, claim.second) if isinstance(side, Probe)]
    tasks = {side.task for side in sides}
    return {task: tuple(dict.fromkeys(side.model for side in sides if side.task == task)) for task in sorted(tasks)}


def result(side: Side, claim: Claim, study: Study, rows: dict[str, list[dict]]) -> Result:
    """The outcome of a side by seed."""
    if isinstance(side, Probe):
        return side.result(rows["probes"])
    if isinstance(side, Long):
        return side.result(rows["context"])
    if isinstance(side, Best):
        place = study.description(Run(side.model, 0.0, 0, {"initialization": ladder.INITIALIZATION}, "flops"))
        del place["rate"], place["seed"]
        found = at_best_rate(find(rows["ladder"], **place), ladder.score)
    else:
        found = [row for run in runs_of(side) for row in find(rows["ladder"], **study.description(run))]
    value = claim.value or (lambda row: row["eval_loss"])
    return {row["seed"]: float("inf") if row["diverged"] else value(row) for row in found}


def described(side: Side) -> str:
    """A side of a claim in words."""
    if isinstance(side, Probe):
        length = f" at {side.times} x the trained length" if side.times > 1 else ""
        return f"{side.model} on `{side.task}`{length}"
    if isinstance(side, Best):
        return side.model
    if isinstance(side, Long):
        return ", ".join([side.model, *([side.scaling] if side.scaling else []), *(["tuned"] if side.tuned else [])])
    changes = [f"rate x {side.rate:g}"] if side.rate != 1 else []
    changes += [f"{name} = {value}" for name, value in side.settings.items()]
    return ", ".join([side.model, *changes])


def page(claims: list[Claim], study: Study, rows: dict[str, list[dict]]) -> str:
    """Markdown: a table with a row for each claim."""
    lines = ["| claim | source | compared | first minus second | verdict |", "|---|---|---|---|---|"]
    for claim in claims:
        sides = [result(side, claim, study, rows) for side in (claim.first, claim.second)]
        compared = f"{described(claim.first)}; {described(claim.second)}"
        lines.append("| " + " | ".join([claim.text, claim.source, compared, *judge(claim, *sides)]) + " |")
    ran = [row for name in rows for row in rows[name]]
    commits = sorted({str(row.get("commit"))[:7] for row in ran})
    devices = sorted({row["device"] for row in ran})
    return "\n".join(lines) + f"\n\nRows of commits {', '.join(commits)}; device: {', '.join(devices)}.\n"


HEAD = """# The papers' claims, tried again

Written by `python train_scripts/claims.py --report` from the rows in [results](results/). Each difference is the mean
over three seeds ± its standard error, paired by seed: nats per token for losses (lower is better), percentage points
for accuracies (higher is better); the balance of experts is a ratio of loads. "Holds" and "does not hold here" need a
difference that a t-test tells from noise (p < 0.05). A claim that loses little or nothing names a margin and holds
where the loss is smaller than it for certain.

Training runs: {tokens:,} tokens of stories at the ladder's size and the baseline's FLOPs, initialisation {init}.
A model alone is the ladder's, at its best rate; one with settings has the rate {rate:g}, or as many times it as is
said. Probes have the best of up to three rates: one that solves the task ends the search. For long texts, eight times
those of training (`python train_scripts/extend_context.py`), a claim about one model read in two ways compares the loss
of the last tokens. A claim about two models compares how much this loss rises over the one with only as much text as in
training. The [experiments](experiments.md) say more.

"""


@console()
def main(arguments: list[str] | None = None) -> None:
    a = tyro.cli(Arguments, args=arguments)
    study = Study("ladder", a.results / "ladder.jsonl", a.data)
    claims = CLAIMS[:2] if a.quick else CLAIMS
    if a.quick:
        study = replace(study, steps=study.steps // 4, rows=Path("runs/claims.jsonl"))
    try:
        if not a.report:
            runs = {str(run): run for claim in claims for side in (claim.first, claim.second) for run in runs_of(side)}
            complete(study, list(runs.values()), a.processes)
            for task, models in probed(claims).items():
                told = dict(models=models, tasks=(task,), seeds=SEEDS, processes=a.processes)
                probe.fill(probe.Arguments(**told, out=a.results / "probes.jsonl"))
        rows = {name: read_runs(a.results / f"{name}.jsonl") for name in ("probes", "context")}
        text = page(claims, study, {"ladder": read_runs(study.rows), **rows})
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
    if not a.quick:
        tokens = study.steps * study.tokens_per_step
        head = HEAD.format(tokens=tokens, init=ladder.INITIALIZATION, rate=ladder.RATE)
        write_atomically(a.out, (head + text).encode())
    print(text)


if __name__ == "__main__":
    main()
