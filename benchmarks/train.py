"""Training speed beside other codebases at the same work: `python benchmarks/train.py`.

    uv run --isolated --no-group dev --group benchmarks python benchmarks/train.py
    ... benchmarks/train.py --keep-memory               # the rivals, too, with our allocator setting
    ... benchmarks/train.py --device cuda --size gpt2   # 124 M parameters

A step is forward, backward, clipping and fused AdamW on one batch of random tokens, in bf16 autocast or fp32. All have
the baseline's depth, width, heads, vocabulary and tied head, so the products of matrices are the same; positions, norms
and biases are each codebase's own. The ceiling is the rate of a product of large matrices, measured in the same turns.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from measure import Contestant, answer, in_turn, machine_line, markdown, matmul_rate, median, now, peak_memory, ratio
from torch import Tensor, nn
from torch.nn import functional as F

from llm.analysis.accounting import describe
from llm.config import TrainConfig
from llm.console import console
from llm.models.baseline import Baseline
from llm.training.device import find_machine, keep_freed_memory
from llm.training.gradient import recompute
from llm.training.optim import make_optimizer

SIZES = {
    "default": Baseline.Config(),
    "gpt2": Baseline.Config(vocab_size=50_304, max_seq_len=1024, d_model=768, n_layers=12, n_heads=12, d_ff=3072),
}
Loss = Callable[[Tensor], Tensor]  # windows (B, T + 1) -> the mean cross-entropy


@dataclass(frozen=True)
class Arguments:
    """Measure training steps of the baseline and of other codebases' models of the same size, in turn."""

    rivals: tuple[str, ...] = ("transformers GPT-2", "transformers Llama", "litgpt", "x-transformers")
    """Which rivals; those that are not installed are left out. `ours, recomputing` is one, too."""
    size: Literal["default", "gpt2"] = "default"
    """default: 17.7 M parameters; gpt2: the 124 M of the smallest GPT-2."""
    windows: int = 4
    """Windows in a step."""
    length: int = 256
    """Tokens in a window."""
    steps: int = 3
    """Steps in a turn; the turn's figure is their median."""
    turns: int = 7
    """Turns, after one that warms up and compiles."""
    modes: tuple[Literal["eager", "compiled"], ...] = ("eager", "compiled")
    """How each is run."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """As in training."""
    device: str = "auto"
    """auto, cuda, mps or cpu."""
    keep_memory: bool = False
    """Give the rivals the allocator setting that our training uses on a CPU."""


def baseline_loss(c: Baseline.Config) -> tuple[nn.Module, Loss]:
    model = Baseline(c)
    return model, lambda tokens: model.loss(tokens)[0]


def recomputing_loss(c: Baseline.Config) -> tuple[nn.Module, Loss]:
    """As `--recompute` trains: more work, less memory."""
    model, loss = baseline_loss(c)
    recompute(model)
    return model, loss


def gpt2_loss(c: Baseline.Config) -> tuple[nn.Module, Loss]:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = dict(n_embd=c.d_model, n_layer=c.n_layers, n_head=c.n_heads, n_inner=c.d_ff, n_positions=c.max_seq_len)
    no_dropout = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return with_labels(GPT2LMHeadModel(GPT2Config(vocab_size=c.vocab_size, use_cache=False, **sizes, **no_dropout)))


def llama_loss(c: Baseline.Config) -> tuple[nn.Module, Loss]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.d_model,
        intermediate_size=round(c.d_ff * 2 / 3 / 32) * 32,  # three matrices as large as the others' two
        num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads,
        max_position_embeddings=c.max_seq_len,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return with_labels(LlamaForCausalLM(config))


def with_labels(model: nn.Module) -> tuple[nn.Module, Loss]:
    """transformers shifts the labels itself; the inputs are one token shorter, so all compute the same."""
    return model, lambda tokens: model(input_ids=tokens[:, :-1], labels=tokens[:, :-1]).loss


def litgpt_loss(c: Baseline.Config) -> tuple[nn.Module, Loss]:
    from litgpt.config import Config
    from litgpt.model import GPT

    config = Config(
        block_size=c.max_seq_len,
        n_layer=c.n_layers,
        n_embd=c.d_model,
        n_head=c.n_heads,
        padded_vocab_size=c.vocab_size,
        intermediate_size=c.d_ff,
        norm_class_name="RMSNorm",
        parallel_residual=False,
        rotary_percentage=1.0,
        bias=False,
    )
    model = GPT(config)
    model.lm_head.weight = model.transformer.wte.weight
    return model, lambda tokens: cross_entropy(model(tokens[:, :-1]), tokens)


def x_transformers_loss(c: Baseline.Config) -> tuple[nn.Module, Loss]:
    from x_transformers import Decoder, TransformerWrapper

    layers = Decoder(
        dim=c.d_model,
        depth=c.n_layers,
        heads=c.n_heads,
        attn_dim_head=c.d_model // c.n_heads,
        ff_mult=c.d_ff / c.d_model,
        ff_no_bias=True,
        use_rmsnorm=True,
        attn_flash=True,
        rotary_pos_emb=True,
    )
    model = TransformerWrapper(
        num_tokens=c.vocab_size,
        max_seq_len=c.max_seq_len,
        attn_layers=layers,
        use_abs_pos_emb=False,
        tie_embedding=True,
        attn_z_loss_weight=0.0,
    )
    return model, lambda tokens: cross_entropy(model(tokens[:, :-1]), tokens)


def cross_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


MAKE = {
    "ours": baseline_loss,
    "ours, recomputing": recomputing_loss,
    "transformers GPT-2": gpt2_loss,
    "transformers Llama": llama_loss,
    "litgpt": litgpt_loss,
    "x-transformers": x_transformers_loss,
}


def compete(name: str, mode: str, flags: Arguments) -> None:
    """The child: one codebase in one mode."""
    machine = find_machine(TrainConfig(device=flags.device, precision=flags.precision))
    device = machine.device
    if name.startswith("ours") or flags.keep_memory:
        keep_freed_memory(device)
    if name == "ceiling":
        dtype = torch.bfloat16 if machine.bf16 else torch.float32
        answer(lambda: {"rate": matmul_rate(device, dtype)})
        return
    torch.manual_seed(0)
    config = SIZES[flags.size]
    model, loss = MAKE[name](config)
    model.to(device).train()
    loss = torch.compile(loss) if mode == "compiled" else loss
    groups = [{"params": list(model.parameters())}]
    ours = name.startswith("ours")
    optimizer = make_optimizer(model, TrainConfig()) if ours else torch.optim.AdamW(groups, fused=True)
    tokens = torch.randint(config.vocab_size, (flags.windows, flags.length + 1), device=device)

    def step() -> float:
        start = now(device)
        with machine.autocast():
            value = loss(tokens)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return now(device) - start

    def turn() -> dict:
        seconds = sorted(step() for _ in range(flags.steps))[flags.steps // 2]
        return {"seconds": seconds, "memory": peak_memory(device)}

    for _ in range(3):
        step()
    answer(turn)


@console()
def main(arguments: list[str] | None = None) -> None:
    """The command."""
    flags = tyro.cli(Arguments, args=arguments)
    machine = find_machine(TrainConfig(device=flags.device, precision=flags.precision))
    names = [(name, mode) for name in ("ours", *flags.rivals) for mode in flags.modes] + [("ceiling", "eager")]
    contestants = {
        (name, mode): Contestant([__file__, "--compete", json.dumps([name, mode, asdict(flags)])])
        for name, mode in names
    }
    start = time.perf_counter()
    results = in_turn(contestants, flags.turns)
    ceiling = results.pop(("ceiling", "eager"))
    ours = min((r for r in results if r[0] == "ours"), key=lambda r: median(results[r], "seconds"))
    n_tokens = flags.windows * flags.length
    flops = describe(Baseline(SIZES[flags.size]), flags.length)["training_flops_per_token"] * n_tokens
    rows = [
        [
            f"{name}, {mode}",
            f"{median(turns, 'seconds') * 1000:,.1f}",
            f"{n_tokens / median(turns, 'seconds'):,.0f}",
            f"{flops / median(turns, 'seconds') / median(ceiling, 'rate'):.0%}",
            f"{median(turns, 'memory') / 2**20:,.0f}",
            f"{ratio(turns, results[ours], 'seconds'):.2f}",
        ]
        for (name, mode), turns in results.items()
    ]
    print(f"\n{machine_line(machine.device, 'transformers', 'litgpt', 'x-transformers')}")
    setting = "the same allocator setting for all" if flags.keep_memory else "rivals as shipped"
    print(
        f"{machine.precision}, {flags.windows} x {flags.length} tokens, {setting}; products of matrices: "
        f"{median(ceiling, 'rate') / 1e9:,.0f} GFLOP/s; {flags.turns} turns in {time.perf_counter() - start:.0f} s\n"
    )
    columns = ("codebase", "ms a step", "tokens / s", "of the matmul rate", "memory, MiB", "time over ours")
    print(markdown(columns, rows))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--compete"]:
        name, mode, settings = json.loads(sys.argv[2])
        compete(name, mode, Arguments(**settings))
    else:
        sys.path.insert(0, str(Path(__file__).parent))
        main()
