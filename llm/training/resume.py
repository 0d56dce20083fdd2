"""Where a run begins: at step 0, or after the step of the checkpoint it goes on from."""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from llm.checkpoint import (
    CONFIG,
    CheckpointError,
    check_same_run,
    load_model_weights,
    load_training_state,
    newest_good,
    verify_checkpoint,
)
from llm.config import ModelConfig, TrainConfig
from llm.data import Data
from llm.distributed import Ranks
from llm.models import MODELS
from llm.models.transformer import Transformer
from llm.run_directory import existing_config, take_lock


@dataclass
class Progress:
    """How far a run has come: finished steps and the lowest eval loss so far."""

    step: int = 0
    best_eval_loss: float = float("inf")


def run_record(Model: type[Transformer], model_config: ModelConfig, config: TrainConfig, data: Data) -> dict:
    """All that rebuilds the model and repeats the run, as plain values. Raises ValueError for an unknown model."""
    names = [name for name, (known, _) in MODELS.items() if known is Model]
    if not names:
        raise ValueError(
            f"{Model.__name__} is not in MODELS: add it to llm/models/__init__.py, so it can be loaded again"
        )
    return {
        "model_name": names[0],
        "model": asdict(model_config),
        "train": {name: str(value) if isinstance(value, Path) else value for name, value in asdict(config).items()},
        "data": {
            "folder": str(data.folder),
            "vocab_size": data.vocab_size,
            "tokenizer_sha256": data.tokenizer_sha256,
            "train_sha256": data.train_sha256,
            "eval_sha256": data.eval_sha256,
        },
    }


def find_checkpoint(resume: str, out: Path, record: dict) -> Path | None:
    """What `--resume` asks for: the newest good checkpoint of `out`, none, or the one at a path.

    Raises CheckpointError where the run directory belongs to other settings, or the checkpoint is damaged.
    """
    if resume == "never":
        return None
    if (before := existing_config(out)) is not None:
        check_same_run(before, record)
    if resume == "auto":
        return newest_good(out / "checkpoints")
    checkpoint = Path(resume)
    verify_checkpoint(checkpoint)
    saved = json.loads((checkpoint / CONFIG).read_text(encoding="utf-8"))
    check_same_run(what_it_is(saved), what_it_is(record))
    return checkpoint


def what_it_is(record: dict) -> dict:
    """The part of a record that weights depend on: another budget or other text may follow, another model may not."""
    return {
        "model_name": record["model_name"],
        "model": record["model"],
        "data": {"tokenizer_sha256": record["data"]["tokenizer_sha256"]},
    }


def set_aside(out: Path) -> None:
    """Make room for a run that starts anew: an earlier one at `out` is kept as `<out>.1`, `<out>.2`, ..

    Raises RunDirectoryError where another process still uses it.
    """
    if not (out / "config.json").exists():
        return
    take_lock(out / "lock").close()
    number = next(n for n in range(1, 10_000) if not out.with_name(f"{out.name}.{n}").exists())
    shutil.move(out, out.with_name(f"{out.name}.{number}"))
    print(f"the earlier run now lies in {out.with_name(f'{out.name}.{number}')}")


def restore(checkpoint: Path, model: Transformer, optimizer: torch.optim.Optimizer) -> Progress:
    """Fill model and optimiser from a verified checkpoint; returns how far it had come.

    The optimiser's settings stay those of the flags: `load_state_dict` would bring back the saved ones.
    """
    load_model_weights(checkpoint, model)
    saved = load_training_state(checkpoint)
    settings = [{name: value for name, value in g.items() if name != "params"} for g in optimizer.param_groups]
    optimizer.load_state_dict(saved["optimizer_state"])
    for group, given in zip(optimizer.param_groups, settings, strict=True):
        group.update(given)
    return Progress(saved["step"], saved["state"]["best_eval_loss"])


def begin(
    model: Transformer, optimizer: torch.optim.Optimizer, checkpoint: Path | None, config: TrainConfig, ranks: Ranks
) -> Progress:
    """Bring model and optimiser to where the run goes on, on every rank: to `checkpoint`, or to the start."""
    if ranks.is_first and config.resume == "never":
        set_aside(config.out)
    ranks.wait()
    try:
        progress = restore(checkpoint, model, optimizer) if checkpoint else Progress()
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"{checkpoint} does not fit this optimiser ({error}): give the --optimizer it was saved with"
        ) from error
    check_same_step(progress.step, config.out, ranks)
    return progress


def check_same_step(step: int, out: Path, ranks: Ranks) -> None:
    """Raises CheckpointError where ranks go on from different steps, as machines do that do not share a disk."""
    mean = ranks.average(torch.tensor(step, dtype=torch.float64)).item()
    if mean != step:
        raise CheckpointError(
            f"rank {ranks.rank} goes on after step {step} and others do not: {out} must be one folder that all "
            f"machines share (--out)"
        )
