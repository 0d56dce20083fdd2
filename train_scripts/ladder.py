"""Train every model on the same tokens and compare them in one table and one picture.

    python train_scripts/ladder.py                                        # the default size, on a GPU
    python train_scripts/ladder.py --small                                # small models, two hours on a CPU

Each model is trained by its own script in a process of its own, so that its peak memory is measured alone. The table is
written again after each run. Finished runs are not trained again, so an interrupted ladder goes on where it stopped.
"""

import contextlib
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import tyro

from llm.analysis.compare import Result, compare, read_run
from llm.config import TrainConfig
from llm.console import console
from llm.data.files import open_tokens
from llm.models import MODELS
from llm.training.run_directory import RunDirectoryError

SMALL = ["--sample", "--steps", "244", "--tokens-per-step", "4096", "--eval-windows", "128", "--eval-every", "61"]
EPOCHS = 10  # at most, at the default size: text that is read more often is memorised


@dataclass(frozen=True)
class Arguments:
    """Train every model on the same tokens and compare them. Flags after `--` go to every training script."""

    models: tuple[str, ...] = tuple(MODELS)
    """Which models, in the order of the table; the first is the reference."""
    baseline_seeds: int = 3
    """Seeds for the first model; their spread tells which differences are more than noise."""
    seeds: int | None = None
    """Seeds for every other model; where it is not given, 3, or 1 with --small."""
    small: bool = False
    """1 M tokens each at d_model 128, 4 layers, 4 heads, context 256; otherwise the default size, 10 epochs at most."""
    data: Path = Path("data/tinystories")
    """Folder that pre_tokenize.py wrote."""
    out: Path = Path("runs/ladder")
    """Folder for the runs, comparison.md and comparison.png."""

    def runs(self) -> list[tuple[str, int]]:
        """Model and seed of each run, in the order of the table."""
        others = (1 if self.small else 3) if self.seeds is None else self.seeds
        seeds = {name: others for name in self.models} | {self.models[0]: self.baseline_seeds}
        return [(name, seed) for name in self.models for seed in range(seeds[name])]

    def budget(self) -> list[str]:
        """The flags that say how much each model is trained."""
        if self.small:
            return SMALL
        train = TrainConfig()
        steps = min(train.steps, EPOCHS * len(open_tokens(self.data).train) // train.tokens_per_step)
        return ["--steps", str(max(steps, 1)), "--eval-every", str(max(steps // 4, 1))]


@console()
def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    split = arguments.index("--") if "--" in arguments else len(arguments)
    flags = tyro.cli(Arguments, args=arguments[:split])
    unknown = [name for name in flags.models if name not in MODELS]
    if unknown:
        sys.exit(f"error: no model is called {', '.join(unknown)}; there are {', '.join(MODELS)} (--models)")
    try:
        rest = [*flags.budget(), "--data", str(flags.data), *arguments[split + 1 :]]
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
    runs = {run: flags.out / f"{run[0]}-{run[1]}" for run in flags.runs()}
    for number, ((name, seed), out) in enumerate(runs.items(), 1):
        print(f"\n[{number}/{len(runs)}] {name}, seed {seed}", flush=True)
        script = Path(__file__).with_name(f"train_{name}.py")
        done = subprocess.run([sys.executable, script, *rest, "--seed", str(seed), "--out", str(out)])
        if done.returncode:
            sys.exit(f"{script.name} ended with status {done.returncode}; the same command goes on from here")
        try:
            compare(list(finished(runs.values())), flags.out)
        except ValueError as error:
            sys.exit(f"error: {error}")


def finished(folders: Iterable[Path]) -> Iterator[Result]:
    """The runs that are complete, also those of an earlier ladder that was interrupted."""
    for folder in folders:
        with contextlib.suppress(RunDirectoryError):
            yield read_run(folder)


if __name__ == "__main__":
    main()
