"""What every benchmark needs: contestants in processes of their own, measured in turn, and what the machine can do.

Machines are noisy, and what disturbs a measurement lasts for seconds or minutes. So contestants take turns (A B C,
A B C, ..), each waits while another works, and only medians and ratios within one run are worth reading.
"""

import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path

import torch
from tqdm import tqdm


class Contestant:
    """A child process that measures itself once each time it is asked to.

    `command` are the words of a command that ends in `answer(..)`; `environment` is added to this process's own.
    """

    def __init__(self, command: list[str], environment: dict[str, str] | None = None, stderr: int | None = None):
        self.child = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=os.environ | (environment or {}),
        )

    def measure(self) -> dict:
        """One measurement. Raises RuntimeError where the child has died; what it said stands above."""
        self.begin()
        return self.result()

    def begin(self) -> None:
        """Begin a measurement, whose `result` is to be read."""
        self.child.stdin.write("go\n")
        self.child.stdin.flush()

    def result(self) -> dict:
        for line in self.child.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"{' '.join(self.child.args[1:])} ended with status {self.child.wait()}")

    def end(self) -> None:
        self.child.stdin.close()
        self.child.wait()


def answer(measure: Callable[[], dict]) -> None:
    """In the child: call `measure` for each line of the standard input, until it ends."""
    for _ in sys.stdin:
        print(json.dumps(measure()), flush=True)


def in_turn(contestants: dict[str, Contestant], turns: int) -> dict[str, list[dict]]:
    """`turns` measurements of each, one after the other, after one that warms up. One that dies is left out.

    All warm up at once, since importing and compiling take longer than what is measured.
    """
    results = {name: [] for name in contestants}
    for contestant in contestants.values():
        with contextlib.suppress(BrokenPipeError):  # its `result` says that it has died
            contestant.begin()
    bar = tqdm(total=(turns + 1) * len(contestants), unit="measurement", dynamic_ncols=True)
    for turn in range(turns + 1):
        for name in list(results):
            bar.set_postfix_str(name)
            try:
                if turn:
                    results[name].append(contestants[name].measure())
                else:
                    contestants[name].result()
            except (RuntimeError, BrokenPipeError) as error:
                bar.write(f"{name} is left out: {error}", file=sys.stderr)
                del results[name]
            bar.update()
    bar.close()
    for contestant in contestants.values():
        contestant.end()
    return results


def median(results: list[dict], name: str) -> float:
    """The median of one figure."""
    return statistics.median(result[name] for result in results)


def ratio(results: list[dict], others: list[dict], name: str) -> float:
    """The median over the turns of one figure divided by another's, taken in the same turn."""
    return statistics.median(one[name] / other[name] for one, other in zip(results, others, strict=True))


def markdown(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    columns = list(columns)
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def machine_line(device: torch.device, *packages: str) -> str:
    """The machine, its threads, versions and the commit, for the head of a table."""
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{processor()}, {torch.get_num_threads()} threads"
    )
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", *packages))
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent
    ).stdout.strip()
    return f"{name}; {versions}; commit {commit}"


def processor() -> str:
    """The CPU's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def version(package: str) -> str:
    """The installed version, or that there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a product of square matrices: the ceiling for training."""
    size, repeats = (2048, 5) if device.type == "cpu" else (8192, 20)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return repeats * 2 * size**3 / fastest(lambda: [a @ b for _ in range(repeats)], device)


def copy_rate(device: torch.device) -> float:
    """Bytes/s read while summing a large tensor: the ceiling for decoding, which reads every weight for every token."""
    tensor = torch.ones((1 << 28) // (1 if device.type == "cuda" else 4), dtype=torch.float32, device=device)
    return tensor.nbytes / fastest(tensor.sum, device)


def fastest(work: Callable[[], object], device: torch.device, attempts: int = 5) -> float:
    """Seconds of the fastest of a few attempts, after one that warms up."""
    seconds = []
    for _ in range(attempts + 1):
        start = now(device)
        work()
        seconds.append(now(device) - start)
    return min(seconds[1:])


def check_models(names: Iterable[str], known: Iterable[str]) -> None:
    """End the command before anything is measured where a name is not known."""
    known = list(known)
    if unknown := [name for name in names if name not in known]:
        sys.exit(f"error: no model is called {', '.join(unknown)}: choose from {', '.join(known)} (--models)")


def now(device: torch.device) -> float:
    """The time at which everything asked of the device so far is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_memory(device: torch.device) -> int:
    """The most bytes this process held so far: on the GPU, or resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
