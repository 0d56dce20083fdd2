"""Train every model on the same tokens and put them into one table and one picture.

    python train_scripts/ladder.py                                        # the default size, on a GPU
    python train_scripts/ladder.py --small --data data/tinystories        # small models, an hour or two on a CPU

Each model is trained by its own script in a process of its own, so its peak memory is its own. After each run the table
is written again; what is finished is not trained again, so an interrupted ladder goes on where it was.
"""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from llm.compare import compare, read_run
from llm.models import MODELS
from llm.run_directory import RunDirectoryError

SMALL = ["--sample", "--steps", "244", "--tokens-per-step", "4096", "--eval-windows", "128", "--eval-every", "61"]


@dataclass(frozen=True)
class Arguments:
    """Train every model on the same tokens and compare them. Flags after `--` go to every training script."""

    models: tuple[str, ...] = tuple(MODELS)
    """Which models, in the order of the table; the first is what the others are held to."""
    baseline_seeds: int = 3
    """Seeds for the first model: their spread tells which differences mean something."""
    seeds: int = 1
    """Seeds for every other model."""
    small: bool = False
    """1 M tokens each at d_model 128, 4 layers, 4 heads, context 256."""
    data: Path = Path("data/tinystories")
    """Folder that pre_tokenize.py wrote."""
    out: Path = Path("runs/ladder")
    """Folder for the runs, comparison.md and comparison.png."""


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    split = arguments.index("--") if "--" in arguments else len(arguments)
    flags = tyro.cli(Arguments, args=arguments[:split])
    unknown = [name for name in flags.models if name not in MODELS]
    if unknown:
        sys.exit(f"error: no model is called {', '.join(unknown)}; there are {', '.join(MODELS)} (--models)")
    rest = [*(SMALL if flags.small else []), "--data", str(flags.data), *arguments[split + 1 :]]
    runs = [(name, seed) for name in flags.models for seed in range(seeds_of(name, flags))]
    results = []
    for number, (name, seed) in enumerate(runs, 1):
        out = flags.out / f"{name}-{seed}"
        print(f"\n[{number}/{len(runs)}] {name}, seed {seed}", flush=True)
        script = Path(__file__).with_name(f"train_{name}.py")
        done = subprocess.run([sys.executable, script, *rest, "--seed", str(seed), "--out", str(out)])
        if done.returncode:
            sys.exit(f"{script.name} ended with status {done.returncode}; the same command goes on from here")
        try:
            results.append(read_run(out))
        except RunDirectoryError as error:
            sys.exit(f"error: {error}")
        compare(results, flags.out)


def seeds_of(name: str, flags: Arguments) -> int:
    """How many seeds a model gets."""
    return flags.baseline_seeds if name == flags.models[0] else flags.seeds


if __name__ == "__main__":
    main()
