"""Decoding speed beside other codebases at the same work: `python benchmarks/decode.py`.

    uv run --isolated --no-group dev --group benchmarks python benchmarks/decode.py
    ... benchmarks/decode.py --batches 1 --prompts 32 --device cuda

Prompts of random tokens are read, then each next token is the likeliest one, fed back through the cache; what counts is
the time from the first new token to the last. The models are those of benchmarks/train.py. Ours runs as users run it,
`model.generate`; the rivals run their forward pass in a bare loop, which spares them what their own `generate` costs:

    eager      transformers: DynamicCache, which grows by one key a step; litgpt: its cache, cut to the keys in use
    compiled   transformers: StaticCache; litgpt: its cache; both as long as the whole text, so shapes never change

A step must read every weight and every key and value kept so far. The ceiling is that number of bytes at the rate at
which a large tensor is read, measured in the same turns. On a CPU with a large cache weights may come faster than that.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Literal

import torch
import tyro
from measure import Contestant, answer, copy_rate, in_turn, machine_line, markdown, median, now, ratio
from torch import Tensor, nn
from train import MAKE, SIZES

from llm.analysis.accounting import cache_bytes
from llm.console import console
from llm.generate.compile import compile_decoding
from llm.generate.sampling import greedy
from llm.models.baseline import Baseline
from llm.training.device import find_device


@dataclass(frozen=True)
class Arguments:
    """Measure greedy decoding of the baseline and of other codebases' models of the same size, in turn."""

    rivals: tuple[str, ...] = ("transformers GPT-2", "transformers Llama", "litgpt")
    """Which rivals; those that are not installed are left out."""
    batches: tuple[int, ...] = (1, 16)
    """Texts written at once; one table for each number and each prompt."""
    prompts: tuple[int, ...] = (32, 512)
    """Tokens in a prompt."""
    new_tokens: int = 128
    """Tokens to write."""
    size: Literal["default", "gpt2"] = "default"
    """default: 17.7 M parameters; gpt2: the 124 M of the smallest GPT-2."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """What weights and caches are kept in."""
    turns: int = 7
    """Turns, after one that warms up and compiles."""
    modes: tuple[Literal["eager", "compiled"], ...] = ("eager", "compiled")
    """How each is run."""
    device: str = "auto"
    """auto, cuda, mps or cpu."""

    def config(self, prompt: int):
        """The baseline's sizes with room for the text."""
        config = SIZES[self.size]
        return type(config)(**asdict(config) | {"max_seq_len": prompt + self.new_tokens + 1})


Write = Callable[[Tensor, int], Iterator[Tensor]]  # prompts (B, T) and a number of tokens -> the tokens, (B,) each


def write_ours(model: Baseline, compiled: bool) -> Write:
    if compiled:
        compile_decoding(model)
    return lambda tokens, n: model.generate(tokens, n, greedy)


