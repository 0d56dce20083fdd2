"""The parts of `benchmarks/gpu.sh`: tests, every model against the CPU, decoding, speed beside transformers, training,
and a sharded run of one rank.

Each part is a process of its own under its own time limit. After each, results.json and results.md are written anew, so
whatever ends the job leaves the parts before it. The parts are ordered by what is least known.
"""

import contextlib
import copy
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import torch
import tyro
from measure import machine_line
from torch import nn
from tqdm import tqdm

from llm.console import console
from llm.files import write_atomically
from llm.generate.compile import compile_decoding
from llm.generate.sampling import greedy
from llm.models import MODELS, denoiser
from llm.modules.diffusion.hiding import hide
from llm.training.device import find_device
from llm.training.gradient import Objective

FIRST = ("baseline", "llama", "qwen3", "deepseek_v3", "mixtral", "gpt_oss", "gemma3", "gpt2", "sliding_window")
BY_IMPORTANCE = (*FIRST, *(name for name in MODELS if name not in FIRST))
TESTS = ("test_compiled", "test_attention", "test_moe", "test_flash_attention", "test_cross_entropy", "test_device")


@dataclass(frozen=True)
class Arguments:
    """Check and measure all on one GPU; results are written as they come."""

    device: str = "cuda"
    """cuda, or cpu to try the script itself."""
    tiny: bool = False
    """One model and a few steps: whether each part works, not how fast it is."""
    out: Path = Path(os.environ.get("OUT", "runs/gpu"))
    """Folder of the results."""
    parts: tuple[str, ...] = ()
    """Which parts, by name; all where none is given."""
    models: tuple[str, ...] = ()
    """Which models the parts models and decoding check; all where none is given."""
    inside: Literal["models", "decoding", ""] = ""
    """A part that this file does itself; used by itself."""


@dataclass(frozen=True)
class Part:
    """A command under a time limit in seconds."""

    name: str
    limit: int
    words: list[str]


def all_parts(flags: Arguments) -> list[Part]:
    """Every part in its order; the limits add up to eight minutes."""
    tiny, device = flags.tiny, ["--device", flags.device]
    tests = [f"tests/{name}.py" for name in TESTS[:1] if tiny] or [f"tests/{name}.py" for name in TESTS]
    chosen = ["-k", "baseline"] if tiny else ["-k", "compiled or cuda or gpu or flex or grouped or autocast"]
    own = [__file__, *device, "--out", str(flags.out), *(["--tiny"] if tiny else [])]
    own += ["--models", *flags.models] if flags.models else []
    few = ["--turns", "1", "--rivals"] if tiny else ["--turns", "2", "--rivals", "transformers Llama"]
    batch = ["--windows", "1", "--length", "32", "--steps", "1", "--modes", "eager"] if tiny else ["--windows", "32"]
    large = batch if tiny else ["--windows", "16", "--length", "1024"]
    text = ["--prompts", "8", "--new-tokens", "4", "--modes", "eager"] if tiny else ["--prompts", "128"]
    sizes = ["--steps", "2", "--tokens-per-step", "256", "--micro-batch-size", "1"] if tiny else ["--steps", "500"]
    run = ["--sample", *device, *sizes, "--wandb", "off", "--resume", "never", "--out", str(flags.out / "run")]
    sharded = ["--shard", "--recompute", "--compile", "off", "--steps", "2" if tiny else "50"]  # the last flag counts
    own_run = [*run[:-1], str(flags.out / "sharded-run"), *sharded]
    one_rank = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    return [
        Part("models", 120, [*own, "--inside", "models"]),
        Part("training-17M", 45, ["benchmarks/train.py", *device, *batch, *few]),
        Part("training-124M", 55, ["benchmarks/train.py", *device, "--size", "gpt2", *large, *few]),
        Part("writing-16", 45, ["benchmarks/decode.py", *device, "--batches", "16", *text, *few]),
        Part("writing-1", 45, ["benchmarks/decode.py", *device, "--batches", "1", *text, *few]),
        Part("tests", 60, ["-m", "pytest", *tests, *chosen]),
        Part("decoding", 50, [*own, "--inside", "decoding"]),
        Part("a-run", 40, ["train_scripts/train_baseline.py", *run]),
        Part("sharded", 20, [*one_rank, "train_scripts/train_baseline.py", *own_run]),
    ]


@console()
def main() -> None:
    """Run the parts, or one from within."""
    flags = tyro.cli(Arguments)
    if flags.inside:
        return check_each(flags, {"models": check_model, "decoding": check_decoding}[flags.inside])
    parts = all_parts(flags)
    if unknown := set(flags.parts) - {part.name for part in parts}:
        sys.exit(
            f"error: no part is called {', '.join(unknown)}; there are {', '.join(p.name for p in parts)} (--parts)"
        )
    flags.out.mkdir(parents=True, exist_ok=True)
    results = {"machine": machine_line(find_device(flags.device)), "tiny": flags.tiny, "parts": []}
    for part in tqdm([part for part in parts if not flags.parts or part.name in flags.parts], unit="part"):
        results["parts"].append(run_part(part, flags))
        write_results(results, flags.out)
    print(f"written to {flags.out / 'results.md'}")
    if any(part["status"] for part in results["parts"]):
        sys.exit(1)


def run_part(part: Part, flags: Arguments) -> dict:
    """Run a part in a session of its own, and end all of it at its limit; on a CPU with six times as long."""
    limit = part.limit * (1 if flags.device == "cuda" else 6)
    log, start = flags.out / f"{part.name}.log", time.perf_counter()
    with open(log, "w", encoding="utf-8") as file:
        child = subprocess.Popen([sys.executable, *part.words], stdout=file, stderr=file, start_new_session=True)
        try:
            status: int | str = child.wait(limit)
        except subprocess.TimeoutExpired:
            status = f"stopped after {limit} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    lines = flags.out / f"{part.name}.jsonl"
    found = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()] if lines.exists() else []
    return {"name": part.name, "status": status, "seconds": time.perf_counter() - start, "found": found}


