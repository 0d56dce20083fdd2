"""How the number of steps trades the quality of what a diffusion model writes for its speed.

    python -m llm.analysis.writing_steps runs/block_diffusion runs/masked_diffusion --judge runs/autoregressive_twin
    python -m llm.analysis.writing_steps                                  # the picture alone, from the rows there are

Every model continues the first tokens of the same eval stories, at temperature 1, with several numbers of steps a
block. An autoregressive model, the judge, then says how surprising each written token is to it. That number alone would
praise a model that repeats itself, so the share of different tokens in a text stands beside it; the row "text" has
both for the stories themselves. Speed is counted, as tokens per forward pass of one text or of a block, and measured,
as tokens per second of all texts together.
Blog: Diffusion.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from llm.analysis.accounting import describe
from llm.analysis.judge import read, stories
from llm.console import console
from llm.data.files import Data, open_tokens
from llm.files import replacing, write_atomically
from llm.generate.load import load_run
from llm.generate.sampling import Sampler
from llm.models.transformer import Transformer
from llm.modules.diffusion.unmasking import Unmasking
from llm.training.checkpoint import CheckpointError
from llm.training.curve import new_figure, try_to_draw
from llm.training.device import find_device
from llm.training.provenance import git_commit
from llm.training.run_directory import existing_config


@dataclass(frozen=True)
class Arguments:
    """Write with several numbers of steps, let a judge read it, and draw quality against speed."""

    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Run directories of diffusion models; none: draw the rows that are there."""
    judge: Path | None = None
    """Run directory of the autoregressive model that reads what they write."""
    steps: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    """Numbers of steps a block; those above a model's block are left out."""
    orders: tuple[str, ...] = ("random", "confidence")
    """Which tokens of a step are kept (--unmasking.order of generate)."""
    data: Path = Path("data/stories")
    """Folder that pre_tokenize.py wrote."""
    texts: int = 64
    """Stories that are continued."""
    prompt: int = 16
    """Tokens of each story that the models are given."""
    seed: int = 0
    """Draws the tokens and the random order."""
    device: str = "auto"
    """auto, cuda, mps or cpu."""
    rows: Path = Path("docs/results/diffusion.jsonl")
    """A line of JSON for each measurement; the lines of the runs named here are replaced."""
    out: Path = Path("docs/diffusion_steps.png")
    """The picture."""


def counting(model: Transformer) -> Callable[[], int]:
    """Count the forward passes of a model from now on; returns what tells their number."""
    passes = []
    model.blocks[0].register_forward_pre_hook(lambda *_: passes.append(1))
    return lambda: len(passes)


def measure(run: Path, judge: Transformer, data: Data, a: Arguments) -> list[dict[str, Any]]:
    """The rows of one run, one for each number of steps and each order."""
    rows, device, config = [], find_device(a.device), existing_config(run)
    tokens = config["train"]["steps"] * config["train"]["tokens_per_step"]
    origin = {"study": "writing_steps", "training_tokens": tokens, "commit": git_commit(), "device": str(device)}
    for steps, order in ((steps, order) for steps in a.steps for order in a.orders):
        model, tokenizer = load_run(run, device)
        model.unmasking = Unmasking(steps=steps, order=order, seed=a.seed)
        length = model.config.max_seq_len
        block = getattr(model.config, "block_size", model.unmasking.block_size)
        if steps > block or (block == 1 and order != a.orders[0]):
            continue
        prompts, passes = stories(data, a.texts, length)[:, : a.prompt].to(device), counting(model)
        sampler = Sampler(tuple(torch.Generator(device).manual_seed(a.seed + i) for i in range(a.texts)))
        start = time.perf_counter()
        texts = torch.cat([prompts, *model.generate(prompts, length - a.prompt, sampler)], 1)
        speed = a.texts * (length - a.prompt) / (time.perf_counter() - start)
        row = {"model": config["model_name"], "steps": steps, "order": order, "block_size": block}
        row |= {
            "tokens_per_pass": (length - a.prompt) / passes(),
            "tokens_per_second": speed,
            **read(judge, texts, a.prompt, data.eot),
        }
        row |= {"flops_per_written_token": describe(model)["flops_per_written_token"], "texts": a.texts, "seed": a.seed}
        rows.append(row | origin | {"written": tokenizer.decode(texts[0, a.prompt :].tolist())})
        print(f"{row['model']}, {steps} steps, {order}: {row['nats']:.3f} ± {row['nats_error']:.3f} nats", flush=True)
    return rows


def draw(rows: list[dict], path: Path) -> None:
    """Nats and different tokens against tokens per forward pass; a line for each model and order."""
    figure = new_figure(figsize=(11, 4.6), layout="constrained")
    panels = figure.subplots(1, 2)
    models = list(dict.fromkeys(row["model"] for row in rows if row["model"] != "text"))
    for colour, model in enumerate(models):
        for order, style in (("random", "o--"), ("confidence", "o-")):
            line = [row for row in rows if row["model"] == model and row["order"] == order]
            if not line:
                continue
            x, name = [row["tokens_per_pass"] for row in line], f"{model}, blocks of {line[0]['block_size']}, {order}"
            options = dict(color=f"C{colour}", label=name if len(line) > 1 else model, markersize=5)
            errors = [row["nats_error"] for row in line]
            panels[0].errorbar(x, [row["nats"] for row in line], errors, fmt=style, capsize=2, **options)
            panels[1].plot(x, [row["different"] for row in line], style, **options)
            for row, place in zip(line, x, strict=True):
                panels[0].annotate(row["steps"], (place, row["nats"]), (4, 5), textcoords="offset points", fontsize=7)
    for panel, key in zip(panels, ("nats", "different"), strict=True):
        for row in rows:
            if row["model"] == "text":
                panel.axhline(row[key], color="black", linewidth=1, linestyle=":", label="the stories themselves")
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter("{x:g}")
        panel.set_xlabel("written tokens per forward pass; the numbers are steps a block")
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("surprise of the autoregressive judge, nats a token")
    panels[1].set_ylabel("different tokens, share of a text")
    panels[1].legend(fontsize=8, frameon=False)
    with replacing(path) as picture:
        figure.savefig(picture, format="png", dpi=110)


@console()
def main(arguments: list[str] | None = None) -> None:
    """The command."""
    a = tyro.cli(Arguments, args=arguments, prog="python -m llm.analysis.writing_steps")
    rows = [json.loads(line) for line in a.rows.read_text(encoding="utf-8").splitlines()] if a.rows.is_file() else []
    if a.runs:
        if a.judge is None:
            raise ValueError("name the run of an autoregressive model that reads what the others write (--judge)")
        data, (judge, _) = open_tokens(a.data), load_run(a.judge, find_device(a.device))
        new = [row for run in a.runs for row in measure(run, judge, data, a)]
        real = stories(data, a.texts, judge.config.max_seq_len)
        new.append({"model": "text", **read(judge, real, a.prompt, data.eot)})
        named = {row["model"] for row in new}
        rows = [row for row in rows if row["model"] not in named] + new
        a.rows.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(a.rows, "".join(json.dumps(row) + "\n" for row in rows).encode())
    if not rows:
        raise ValueError(f"{a.rows} has no rows: name run directories")
    try_to_draw(draw, rows, a.out)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError, CheckpointError) as error:
        sys.exit(f"error: {error}")