def write_transformers(model: nn.Module, compiled: bool) -> Write:
    from transformers import DynamicCache, StaticCache

    def step(tokens: Tensor, positions: Tensor, cache) -> Tensor:
        out = model(tokens, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(-1, keepdim=True)

    fast_step = torch.compile(step, dynamic=False, mode=compile_mode(model)) if compiled else step

    @torch.inference_mode()
    def write(tokens: Tensor, n: int) -> Iterator[Tensor]:
        length = tokens.shape[1]
        cache = StaticCache(model.config, max_cache_len=length + n) if compiled else DynamicCache(config=model.config)
        positions = torch.arange(length, device=tokens.device)[None]
        for index in range(n):
            tokens = (fast_step if index else step)(tokens, positions, cache).clone()
            positions = positions[:, -1:] + 1
            yield tokens[:, 0]

    return write


def write_litgpt(model: nn.Module, compiled: bool) -> Write:
    def step(tokens: Tensor, positions: Tensor, n_keys: int | None) -> Tensor:
        return model(tokens, positions, input_pos_maxp1=n_keys)[:, -1].argmax(-1, keepdim=True)

    fast_step = torch.compile(step, dynamic=False, mode=compile_mode(model)) if compiled else step

    @torch.inference_mode()
    def write(tokens: Tensor, n: int) -> Iterator[Tensor]:
        length = tokens.shape[1]
        model.max_seq_length = length + n
        model.set_kv_cache(len(tokens), device=tokens.device, dtype=next(model.parameters()).dtype)
        positions = torch.arange(length, device=tokens.device)
        for index in range(n):
            n_keys = None if compiled else length + index
            tokens = (fast_step if index else step)(tokens, positions, n_keys).clone()
            positions = positions[-1:] + 1
            yield tokens[:, 0]

    return write


def compile_mode(model: nn.Module) -> str:
    """CUDA graphs where there are any."""
    return "reduce-overhead" if next(model.parameters()).is_cuda else "default"


WRITE = {
    "ours": write_ours,
    "transformers GPT-2": write_transformers,
    "transformers Llama": write_transformers,
    "litgpt": write_litgpt,
}


def compete(name: str, mode: str, batch: int, prompt: int, flags: Arguments) -> None:
    """The child: one codebase in one mode, at one batch and prompt."""
    device = find_device(flags.device)
    if name == "ceiling":
        answer(lambda: {"rate": copy_rate(device)})
        return
    torch.manual_seed(0)
    model, _ = MAKE[name](flags.config(prompt))
    model.to(device, torch.bfloat16 if flags.precision == "bf16" else torch.float32).eval()
    write = WRITE[name](model, mode == "compiled")
    tokens = torch.randint(SIZES[flags.size].vocab_size, (batch, prompt), device=device)

    def turn() -> dict:
        steps = write(tokens, flags.new_tokens + 1)
        next(steps)  # the prompt
        start = now(device)
        n_steps = sum(1 for _ in islice(steps, flags.new_tokens))
        return {"seconds": (now(device) - start) / n_steps}

    turn()
    answer(turn)


def compare(batch: int, prompt: int, flags: Arguments) -> str:
    """The table for one batch and prompt."""
    names = [(name, mode) for name in ("ours", *flags.rivals) for mode in flags.modes] + [("ceiling", "eager")]
    contestants = {
        (name, mode): Contestant([__file__, "--compete", json.dumps([name, mode, batch, prompt, asdict(flags)])])
        for name, mode in names
    }
    results = in_turn(contestants, flags.turns)
    ceiling = results.pop(("ceiling", "eager"))
    model = Baseline(flags.config(prompt)).to(torch.bfloat16 if flags.precision == "bf16" else torch.float32)
    weights = sum(weight.nbytes for weight in model.parameters())
    read = weights + batch * cache_bytes(model, prompt + flags.new_tokens // 2)
    least = read / median(ceiling, "rate")
    ours = min((r for r in results if r[0] == "ours"), key=lambda r: median(results[r], "seconds"))
    rows = [
        [
            f"{name}, {mode}",
            f"{median(turns, 'seconds') * 1000:,.2f}",
            f"{batch / median(turns, 'seconds'):,.0f}",
            f"{least / median(turns, 'seconds'):.0%}",
            f"{ratio(turns, results[ours], 'seconds'):.2f}",
        ]
        for (name, mode), turns in results.items()
    ]
    title = f"Batch {batch}, prompt {prompt}, {flags.new_tokens} new tokens, {flags.precision}: "
    title += f"{read / 1e6:,.1f} MB a step at {median(ceiling, 'rate') / 1e9:,.1f} GB/s take {least * 1000:.2f} ms"
    return f"{title}\n\n" + markdown(("codebase", "ms a step", "tokens / s", "of the limit", "time over ours"), rows)


@console()
def main(arguments: list[str] | None = None) -> None:
    """The command."""
    flags = tyro.cli(Arguments, args=arguments)
    start = time.perf_counter()
    print(machine_line(find_device(flags.device), "transformers", "litgpt"))
    for batch in flags.batches:
        for prompt in flags.prompts:
            print(f"\n{compare(batch, prompt, flags)}", flush=True)
    print(f"\n{flags.turns} turns in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--compete"]:
        *contest, settings = json.loads(sys.argv[2])
        compete(*contest, Arguments(**settings))
    else:
        main()