def write_results(results: dict, out: Path) -> None:
    """The results so far, as JSON and as Markdown with the last lines of each log."""
    text = [f"# {results['machine']}{' (tiny: figures mean nothing)' if results['tiny'] else ''}"]
    for part in results["parts"]:
        verdict = "done" if part["status"] == 0 else f"FAILED ({part['status']})"
        text.append(f"\n## {part['name']}: {verdict} in {part['seconds']:.0f} s\n")
        raw = (out / f"{part['name']}.log").read_bytes().decode(errors="replace")
        log = [line.rsplit("\r", 1)[-1] for line in raw.rstrip("\r\n").split("\n")]  # of a bar, how it ended
        text += ["```", *log[-25 if part["status"] == 0 else -60 :], "```"]
    write_atomically(out / "results.json", json.dumps(results, indent=2).encode())
    write_atomically(out / "results.md", "\n".join([*text, ""]).encode())


def check_each(flags: Arguments, check: Callable[[str, str], dict]) -> None:
    """`check` every model in the order of importance, several at once since compiling keeps a CPU core busy, one line
    for each; ends with status 1 where one has failed."""
    failed, lines = False, flags.out / f"{flags.inside}.jsonl"
    lines.unlink(missing_ok=True)
    names = flags.models or BY_IMPORTANCE
    if flags.inside == "decoding":
        names = tuple(name for name in names if MODELS[name].causal)  # a diffusion model has no step of one token
    names = names[: 1 if flags.tiny else None]
    with ProcessPoolExecutor(min(10, (os.cpu_count() or 2) // 2, len(names)), get_context("spawn")) as pool:
        for future in as_completed([pool.submit(checked, check, name, flags.device) for name in names]):
            failed |= not future.result()["ok"]
            with open(lines, "a", encoding="utf-8") as file:
                print(json.dumps(future.result()), file=file)
            print(json.dumps(future.result()), flush=True)
    sys.exit(failed)


def checked(check: Callable[[str, str], dict], name: str, device: str) -> dict:
    """What the check found, or its error: one model must not hide the others."""
    torch.compiler.reset()
    torch.set_num_threads(1)
    start = time.perf_counter()
    try:
        found = check(name, device)
    except Exception as error:
        found = {"ok": False, "error": f"{type(error).__name__}: {error}"[:500]}
    return {"model": name} | found | {"seconds": round(time.perf_counter() - start, 1)}


def small_model(name: str, length: int = 64) -> nn.Module:
    """A small model in fp32 on the CPU."""
    torch.manual_seed(0)
    Config = MODELS[name].Config
    return MODELS[name](Config(**{**Config.small, "vocab_size": 500, "n_layers": 2, "max_seq_len": length}))


def check_model(name: str, device: str) -> dict:
    """Loss and gradient of a compiled step, and the logits in bf16, against the CPU's."""
    windows = torch.randint(500, (4, 65), generator=torch.Generator().manual_seed(1))
    if not MODELS[name].causal:
        hide_the_same(small_model(name), windows[:, 1:])
    losses, gradients = [], []
    for where, compiles in (("cpu", False), (device, True)):
        model = small_model(name).to(where).train()
        with torch.autocast(where, torch.bfloat16):
            loss, _ = Objective(model, compiles, insist=True)(windows.to(where))
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None]))
    model = small_model(name).eval()
    with torch.inference_mode():
        exact = copy.deepcopy(model).double()(windows[:, :-1])
        rounded = copy.deepcopy(model).bfloat16()(windows[:, :-1])
        there = model.to(device, torch.bfloat16)(windows[:, :-1].to(device)).cpu()
    found = {
        "loss_error": abs(losses[1] / losses[0] - 1),
        "gradient_cosine": torch.cosine_similarity(*gradients, dim=0).item(),
        "logits_error_over_cpus": ((there - exact).abs().mean() / (rounded - exact).abs().mean()).item(),
    }
    good = found["loss_error"] < 0.02 and found["gradient_cosine"] > 0.95 and found["logits_error_over_cpus"] < 1.5
    return {"ok": good} | found


def hide_the_same(model: nn.Module, text: torch.Tensor) -> None:
    """Let every diffusion model of this process hide these tokens: generators of different devices draw others."""
    torch.manual_seed(2)
    hidden, weight = hide(text, model.group_size(text.shape[1]))
    denoiser.hide = lambda clean, size: (hidden.to(clean.device), weight.to(clean.device))


def check_decoding(name: str, device: str) -> dict:
    """Logits of a text that is told token by token, compiled (CUDA graphs) and eager: nearly equal in fp32."""
    prompt, text = torch.randint(500, (2, 2, 24), generator=torch.Generator().manual_seed(1)).to(device)
    seen = []
    model = small_model(name).eval().to(device)
    for compiled in (False, True):
        if compiled:
            compile_decoding(model, insist=True)
        told, steps = iter(text.T), []

        def sampler(logits, told=told, steps=steps):
            steps.append(logits.float().clone())
            greedy(logits)
            return next(told)

        list(model.generate(prompt, 20, sampler))
        seen.append(torch.stack(steps))
    error = ((seen[1] - seen[0]).abs().max() / seen[0].std()).item()
    return {"ok": error < 1e-3, "largest_difference": error}


if __name__ == "__main__":
    main()
