"""Checkpoints that survive a kill, a full disk and a flipped byte, and whose loading never executes code.

A checkpoint is a sealed folder `step-000050/` (see sealed_folder.py):

    model.safetensors      weights of the plain module
    training_state.pt      optimizer and loop state: tensors and plain Python values, loads with weights_only=True
    config.json            everything that rebuilds the model
    tokenizer-bpe.json     a copy, so the folder alone is enough to generate text
    manifest.json          format, step, whether it was the best so far, size and SHA-256 of each file

The newest two and the best are kept. If a run goes back to an earlier checkpoint, those of later steps are renamed to
`abandoned-step-000080`, which nothing here reads.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from llm.data.files import TOKENIZER_FILE
from llm.files import DISK_FULL, tensor_problems
from llm.training.sealed_folder import DamagedFolder, clean_leftovers, put_in_place, read_manifest, remove, seal, verify
from llm.training.sharding import part_like

FORMAT = 1
WEIGHTS, STATE, CONFIG = "model.safetensors", "training_state.pt", "config.json"
KEEP_NEWEST = 2
NAME = re.compile(r"step-(\d{6,})(\.replaced)?")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, found, trusted or used; the message says which file, why and what to do."""


def save_checkpoint(
    folder: Path,
    *,
    step: int,
    weights: dict[str, Tensor],
    optimizer_state: dict,
    state: dict,
    config: dict,
    tokenizer: Path | None,
    keep_best: bool,
) -> Path:
    """Write `folder/step-<step>` all or nothing, then remove all but the newest two and the best.

    Args:
        folder: holds the checkpoints of one run; created if missing.
        step: finished optimizer steps.
        weights: the model's `state_dict()`, whole. It is emptied, so that no two copies of all weights are held.
        optimizer_state, state: nested dicts, lists and tuples of tensors, str, int, float, bool and None.
        config: values that `json` can write (paths become strings).
        tokenizer: a file to copy, if given.
        keep_best: this step has the lowest eval loss so far.

    Raises CheckpointError where the disk is full or refuses, or the state holds a value that is not allowed. Nothing is
    left behind then, and earlier checkpoints are untouched.
    """
    target = Path(folder) / f"step-{step:06d}"
    temporary = target.with_name(target.name + ".tmp")
    best = keep_best or best_checkpoint(folder) == target  # a step that is saved again stays the best
    weights = {name: weights.pop(name).detach().to("cpu", copy=True) for name in list(weights)}
    training_state = {"step": step, "optimizer_state": optimizer_state, "state": state}
    needed = sum(tensor.nbytes for tensor in [*weights.values(), *tensors_in(training_state, STATE)])
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        clean_leftovers(target.parent)
        temporary.mkdir(exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, temporary / WEIGHTS)
        torch.save(training_state, temporary / STATE)
        (temporary / CONFIG).write_text(json.dumps(config, indent=2, default=str) + "\n", encoding="utf-8")
        if tokenizer is not None:
            shutil.copyfile(tokenizer, temporary / TOKENIZER_FILE)
        seal(temporary, {"format": FORMAT, "step": step, "best": best})
        put_in_place(temporary, target)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(why_not_saved(target, needed, error)) from error
    prune(target)
    return target


def tensors_in(value: Any, where: str) -> Iterator[Tensor]:
    """Every tensor in nested plain values; raises CheckpointError for a value that could be saved but not loaded."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from tensors_in(inner, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for index, inner in enumerate(value):
            yield from tensors_in(inner, f"{where}[{index}]")
    elif value is not None and type(value) not in (str, int, float, bool):
        raise CheckpointError(f"{where} is a {type(value).__name__}: allowed are tensors and plain Python values")


def why_not_saved(target: Path, needed: int, error: Exception) -> str:
    """The message for an error while saving: whether the disk is full, and what to do."""
    # errors of Python's files have an errno, those of safetensors have it in their text, torch.save says neither
    full = getattr(error, "errno", None) in DISK_FULL or "enforce fail" in str(error)
    if not full and not any(f"(os error {code})" in str(error) for code in DISK_FULL):
        return f"cannot save {target}: {error}. Check the permissions or choose another run directory (--out)."
    free = shutil.disk_usage(next(path for path in target.absolute().parents if path.exists())).free
    return (
        f"disk full: {target.name} needs about {needed / 1e6:,.1f} MB, {free / 1e6:,.1f} MB free at {target.parent}. "
        f"Nothing was left behind and earlier checkpoints are intact; make room and resume. ({error})"
    )


def prune(saved: Path) -> None:
    """Keep the checkpoint just saved, the one before it and the best. A failure is a warning; the next save retries."""
    checkpoints = find_checkpoints(saved.parent)
    newest = checkpoints.index(saved) + 1
    kept = {*checkpoints[max(0, newest - KEEP_NEWEST) : newest], best_checkpoint(saved.parent)}
    for index, path in enumerate(checkpoints):
        try:
            if index >= newest:
                aside = path.with_name(f"abandoned-{path.name}")
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(path, aside)
                print(f"note: {aside} is later than the step this run went on from; kept, yours to delete")
            elif path not in kept:
                remove(path)
        except OSError as error:
            print(f"warning: old checkpoint {path} was not removed: {error}")


def find_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first, not verified; none where there is no such folder."""
    found = {}
    for path in sorted(Path(folder).glob("step-*")):  # "step-000050" sorts before "step-000050.replaced" and wins
        if path.is_dir() and (match := NAME.fullmatch(path.name)):
            found.setdefault(int(match[1]), path)
    return [found[step] for step in sorted(found)]


