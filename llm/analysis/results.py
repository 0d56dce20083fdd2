"""Runs that a study recorded, one JSON object a line, and what they say of a model: its best learning rate decides.

A learning rate that suits one architecture harms another. So a study trains each model at several rates, and the model
is judged at the rate with the best mean over seeds.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Run = dict[str, Any]


def read_runs(file: Path) -> list[Run]:
    """The runs in `file`, none where it does not exist. Raises ValueError for a line that is no JSON object."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    runs = []
    for number, line in enumerate(lines, 1):
        try:
            runs.append({**json.loads(line)})
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file}, line {number} is no JSON object: {line[:40]!r} (delete it)") from error
    return runs


def find(runs: Iterable[Run], **values: Any) -> list[Run]:
    """The runs that have these values."""
    return [run for run in runs if all(run.get(name) == value for name, value in values.items())]


def at_best_rate(runs: Iterable[Run], score: Callable[[Run], float]) -> list[Run]:
    """The runs at the learning rate with the highest mean score; empty where there are none. Rates are compared on the
    seeds that all of them have, since the best rate may have been given more; equal ones on the seeds that each has."""
    rates: dict[float, list[Run]] = {}
    for run in runs:
        rates.setdefault(run["rate"], []).append(run)
    shared = set.intersection(*({run["seed"] for run in group} for group in rates.values())) if rates else set()

    def judged(group: list[Run]) -> tuple[float, float]:
        return mean(score(run) for run in group if run["seed"] in shared or not shared), mean(map(score, group))

    return max(rates.values(), key=judged, default=[])


SOLVED = 0.99
"""A probe is solved at this accuracy; above it, rates are equally good."""


def at_best_probe_rate(runs: Iterable[Run]) -> list[Run]:
    """Of runs of train_scripts/probe.py, those at the rate with the best accuracy at the trained length."""
    return at_best_rate(runs, lambda run: min(run["accuracy"]["1"], SOLVED))


def probe_accuracy(runs: Iterable[Run], model: str, task: str, times: str) -> float | None:
    """Of the runs of train_scripts/probe.py: the mean over seeds at `times` the trained length, at the rate that is the
    best at the trained length. None where it was not measured."""
    found = [run for run in runs if (run["model"], run["task"]) == (model, task)]
    values = [run["accuracy"].get(times) for run in at_best_probe_rate(found)]
    return mean(values) if values and None not in values else None


def origin(runs: list[Run]) -> str:
    """In a sentence, where these runs come from."""
    named = {
        "seeds": sorted({run["seed"] for run in runs}),
        "commits": sorted({str(run["commit"])[:7] for run in runs}),
        "device": sorted({run["device"] for run in runs}),
    }
    return f"{len(runs)} runs; " + "; ".join(f"{name}: {', '.join(map(str, v))}" for name, v in named.items()) + "."


def mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)
