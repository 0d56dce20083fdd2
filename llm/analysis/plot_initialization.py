"""The size of activations and gradients at each depth before the first step, under every initialisation.

    python -m llm.plot_initialization
    python -m llm.plot_initialization --model post_norm --data data/tinystories

A point at depth l is the root mean square of the residual stream after block l (0: the embedding), or of the gradient
of the loss there. Flat lines train well. Where a line rises or falls by orders of magnitude, the updates of those
layers will be too large or too small. Blog: Initialization.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from torch import Tensor

from llm.config import check_positive
from llm.console import console
from llm.data.files import open_tokens
from llm.files import replacing
from llm.models import MODELS
from llm.models.transformer import Transformer
from llm.modules.initialization import SCHEMES
from llm.training.curve import new_figure, try_to_draw


@dataclass(frozen=True)
class Arguments:
    """Draw activation and gradient scale by depth at step 0, and print them as a Markdown table."""

    model: Literal[tuple(MODELS)] = "baseline"  # type: ignore[valid-type]
    """Which model to initialise."""
    n_layers: int = 12
    """Number of blocks."""
    d_model: int = 256
    """Width of the residual stream; the feed-forward layer grows in proportion."""
    windows: int = 4
    """Windows of text in the batch."""
    window_size: int = 128
    """Tokens in each."""
    data: Path | None = None
    """Folder that pre_tokenize.py wrote; where it is not given, random tokens."""
    seed: int = 0
    """Draws the weights, and the tokens where there are no data."""
    out: Path = Path("runs/initialization.png")
    """The picture."""

    def __post_init__(self):
        for name in ("n_layers", "d_model", "windows", "window_size"):
            check_positive(self, name)


@dataclass(frozen=True)
class Profile:
    """Root mean squares at depths 0..n_layers, and the loss in nats per token."""

    activations: list[float]
    gradients: list[float]
    loss: float


@console()
def main(arguments: list[str] | None = None) -> dict[str, Profile]:
    a = tyro.cli(Arguments, args=arguments, prog="python -m llm.plot_initialization")
    tokens, vocab_size = read_tokens(a)
    Model = MODELS[a.model]
    sizes = {"n_layers": a.n_layers, "d_model": a.d_model, "vocab_size": vocab_size, "max_seq_len": a.window_size}
    small = Model.Config.small
    if "d_ff" in small:
        sizes["d_ff"] = small["d_ff"] * a.d_model // small["d_model"]
    profiles = {}
    for scheme in SCHEMES:
        torch.manual_seed(a.seed)
        profiles[scheme] = profile(Model(Model.Config(**{**small, **sizes}, initialization=scheme)), tokens)
    print(scale_table(profiles))
    title = f"{a.model}, {a.n_layers} layers, d_model {a.d_model}, step 0"
    try_to_draw(draw_scales, profiles, a.out, title)
    return profiles


def read_tokens(a: Arguments) -> tuple[Tensor, int]:
    """The batch (windows, window_size + 1) and the size of the vocabulary. Raises ValueError for too few data."""
    shape = (a.windows, a.window_size + 1)
    if a.data is None:
        vocab_size = 10_000
        return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(a.seed)), vocab_size
    data = open_tokens(a.data)
    first = data.train[: shape[0] * shape[1]]
    if len(first) < shape[0] * shape[1]:
        raise ValueError(f"{a.data} has {len(first):,} tokens, fewer than {shape[0]} x {shape[1]}: lower --windows")
    return torch.from_numpy(first.astype(np.int64)).view(shape), data.vocab_size


def profile(model: Transformer, tokens: Tensor) -> Profile:
    """One forward and one backward pass, with the stream (B, T, D) before the first block and after each block kept."""
    stream: list[Tensor] = []

    def hold(x: Tensor) -> None:
        x.retain_grad()
        stream.append(x)

    model.blocks[0].register_forward_pre_hook(lambda block, inputs: hold(inputs[0]))
    for block in model.blocks:
        block.register_forward_hook(lambda block, inputs, x: hold(x))
    loss, parts = model.loss(tokens)
    loss.backward()
    return Profile([rms(x) for x in stream], [rms(x.grad) for x in stream], parts["ce"].item())


def rms(x: Tensor) -> float:
    return x.detach().double().square().mean().sqrt().item()


def scale_table(profiles: dict[str, Profile]) -> str:
    """A Markdown table: a row for each scheme, with the scales at the embedding, halfway and after the last block."""
    n_layers = len(next(iter(profiles.values())).activations) - 1
    depths = sorted({0, n_layers // 2, n_layers})
    names = [f"{what} {depth}" for what in ("activation", "gradient") for depth in depths]
    rows = [["initialization", "loss", *names], ["---"] * (len(names) + 2)]
    for scheme, p in profiles.items():
        scales = [values[depth] for values in (p.activations, p.gradients) for depth in depths]
        rows.append([scheme, f"{p.loss:.2f}", *(f"{scale:.2g}" for scale in scales)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def draw_scales(profiles: dict[str, Profile], path: Path, title: str) -> None:
    """Activations on the left, gradients on the right, both on a logarithmic axis."""
    figure = new_figure(figsize=(10, 4.2), dpi=150, layout="constrained")
    figure.suptitle(title)
    panels = {"activations": "residual stream", "gradients": "gradient of the loss"}
    for axes, (field, label) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for (scheme, p), style in zip(profiles.items(), ["-o", "-s", "-v", "-^", "--D"], strict=True):
            axes.plot(getattr(p, field), style, markerfacecolor="none", markersize=5, linewidth=1.3, label=scheme)
        axes.set_yscale("log")
        axes.set_xlabel("after block (0: embedding)")
        axes.set_ylabel(f"{label}, root mean square")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as picture:
        figure.savefig(picture, format="png")
