"""What a run leaves behind in `runs/<name>/`; one process owns it at a time.

config.json      everything resolved, git commit, versions
metrics.jsonl    the record: one JSON object per logged step
samples.txt      a story at each evaluation
loss.png         the curves, drawn from metrics.jsonl
checkpoints/     see checkpoint.py
lock             process id of the owner
"""

import json
import math
import os
import platform
import re
import subprocess
from io import BytesIO, FileIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors
import tokenizers
import torch

from llm.wandb_mirror import WandbMirror


class RunDirectoryError(RuntimeError):
    """The run directory cannot be written, or another process owns it; the message says what to do."""


class RunDirectory:
    """Opens `path` for a run that goes on after `resume_step` (0: from the start); later lines and samples are dropped.

    Args:
        path: created if missing; its name is the name of the run.
        config: what `json` can write (paths become strings); commit and versions are added.
        wandb: where metrics are mirrored: see wandb_mirror.py.
        resume_step: step of the checkpoint the run goes on from.

    Raises:
        RunDirectoryError: not writable, or in use by another process, which is named.
    """

    def __init__(
        self,
        path: Path,
        config: dict,
        *,
        wandb: Literal["auto", "online", "offline", "off"],
        resume_step: int = 0,
    ):
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        config = config | {"commit": _git_commit(), "versions": _versions()}
        text = json.dumps(_plain(config), indent=2) + "\n"
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self._lock = take_lock(self.path / "lock")
            write_atomically(self.path / "config.json", text.encode())
            _rewind_metrics(self.path / "metrics.jsonl", resume_step)
            _rewind_samples(self.path / "samples.txt", resume_step)
            # unbuffered: a line is one write, so nothing half-written waits in this process
            self._metrics = FileIO(self.path / "metrics.jsonl", "a")
            self._samples = FileIO(self.path / "samples.txt", "a")
        except OSError as error:
            raise RunDirectoryError(f"cannot write to {self.path}: {error}; choose another with --out") from error
        self._mirror = WandbMirror(wandb, self.path, json.loads(text), resumed=resume_step > 0)

    def log(self, step: int, **values: Any) -> None:
        """Append one line; numbers, arrays and tensors of them become JSON, what is not finite becomes null.

        Raises:
            RunDirectoryError: the line could not be written whole.
        """
        line = _plain({"step": step, **values})
        _append(self._metrics, json.dumps(line, allow_nan=False) + "\n")
        self._mirror.log(step, {name: value for name, value in line.items() if name != "step"})

    def sample(self, step: int, text: str) -> None:
        """Append a text that the model wrote after `step`. Raises RunDirectoryError as `log` does."""
        _append(self._samples, f"--- step {step} ---\n{text}\n\n")

    def plot(self) -> None:
        """Draw `loss.png`; a failure costs the picture and one printed line, never the run."""
        try:
            _draw(read_metrics(self.path / "metrics.jsonl"), self.path / "loss.png", title=self.path.resolve().name)
        except Exception as error:
            print(f"no loss.png: {type(error).__name__}: {error}")

    def close(self, exit_code: int = 0) -> None:
        """Finish the mirror, waiting a few seconds at most, and give the directory back. May be called twice."""
        self._mirror.finish(exit_code)
        self._metrics.close()
        self._samples.close()
        self._lock.close()


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl in order; a last line torn by a crash is left out. Empty where there is no file."""
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
    """The config.json of a run directory, None where there is none yet. Raises RunDirectoryError for a damaged one."""
    file = Path(path) / "config.json"
    try:
        return json.loads(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise RunDirectoryError(f"{file} cannot be read: {error}; choose another run directory with --out") from None


def write_atomically(path: Path, content: bytes) -> None:
    """Replace `path` by `content`, all or nothing."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def take_lock(path: Path) -> FileIO:
    """Hold `path` open and locked. The system lets go when the process dies, however it dies: no lock is ever stale."""
    file = FileIO(path, "a+")
    try:
        _lock(file)
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


def _lock(file: FileIO) -> None:
    try:
        import fcntl
    except ImportError:  # Windows; far behind the text, which others must be able to read
        import msvcrt

        file.seek(1 << 20)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _rewind_metrics(file: Path, step: int) -> None:
    """Drop a torn last line and those after `step`; everything where a run starts anew."""
    if file.exists():
        kept = [line for line in read_metrics(file) if step > 0 and line["step"] <= step]
        write_atomically(file, "".join(json.dumps(line) + "\n" for line in kept).encode())


def _rewind_samples(file: Path, step: int) -> None:
    if file.exists():
        text = file.read_text(encoding="utf-8", errors="replace")
        samples = re.findall(r"^(--- step (\d+) ---\n.*?)(?=^--- step \d+ ---\n|\Z)", text, re.MULTILINE | re.DOTALL)
        kept = [sample for sample, sampled_at in samples if step > 0 and int(sampled_at) <= step]
        write_atomically(file, "".join(kept).encode())


def _append(file, text: str) -> None:
    content = text.encode("utf-8", errors="replace")
    try:
        written = file.write(content)
    except OSError as error:
        raise RunDirectoryError(f"cannot write {file.name}: {error}") from error
    if written != len(content):
        raise RunDirectoryError(f"cannot write {file.name}: disk full after {written} of {len(content)} bytes")


def _plain(value: Any) -> Any:
    """Nested values as JSON has them; NaN and infinity, which it has not, become None."""
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | None) else str(value)


def _versions() -> dict[str, str]:
    packages = (torch, np, tokenizers, safetensors)
    return {"python": platform.python_version()} | {package.__name__: package.__version__ for package in packages}


def _git_commit() -> str | None:
    """Of this code, with "-dirty" where files differ from it; None outside git."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():  # installed elsewhere: a repository around it is not ours
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None


def _draw(metrics: list[dict], file: Path, title: str) -> None:
    from matplotlib.figure import Figure  # without pyplot: no window, no global state
    from matplotlib.ticker import EngFormatter

    train = _series(metrics, "loss")
    evaluation = _series(metrics, "eval_loss")
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(*train, color="#9ecae1", linewidth=0.8, label="train, each logged step")
    axes.plot(*_running_mean(*train), color="#08519c", linewidth=1.8, label="train, running mean")
    axes.plot(*evaluation, color="#d94801", linewidth=1.4, marker="o", markersize=4, label="eval")
    axes.set_xlabel("training tokens")
    axes.set_ylabel("cross-entropy (nats per token)")
    axes.set_title(title, parse_math=False)  # a name may hold a dollar sign
    axes.xaxis.set_major_formatter(EngFormatter())  # 100 M
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    picture = BytesIO()
    figure.savefig(picture, format="png")
    write_atomically(file, picture.getvalue())


def _series(metrics: list[dict], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and values of the lines that have both, each (N,)."""
    points = [(line["tokens"], line[name]) for line in metrics if None not in (line.get("tokens"), line.get(name))]
    tokens, values = np.array(points, dtype=float).reshape(-1, 2).T
    return tokens, values


def _running_mean(tokens: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean of 2 % of the points around each, fewer at both ends; nothing where there are too few points to smooth."""
    half = len(values) // 100 + 2
    if len(values) < 4 * half:
        return tokens[:0], values[:0]
    spans = [slice(max(0, i - half), i + half + 1) for i in range(len(values))]
    return tokens, np.array([values[span].mean() for span in spans])
