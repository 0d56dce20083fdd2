"""Checkpoints that survive a kill, a full disk and a flipped byte, and whose loading never executes code.

A checkpoint is a sealed folder `step-000050/` (see sealed_folder.py):

    model.safetensors      weights of the plain module
    training_state.pt      optimizer and loop state: tensors and plain Python values, loads with weights_only=True
    config.json            what rebuilds the model
    tokenizer-bpe.json     a copy, so the folder alone is enough to generate text
    manifest.json          format, step, whether it was the best so far, size and SHA-256 of each file

The newest two and the best are kept. Checkpoints of later steps than the one being saved belong to a past from which
the run was rewound; they are set aside as `abandoned-step-000080`, which nothing here reads.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llm.sealed_folder import DamagedFolder, clean_leftovers, put_in_place, read_manifest, remove, seal, verify

FORMAT = 1
WEIGHTS, STATE, CONFIG, TOKENIZER = "model.safetensors", "training_state.pt", "config.json", "tokenizer-bpe.json"
KEEP_NEWEST = 2
NAME = re.compile(r"step-(\d{6,})(\.replaced)?")
FULL_DISK = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
# What decides the weights after each step, and what they are evaluated on. Speed, device, paths and logs may change.
BUDGET = (
    "seed|tokens_per_step|steps|max_lr|min_lr|warmup_steps|optimizer|weight_decay|beta1|beta2|grad_clip|eval_windows"
)
SAME_RUN = re.compile(rf"model_name|model\..+|data\.vocab_size|data\..*sha256.*|train\.({BUDGET})")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, found, trusted or used; the message says which file, why and what to do."""


def save_checkpoint(
    folder: Path,
    *,
    step: int,
    model: nn.Module,
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
        model: a wrapper from torch.compile or DDP is taken off.
        optimizer_state, state: nested dicts, lists and tuples of tensors, str, int, float, bool and None.
        config: what `json` can write (paths become strings).
        tokenizer: copied in where given.
        keep_best: this step has the lowest eval loss so far.

    Raises:
        CheckpointError: the disk is full or refuses, or the state holds something else than is allowed. Nothing is left
            behind and earlier checkpoints are untouched.
    """
    target = Path(folder) / f"step-{step:06d}"
    temporary = target.with_name(target.name + ".tmp")
    best = keep_best or best_checkpoint(folder) == target  # saving a step again does not make it worse
    weights = {name: tensor.detach().to("cpu", copy=True) for name, tensor in _plain(model).state_dict().items()}
    training_state = {"step": step, "optimizer_state": optimizer_state, "state": state}
    needed = sum(tensor.nbytes for tensor in [*weights.values(), *_tensors(training_state, STATE)])
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        clean_leftovers(target.parent)
        temporary.mkdir(exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, temporary / WEIGHTS)
        torch.save(training_state, temporary / STATE)
        (temporary / CONFIG).write_text(json.dumps(config, indent=2, default=str) + "\n", encoding="utf-8")
        if tokenizer is not None:
            shutil.copyfile(tokenizer, temporary / TOKENIZER)
        seal(temporary, {"format": FORMAT, "step": step, "best": best})
        put_in_place(temporary, target)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(_why_not_saved(target, needed, error)) from error
    _prune(target)
    return target


def _plain(model: nn.Module) -> nn.Module:
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    return getattr(model, "_orig_mod", model)  # torch.compile(module) would prefix every name


def _tensors(value: Any, where: str) -> Iterator[Tensor]:
    """Every tensor in nested plain values; refuses at once what could be saved but never be loaded again."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _tensors(inner, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for index, inner in enumerate(value):
            yield from _tensors(inner, f"{where}[{index}]")
    elif value is not None and type(value) not in (str, int, float, bool):
        raise CheckpointError(f"{where} is a {type(value).__name__}: allowed are tensors and plain Python values")


def _why_not_saved(target: Path, needed: int, error: Exception) -> str:
    # Python's own files have an errno, safetensors prints it, torch.save only says that an enforcement failed
    full = getattr(error, "errno", None) in FULL_DISK or "enforce fail" in str(error)
    if not full and not any(f"(os error {code})" in str(error) for code in FULL_DISK):
        return f"cannot save {target}: {error}. Check the permissions or choose another run directory (--out)."
    free = shutil.disk_usage(next(path for path in target.absolute().parents if path.exists())).free
    return (
        f"disk full: {target.name} needs about {needed / 1e6:,.1f} MB, {free / 1e6:,.1f} MB free at {target.parent}. "
        f"Nothing was left behind and earlier checkpoints are intact; make room and resume. ({error})"
    )


def _prune(saved: Path) -> None:
    """Keep the one just saved, the one before it and the best; a failure only warns, the next save tries again."""
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
    """Complete checkpoints of a run, oldest first; not verified. Empty where there is no such folder."""
    found = {}
    for path in sorted(Path(folder).glob("step-*")):  # "step-000050" sorts before "step-000050.replaced" and wins
        if path.is_dir() and (match := NAME.fullmatch(path.name)):
            found.setdefault(int(match[1]), path)
    return [found[step] for step in sorted(found)]


def best_checkpoint(folder: Path) -> Path | None:
    """The one with the lowest eval loss; its manifest says so, which no crash can part from the weights."""
    for path in reversed(find_checkpoints(folder)):
        try:
            if read_manifest(path).get("best"):
                return path
        except DamagedFolder:
            continue
    return None


def newest_good(folder: Path) -> Path | None:
    """The newest checkpoint that verifies; one printed line for each newer one that does not. None: there is none yet.

    Raises:
        CheckpointError: there are checkpoints but every one is damaged; beginning again must be the user's choice.
    """
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
    """Compare size and SHA-256 of every file with the manifest, which is returned: format, step, best, files.

    Raises:
        CheckpointError: names the file, what was expected and what was found.
    """
    path = Path(path)
    try:
        manifest = verify(path)
    except DamagedFolder as error:
        raise CheckpointError(f"not a good checkpoint: {error} {_advice(path)}") from None
    if manifest.get("format") != FORMAT or not {WEIGHTS, STATE, CONFIG} <= set(manifest["files"]):
        raise CheckpointError(f"{path} has format {manifest.get('format')}, this code reads {FORMAT}. {_advice(path)}")
    return manifest


def _advice(path: Path) -> str:
    others = [other.name for other in find_checkpoints(path.parent) if other != path]
    return f"Use another checkpoint of {path.parent} (there: {', '.join(others) or 'none'}) or copy this one again."


def load_model_weights(path: Path, model: nn.Module) -> None:
    """Fill `model` in place, on whatever device and in whatever dtype it is; every name and shape must agree.

    Raises:
        CheckpointError: unreadable file, or names that are missing, left over or of another shape.
    """
    file, model = Path(path) / WEIGHTS, _plain(model)
    try:
        weights = load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}. {_advice(Path(path))}") from None
    wanted = model.state_dict()
    common = sorted(wanted.keys() & weights.keys())
    shapes = {name: (tuple(weights[name].shape), tuple(wanted[name].shape)) for name in common}
    problems = {
        "missing": sorted(wanted.keys() - weights.keys()),
        "left over": sorted(weights.keys() - wanted.keys()),
        "of another shape": [f"{name} {saved}, not {here}" for name, (saved, here) in shapes.items() if saved != here],
    }
    if any(problems.values()):
        # six names tell which part differs; sixty hide it
        lines = [f"  {len(names)} {kind}: {'; '.join(names[:6])}" for kind, names in problems.items() if names]
        raise CheckpointError("\n".join([f"{file} holds another model than this {type(model).__name__}:", *lines]))
    model.load_state_dict(weights)


