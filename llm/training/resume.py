"""Where a run starts: at step 0, or after the step of a checkpoint from which it goes on."""

import json
import re
import shutil
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path

import torch

from llm.config import ModelConfig, TrainConfig
from llm.data.files import Data
from llm.models import MODELS
from llm.models.transformer import Transformer
from llm.training.checkpoint import (
    CONFIG,
    CheckpointError,
    load_model_weights,
    load_training_state,
    newest_good,
    verify_checkpoint,
)
from llm.training.distributed import Ranks
from llm.training.optim import fit_groups
from llm.training.run_directory import existing_config, take_lock
from llm.training.sharding import is_part, optimizer_parts

# The settings that determine the weights after each step and the loss on the eval split. Others, such as device, paths
# and logging, may change when a run is resumed.
BUDGET = (
    "seed|tokens_per_step|steps|max_lr|min_lr|warmup_steps|optimizer|weight_decay|beta1|beta2|grad_clip|eval_windows"
)
SAME_RUN = re.compile(rf"model_name|model\..+|data\.vocab_size|data\..*sha256.*|train\.({BUDGET})")


@dataclass
class Progress:
    """The number of finished steps and the lowest eval loss so far."""

    step: int = 0
    best_eval_loss: float = float("inf")


def run_record(Model: type[Transformer], model_config: ModelConfig, config: TrainConfig, data: Data) -> dict:
    """All that rebuilds the model and repeats the run, as plain values. Raises ValueError for an unknown model."""
    names = [name for name, known in MODELS.items() if known is Model]
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
    """The checkpoint that `--resume` asks for: the newest good one of `out`, none, or the one at a path.

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
    check_same_run(model_settings(saved), model_settings(record))
    return checkpoint


def model_settings(record: dict) -> dict:
    """The part of a record that the weights must fit: training may go on with another budget or text, and in another
    stage where the model has several (`stage_fields`), but not with another model or tokenizer."""
    Model = MODELS.get(record["model_name"], Transformer)
    return {
        "model_name": record["model_name"],
        "model": {name: value for name, value in record["model"].items() if name not in Model.stage_fields},
        "data": {"tokenizer_sha256": record["data"]["tokenizer_sha256"]},
    }


def set_aside(out: Path) -> None:
    """Rename an earlier run at `out` to `<out>.1`, `<out>.2`, .., so that a new one can start there.

    Raises RunDirectoryError where another process still uses it.
    """
    if not (out / "config.json").exists():
        return
    take_lock(out / "lock").close()
    number = next(n for n in range(1, 10_000) if not out.with_name(f"{out.name}.{n}").exists())
    shutil.move(out, out.with_name(f"{out.name}.{number}"))
    print(f"the earlier run now lies in {out.with_name(f'{out.name}.{number}')}")


def restore(checkpoint: Path, model: Transformer, optimizer: torch.optim.Optimizer) -> Progress:
    """Fill model and optimiser from a verified checkpoint, whether or not they are sharded; returns its progress.

    `load_state_dict` also restores the saved settings of the optimiser. They are replaced by those of the flags.
    """
    load_model_weights(checkpoint, model)
    sharded = any(map(is_part, model.parameters()))
    saved = load_training_state(checkpoint, in_file=sharded)
    settings = [{name: value for name, value in g.items() if name != "params"} for g in optimizer.param_groups]
    state = fit_groups(saved["optimizer_state"], model, optimizer)
    optimizer.load_state_dict(optimizer_parts(state, optimizer) if sharded else state)
    for group, given in zip(optimizer.param_groups, settings, strict=True):
        group.update(given)
    return Progress(saved["step"], saved["state"]["best_eval_loss"])


def go_on_from(
    checkpoint: Path | None, model: Transformer, optimizer: torch.optim.Optimizer, config: TrainConfig, ranks: Ranks
) -> Progress:
    """Restore model and optimiser from `checkpoint` on every rank, or start at step 0 where it is None."""
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
    """Raises CheckpointError where ranks go on from different steps, as on machines that do not share a disk."""
    mean = ranks.average(torch.tensor(step, dtype=torch.float64)).item()
    if mean != step:
        raise CheckpointError(
            f"rank {ranks.rank} goes on after step {step} and others do not: {out} must be one folder that all "
            f"machines share (--out)"
        )


def check_same_run(saved_config: dict, config: dict) -> None:
    """Raises CheckpointError where architecture, sizes, tokenizer, data, seed or budget are not those that were saved.

    The message lists each field that differs, with its saved and its given value.
    """
    saved, given = identity(completed(saved_config, config)), identity(config)
    different = [name for name in sorted(saved.keys() | given.keys()) if saved.get(name) != given.get(name)]
    if different:
        lines = [
            f"  {name}: saved {saved.get(name, 'nothing')}, given {given.get(name, 'nothing')}" for name in different
        ]
        remedy = "Give the saved values, or another run directory (--out); --resume PATH begins it with these weights."
        raise CheckpointError("\n".join(["the settings are not those this run was saved with:", *lines, remedy]))


def completed(record: dict, given: dict) -> dict:
    """A record that may be older than some of the given settings of its model, with these at their defaults."""
    Model = MODELS.get(record.get("model_name"))
    known = fields(Model.Config) if Model else ()
    defaults = {
        field.name: field.default for field in known if field.default is not MISSING and field.name in given["model"]
    }
    return record | {"model": defaults | record.get("model", {})}


def identity(config: dict, prefix: str = "") -> dict[str, str]:
    """The fields in SAME_RUN, by dotted name, as JSON text: a tuple then equals the list it was saved as."""
    found = {}
    for key, value in config.items():
        if isinstance(value, dict):
            found |= identity(value, f"{prefix}{key}.")
        elif SAME_RUN.fullmatch(f"{prefix}{key}"):
            found[f"{prefix}{key}"] = json.dumps(value, default=str)
    return found
