"""The run directory `runs/<name>/`, which one process owns at a time.

config.json      all settings, git commit, versions
metrics.jsonl    one JSON object per logged step
samples.txt      a story at each evaluation
loss.png         the curves, drawn from metrics.jsonl
checkpoints/     see checkpoint.py
lock             process id of the owner
"""

import json
import math
import os
import re
from io import FileIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from llm.files import lock, write_atomically
from llm.training.curve import draw_losses
from llm.training.provenance import git_commit, package_versions
from llm.training.wandb_mirror import WandbMirror


class RunDirectoryError(RuntimeError):
    """The run directory cannot be written, or another process owns it; the message says what to do."""


class RunDirectory:
    """Opens `path` for a run that goes on after `resume_step` (0: from the start). Lines and samples of later steps are
    dropped.

    Args:
        path: created if missing; its name is the name of the run.
        config: values that `json` can write (paths become strings); commit and versions are added.
        wandb: whether metrics are copied to wandb: see wandb_mirror.py.
        resume_step: the step of the checkpoint from which the run goes on.

    Raises RunDirectoryError where it is not writable, or in use by another process, which is named.
    """

    def __init__(
        self, path: Path, config: dict, *, wandb: Literal["auto", "online", "offline", "off"], resume_step: int = 0
    ):
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        config = config | {"commit": git_commit(), "versions": package_versions()}
        text = json.dumps(json_values(config), indent=2) + "\n"
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self._lock = take_lock(self.path / "lock")
            write_atomically(self.path / "config.json", text.encode())
            rewind_metrics(self.path / "metrics.jsonl", resume_step)
            rewind_samples(self.path / "samples.txt", resume_step)
            # unbuffered: each line is one write, and none is lost in this process when it dies
            self._metrics = FileIO(self.path / "metrics.jsonl", "a")
            self._samples = FileIO(self.path / "samples.txt", "a")
        except OSError as error:
            raise RunDirectoryError(f"cannot write to {self.path}: {error}; choose another with --out") from error
        self._mirror = WandbMirror(wandb, self.path, json.loads(text), resumed=resume_step > 0)

    def log(self, step: int, **values: Any) -> None:
        """Append one line. Numbers, arrays and tensors become JSON; what is not finite becomes null. Raises
        RunDirectoryError where the line could not be written whole."""
        line = json_values({"step": step, **values})
        append(self._metrics, json.dumps(line, allow_nan=False) + "\n")
        self._mirror.log(step, {name: value for name, value in line.items() if name != "step"})

    def sample(self, step: int, text: str) -> None:
        """Append a text that the model wrote after `step`. Raises RunDirectoryError like `log`."""
        append(self._samples, f"--- step {step} ---\n{text}\n\n")

    def plot(self) -> None:
        """Draw `loss.png`. Where that fails, one line says so and the run goes on."""
        try:
            metrics = read_metrics(self.path / "metrics.jsonl")
            draw_losses(metrics, self.path / "loss.png", title=self.path.resolve().name)
        except Exception as error:
            print(f"no loss.png: {type(error).__name__}: {error}")

    def close(self, exit_code: int = 0) -> None:
        """End the wandb run, waiting a few seconds at most, and unlock the directory. May be called twice."""
        self._mirror.finish(exit_code)
        self._metrics.close()
        self._samples.close()
        self._lock.close()


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl, without a last line that a crash left incomplete; none where there is no file."""
    lines = Path(path).read_bytes().splitlines() if Path(path).exists() else []
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            found.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise RunDirectoryError(
                    f"{path}, line {number} is not JSON: {line[:80]!r}; mend or remove it"
                ) from None
    return found


def existing_config(path: Path) -> dict | None:
    """The config.json of a run directory, None where there is none. Raises RunDirectoryError for a damaged one."""
    file = Path(path) / "config.json"
    try:
        return json.loads(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise RunDirectoryError(f"{file} cannot be read: {error}; choose another run directory with --out") from None


def take_lock(path: Path) -> FileIO:
    """Open and lock `path`. The system unlocks it when the process ends, however it ends, so a lock is never stale.

    Raises RunDirectoryError, naming the process, where another one holds the lock.
    """
    file = FileIO(path, "a+")
    try:
        lock(file)
    except (BlockingIOError, PermissionError):
        owner = path.read_text(encoding="utf-8").strip() or "unknown"
        raise RunDirectoryError(
            f"{path.parent} is in use by process {owner}: wait for it, stop it, or choose another with --out"
        ) from None
    except OSError as error:
        print(f"note: {path.parent} cannot be locked here ({error}); do not start a second run in it")
    file.truncate(0)
    file.write(f"{os.getpid()}\n".encode())
    return file


def rewind_metrics(file: Path, step: int) -> None:
    """Drop an incomplete last line and all lines after `step`; drop everything where a run starts at step 0."""
    if file.exists():
        kept = [line for line in read_metrics(file) if step > 0 and line["step"] <= step]
        write_atomically(file, "".join(json.dumps(line) + "\n" for line in kept).encode())


def rewind_samples(file: Path, step: int) -> None:
    """Drop the samples after `step`; drop everything where a run starts at step 0."""
    if file.exists():
        text = file.read_text(encoding="utf-8", errors="replace")
        samples = re.findall(r"^(--- step (\d+) ---\n.*?)(?=^--- step \d+ ---\n|\Z)", text, re.MULTILINE | re.DOTALL)
        kept = [sample for sample, sampled_at in samples if step > 0 and int(sampled_at) <= step]
        write_atomically(file, "".join(kept).encode())


def append(file: FileIO, text: str) -> None:
    """Append a text with one write. Raises RunDirectoryError where it could not be written whole."""
    content = text.encode("utf-8", errors="replace")
    try:
        written = file.write(content)
    except OSError as error:
        raise RunDirectoryError(f"cannot write {file.name}: {error}") from error
    if written != len(content):
        raise RunDirectoryError(f"cannot write {file.name}: disk full after {written} of {len(content)} bytes")


def json_values(value: Any) -> Any:
    """Nested values as JSON can hold them; NaN and infinity become None."""
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(key): json_values(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [json_values(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | None) else str(value)