def load_training_state(path: Path) -> dict:
    """`{"step": int, "optimizer_state": dict, "state": dict}` as saved, tensors on the CPU. Never executes code.

    Raises:
        CheckpointError: the file is not what `save_checkpoint` wrote.
    """
    file = Path(path) / STATE
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's own text advises to load unsafely, so it is not shown
        reason = error.strerror if isinstance(error, OSError) else "it is not a training state of plain data"
        raise CheckpointError(f"{file} was refused: {reason}. {_advice(Path(path))}") from None


def check_same_run(saved_config: dict, config: dict) -> None:
    """Refuse to go on with another architecture, size, tokenizer, data, seed or budget than was saved.

    Raises:
        CheckpointError: lists each field that differs with its saved and its given value.
    """
    saved, given = _identity(saved_config), _identity(config)
    different = [name for name in sorted(saved.keys() | given.keys()) if saved.get(name) != given.get(name)]
    if different:
        lines = [
            f"  {name}: saved {saved.get(name, 'nothing')}, given {given.get(name, 'nothing')}" for name in different
        ]
        remedy = "Give the saved values, or another run directory (--out); --resume PATH begins it with these weights."
        raise CheckpointError("\n".join(["the settings are not those this run was saved with:", *lines, remedy]))


def _identity(config: dict, prefix: str = "") -> dict[str, str]:
    """The fields that make a run what it is, by dotted name, as JSON text (a tuple equals the list it was saved as)."""
    found = {}
    for key, value in config.items():
        if isinstance(value, dict):
            found |= _identity(value, f"{prefix}{key}.")
        elif SAME_RUN.fullmatch(f"{prefix}{key}"):
            found[f"{prefix}{key}"] = json.dumps(value, default=str)
    return found