def best_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the lowest eval loss. Its own manifest says so, so no crash can separate the two."""
    for path in reversed(find_checkpoints(folder)):
        try:
            if read_manifest(path).get("best"):
                return path
        except DamagedFolder:
            continue
    return None


def newest_good(folder: Path) -> Path | None:
    """The newest checkpoint that verifies, None where there are none. Prints a line for each newer one that is damaged.
    Raises CheckpointError where every checkpoint is damaged, since it is the user's choice whether to start over."""
    checkpoints = find_checkpoints(folder)
    for path in reversed(checkpoints):
        try:
            verify_checkpoint(path)
            return path
        except CheckpointError as error:
            print(f"warning: skipped {path.name}: {error}")
    if checkpoints:
        raise CheckpointError(
            f"all {len(checkpoints)} checkpoints in {folder} are damaged; to start over: --resume never"
        )
    return None


def verify_checkpoint(path: Path) -> dict:
    """Compare size and SHA-256 of every file with the manifest, which is returned: format, step, best, files. Raises
    CheckpointError, which names the file, what was expected and what was found."""
    path = Path(path)
    try:
        manifest = verify(path)
    except DamagedFolder as error:
        raise CheckpointError(f"not a good checkpoint: {error} {advice(path)}") from None
    if manifest.get("format") != FORMAT or not {WEIGHTS, STATE, CONFIG} <= set(manifest["files"]):
        raise CheckpointError(f"{path} has format {manifest.get('format')}, this code reads {FORMAT}. {advice(path)}")
    return manifest


def advice(path: Path) -> str:
    """What to do instead of using the damaged checkpoint at `path`."""
    others = [other.name for other in find_checkpoints(path.parent) if other != path]
    return f"Use another checkpoint of {path.parent} (there: {', '.join(others) or 'none'}) or copy this one again."


def load_model_weights(path: Path, model: nn.Module) -> None:
    """Fill `model` in place, tensor by tensor, on its device and in its dtype; a sharded one takes its part of each.
    Raises CheckpointError where the file is unreadable, or tensors are missing, left over or of another shape."""
    file, ours = Path(path) / WEIGHTS, model.state_dict()
    try:
        with safe_open(file, "pt") as saved:
            shapes = {name: tuple(saved.get_slice(name).get_shape()) for name in saved.keys()}  # noqa: SIM118
            if problems := tensor_problems(shapes, {name: tuple(tensor.shape) for name, tensor in ours.items()}):
                raise CheckpointError(
                    "\n".join([f"{file} holds another model than this {type(model).__name__}:", *problems])
                )
            for name, tensor in ours.items():
                tensor.copy_(part_like(saved.get_tensor(name), tensor))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}. {advice(Path(path))}") from None


def load_training_state(path: Path, in_file: bool = False) -> dict:
    """`{"step": int, "optimizer_state": dict, "state": dict}` as saved, tensors on the CPU, or left in the file until
    they are read (`in_file`). Never executes code. Raises CheckpointError where the file is not what `save_checkpoint`
    wrote."""
    file = Path(path) / STATE
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=in_file)
    except Exception as error:  # torch's own text advises to load unsafely, so it is not shown
        reason = error.strerror if isinstance(error, OSError) else "it is not a training state of plain data"
        raise CheckpointError(f"{file} was refused: {reason}. {advice(Path(path))}") from None
