"""From a command line to a checked configuration: every field of `TrainConfig` and of the model's config is a flag."""

import functools
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, make_dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from torch import OutOfMemoryError
from torch.distributed.elastic.multiprocessing.errors import record

from llm.checkpoint import CheckpointError
from llm.config import ModelConfig, TrainConfig
from llm.data import Data
from llm.distributed import Ranks, join_ranks, leave_ranks
from llm.run_directory import RunDirectoryError
from llm.tokenization import make_sample

SAMPLE = {
    "data": Path("data/sample"),
    "steps": 300,
    "tokens_per_step": 4_096,
    "micro_batch_size": 16,
    "max_lr": 3e-3,
    "min_lr": 3e-4,
    "warmup_steps": 40,
    "log_every": 5,
    "eval_every": 100,
    "eval_windows": 64,
    "save_every": 100,
}


@dataclass(frozen=True)
class Settings:
    """What the command line said."""

    model: ModelConfig
    train: TrainConfig
    vocab_size_given: bool

    def model_for(self, data: Data) -> ModelConfig:
        """The model's config with the vocabulary of the data. Raises ValueError where another one was asked for."""
        if self.vocab_size_given and self.model.vocab_size != data.vocab_size:
            raise ValueError(
                f"vocab_size = {self.model.vocab_size}, but {data.folder} has {data.vocab_size} entries: "
                f"leave --model.vocab-size out, or run pre_tokenize.py with --vocab-size {self.model.vocab_size}"
            )
        return replace(self.model, vocab_size=data.vocab_size)


def parse_arguments(Config: type[ModelConfig], arguments: list[str] | None = None) -> Settings:
    """Read the flags of a training script (default: the process's own).

    `--sample` changes the defaults to a small model and a short run on built-in stories, which it writes if need be;
    every other flag still counts. Exits with help or a message where the flags are wrong.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    sample = "--sample" in arguments
    Flags = make_dataclass(
        "Flags",
        [
            ("train", Annotated[TrainConfig, tyro.conf.arg(name="")], TrainConfig(**SAMPLE if sample else {})),
            ("model", Config, Config(**Config.small if sample else {})),
            ("sample", Annotated[bool, tyro.conf.arg(help=SAMPLE_HELP), tyro.conf.FlagCreatePairsOff], False),
        ],
        frozen=True,
    )
    flags: Any = tyro.cli(Flags, args=arguments)
    if sample and flags.train.data == SAMPLE["data"]:
        ranks = Ranks.current()
        if ranks.is_first:
            make_sample(flags.train.data)
        ranks.wait()
    given = any(re.match(r"--model\.vocab[-_]size\b", argument) for argument in arguments)
    return Settings(flags.model, flags.train, given)


SAMPLE_HELP = "Train a small model on built-in stories: about two minutes on a laptop without a GPU."


def command(main: Callable[[list[str] | None], Any]) -> Callable[[list[str] | None], Any]:
    """Make `main` a command: join the ranks that torchrun started, leave them at the end, and turn the errors that a
    user can mend into one line and exit status 2."""

    @functools.wraps(main)
    @record
    def run(arguments: list[str] | None = None) -> Any:
        join_ranks()
        try:
            return main(arguments)
        except (
            ValueError,
            FileNotFoundError,
            CheckpointError,
            RunDirectoryError,
            FloatingPointError,
            OutOfMemoryError,
        ) as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from error
        finally:
            leave_ranks()

    return run
