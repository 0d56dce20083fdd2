"""Read the command line of a training script: every field of `TrainConfig` and of the model's config is a flag."""

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

from llm.config import ModelConfig, TrainConfig
from llm.console import console
from llm.data.files import Data
from llm.data.sample import make_sample
from llm.training.checkpoint import CheckpointError
from llm.training.distributed import Ranks, join_ranks, leave_ranks
from llm.training.run_directory import RunDirectoryError

SAMPLE: dict[str, Any] = dict(data=Path("data/sample"), steps=300, tokens_per_step=4_096, micro_batch_size=16)
SAMPLE |= dict(max_lr=3e-3, min_lr=3e-4, warmup_steps=40, log_every=5, eval_every=100, eval_windows=64, save_every=100)
SAMPLE_HELP = "Train a small model on built-in stories: about two minutes on a laptop without a GPU."
MENDABLE = (ValueError, FileNotFoundError, CheckpointError, RunDirectoryError, FloatingPointError, OutOfMemoryError)


@dataclass(frozen=True)
class Settings:
    """The settings of a run, as the command line has them."""

    model: ModelConfig
    train: TrainConfig
    vocab_size_given: bool

    def model_for(self, data: Data) -> ModelConfig:
        """The model's config with the vocabulary size of the data. Raises ValueError where another one was given."""
        if self.vocab_size_given and self.model.vocab_size != data.vocab_size:
            raise ValueError(
                f"vocab_size = {self.model.vocab_size}, but {data.folder} has {data.vocab_size} entries: "
                f"leave --model.vocab-size out, or run pre_tokenize.py with --vocab-size {self.model.vocab_size}"
            )
        return replace(self.model, vocab_size=data.vocab_size)


def parse_arguments(Config: type[ModelConfig], arguments: list[str] | None = None) -> Settings:
    """Read the flags of a training script (default: those of this process).

    `--sample` changes the defaults to a small model and a short run on built-in stories, which are written if they are
    missing; other flags still override them. Exits with a message where a flag is wrong.
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
            try:
                make_sample(flags.train.data)
            except OSError as error:
                raise ValueError(f"{error}: name a folder of data with --data, or run where one can write") from error
        ranks.wait()
    given = any(re.match(r"--model\.vocab[-_]size\b", argument) for argument in arguments)
    return Settings(flags.model, flags.train, given)


def command(main: Callable[[list[str] | None], Any]) -> Callable[[list[str] | None], Any]:
    """Make `main` a command. It joins the ranks that torchrun started and leaves them at the end. An error that a user
    can mend is printed in one line, and the exit status is 2."""

    @functools.wraps(main)
    @console()
    @record
    def run(arguments: list[str] | None = None) -> Any:
        join_ranks()
        try:
            return main(arguments)
        except MENDABLE as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from error
        finally:
            leave_ranks()

    return run
