"""What a model does: its rows in the tables of the docs, and what the ladder and the probes recorded of it.

A table is {page, title, head, rows}: the file that it comes from, what it says, and cells of text. `head` is empty
where the first cell of each row is its name.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llm.analysis.accounting import units
from llm.analysis.probes import TASKS
from llm.analysis.results import Run, at_best_rate, find, mean, probe_accuracy, read_runs
from llm.gallery.docstrings import ROOT

DOCS = ROOT / "docs"
REFERENCE = "baseline"

Table = dict[str, Any]


def results(name: str, docs: Path = DOCS) -> list[Table]:
    """All tables about a model of MODELS. Where runs are recorded one by one, the page made of them is not read."""
    recorded = docs / "results"
    pages = [docs / "case_studies.md", docs / "experiments.md", *sorted(recorded.glob("**/*.md"))]
    pages = [page for page in pages if page.exists() and not page.with_suffix(".jsonl").exists()]
    return [
        *(table for page in pages for table in rows_of_page(page, name)),
        *ladder(name, recorded / "ladder.jsonl"),
        *probes(name, recorded / "probes.jsonl"),
    ]


def ladder(name: str, file: Path) -> Iterator[Table]:
    """One column for each budget at which the model was trained, at its best learning rate there."""
    columns = {}
    finished = [run for run in find(read_runs(file), study="ladder") if run["eval_loss"] is not None]
    as_others = [run for run in finished if run.get("settings", {}).keys() <= {"initialization"}]
    for budget, runs in by_budget(as_others).items():
        if name in runs:
            columns[budget] = ladder_column(name, runs)
    if columns:
        names = list(next(iter(columns.values())))
        rows = [[row, *(column[row] for column in columns.values())] for row in names]
        title = "Trained on the same tokens as the others, at its best learning rate"
        yield {"page": relative(file), "title": title, "head": ["", *columns], "rows": rows}


def by_budget(runs: list[Run]) -> dict[str, dict[str, list[Run]]]:
    """What is equal among the models, in words -> model -> its runs."""
    found: dict[str, dict[str, list[Run]]] = {}
    for run in runs:
        equal = "size as it is" if run["match"] == "none" else f"equal {run['match'].replace('flops', 'FLOPs')}"
        budget = f"{equal}, {units(run['tokens']).strip()} tokens"
        found.setdefault(budget, {}).setdefault(run["model"], []).append(run)
    return found


def ladder_column(name: str, runs: dict[str, list[Run]]) -> dict[str, str]:
    best = {model: at_best_rate(found, lambda run: -run["eval_loss"]) for model, found in runs.items()}
    losses = {model: mean(run["eval_loss"] for run in found) for model, found in best.items()}
    own, order = best[name], sorted(losses, key=losses.__getitem__)
    spread = [run["eval_loss"] for run in own]
    reference = f"{losses[REFERENCE]:.3f}" if REFERENCE in losses else ""
    return {
        "eval loss": f"{losses[name]:.3f}" + (f" ({min(spread):.3f} to {max(spread):.3f})" if len(own) > 1 else ""),
        f"that of {REFERENCE}": reference,
        "place": f"{order.index(name) + 1} of {len(order)}",
        "bits per byte": f"{mean(run['eval_bits_per_byte'] for run in own):.3f}",
        "learning rate": f"{own[0]['rate']:g}",
        "seeds": str(len(own)),
        "parameters": units(own[0]["parameters"]).strip(),
        "active": units(own[0]["active_parameters"]).strip(),
        "FLOPs a token": units(own[0]["flops_per_token"]).strip(),
    }


def probes(name: str, file: Path) -> Iterator[Table]:
    """A row for each task: accuracy at each length, that of the reference at the trained length, and a guess."""
    runs = read_runs(file)
    own = [run for run in runs if run["model"] == name]
    lengths = list(dict.fromkeys(times for run in own for times in run["accuracy"]))
    rows = []
    for task in (task for task in TASKS if any(run["task"] == task for run in own)):
        cells = [percent(probe_accuracy(runs, name, task, times)) for times in lengths]
        reference = percent(probe_accuracy(runs, REFERENCE, task, lengths[0]))
        rows.append([task, *cells, reference, percent(TASKS[task].chance)])
    if rows:
        title = "Accuracy on synthetic tasks in percent, by multiple of the trained length"
        head = ["task", *(f"{times} ×" for times in lengths), REFERENCE, "guess"]
        yield {"page": relative(file), "title": title, "head": head, "rows": rows}


def percent(share: float | None) -> str:
    """As train_scripts/probe.py writes it."""
    return "" if share is None else f"{100 * share:.0f}"


def rows_of_page(page: Path, name: str) -> Iterator[Table]:
    """The rows about a model in the Markdown tables of a page, each as a table of its own under the last
    heading. The first cell, which is the name, is left out."""
    header, heading = [], ""
    for line in page.read_text(encoding="utf-8").splitlines():
        cells = [plain(cell) for cell in line.strip().strip("|").split("|")] if line.startswith("|") else []
        if line.startswith("#"):
            heading = plain(line.strip("# "))
        if not cells or not header:
            header = cells
        elif cells[0].split(",")[0] == name and len(cells) == len(header):
            rows = list(zip(header, cells, strict=True))[1:]
            yield {"page": relative(page), "title": heading, "head": [], "rows": rows}


def relative(file: Path) -> str:
    """The path in the repository."""
    return file.relative_to(ROOT).as_posix() if file.is_relative_to(ROOT) else file.name


def plain(cell: str) -> str:
    """A cell of a Markdown table without its link and its bold type."""
    return re.sub(r"\[(.+?)\]\(.+?\)", r"\1", cell).replace("*", "").replace("`", "").strip()
