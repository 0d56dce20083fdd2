"""A tiny corpus, and the baseline's training script run on it in this process: what the tests of training share."""

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType

from safetensors.torch import load_file

from llm.data.sample import sample_stories
from llm.data.tokenize import pre_tokenize
from llm.training import loop
from llm.training.checkpoint import find_checkpoints, verify_checkpoint
from llm.training.run_directory import read_metrics

ROOT = Path(__file__).parents[1]
WINDOWS_PER_STEP = 8
RUN = {
    "--steps": 20,
    "--tokens-per-step": 256,
    "--micro-batch-size": 4,
    "--warmup-steps": 4,
    "--log-every": 1,
    "--eval-every": 10,
    "--eval-windows": 7,
    "--save-every": 5,
    "--device": "cpu",
    "--precision": "fp32",
    "--wandb": "off",
}
MODEL = {"--model.n-layers": 2, "--model.d-model": 32, "--model.n-heads": 4, "--model.max-seq-len": 32}


def write_corpus(folder: Path, stories: int = 60, vocab_size: int = 300) -> Path:
    """Tokenise a few built-in stories into `folder`; returns it."""
    for split, texts in sample_stories().items():
        (folder / f"{split}.txt").write_text("<|endoftext|>".join(texts[:stories]), encoding="utf-8")
    pre_tokenize(folder / "train.txt", folder / "eval.txt", folder, vocab_size)
    return folder


def script(name: str = "train_baseline") -> ModuleType:
    """The module of a script in train_scripts."""
    return load(ROOT / "train_scripts" / f"{name}.py")


def load(path: Path) -> ModuleType:
    """A script as a module, without running it."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train_baseline(data: Path | str, out: Path | str, *flags: object) -> Path:
    """Run the script on `data` with a tiny model; `flags` come last, so they win. Returns `out`."""
    return train_model("baseline", data, out, "--model.d-ff", 64, *flags)


def train_model(name: str, data: Path | str, out: Path | str, *flags: object) -> Path:
    """The same with the script of another model."""
    script(f"train_{name}").main(command_line(RUN | MODEL | {"--data": data, "--out": out}, *flags))
    return out


def command_line(settings: dict[str, object], *flags: object) -> list[str]:
    """Settings, then more flags, as the words of a command."""
    return [str(word) for word in (*(word for setting in settings.items() for word in setting), *flags)]


def losses(run: Path) -> dict[int, float]:
    """The training loss of each logged step; no step may be there twice."""
    lines = [line for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
    found = {line["step"]: line["loss"] for line in lines}
    assert len(found) == len(lines), "a step was logged twice"
    return found


def evaluations(run: Path) -> dict[int, dict]:
    """The eval figures of each step that has some; no step may be there twice."""
    lines = [line for line in read_metrics(run / "metrics.jsonl") if "eval_loss" in line]
    found = {line["step"]: {name: value for name, value in line.items() if "eval" in name} for line in lines}
    assert len(found) == len(lines), "a step was evaluated twice"
    return found


def saved_steps(run: Path) -> list[int]:
    """The steps of the complete checkpoints, each of which must verify."""
    return [verify_checkpoint(path)["step"] for path in find_checkpoints(run / "checkpoints")]


def weights(run: Path) -> dict:
    """The tensors of the newest checkpoint."""
    return load_file(find_checkpoints(run / "checkpoints")[-1] / "model.safetensors")


def same_weights(run: Path, other: Path) -> bool:
    """Whether the newest checkpoints of two runs are equal to the last bit."""
    one, two = weights(run), weights(other)
    return one.keys() == two.keys() and all(one[name].equal(two[name]) for name in one)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def flip_a_byte(path: Path) -> None:
    """Change one bit in the middle of a file."""
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def at_step(monkeypatch, step: int, act) -> None:
    """Call `act(model)` when a run begins to compute step `step`."""
    real = loop.compute_gradient

    def hooked(objective, micro_batches, place, machine):
        if place[1] == step:
            act(getattr(objective, "module", objective).model)
        return real(objective, micro_batches, place, machine)

    monkeypatch.setattr(loop, "compute_gradient", hooked)


def in_child(act) -> int:
    """Run `act()` in a copy of this process, silently; returns its process id. Its exit status is that of a script."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            silence = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silence, 1)
            os.dup2(silence, 2)
            act()
            status = 0
        except SystemExit as end:
            status = end.code
        finally:
            os._exit(status)
    return child


def exit_status(child: int) -> int:
    """Wait for a child; minus the signal's number where one killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def config_of(run: Path) -> dict:
    """What config.json says."""
    return json.loads((run / "config.json").read_text(encoding="utf-8"))
