"""Train on short texts and evaluate on long ones: the loss at each position under every way to extend RoPE's context.

    python train_scripts/extend_context.py                        # built-in stories, minutes on a laptop
    python train_scripts/extend_context.py --data data/tinystories -- --steps 2000

One model is trained with windows of `short` tokens, then evaluated on windows of `long` tokens without more training.
Without scaling, its loss rises at positions that training never had. The scalings of
llm/modules/position_encoding/context_extension.py differ in how much lower they keep it, and in what they cost on short
texts. Each stretch of `short` positions is evaluated at the end of a text of just that length, because dynamic NTK
depends on the length of the text: it changes nothing on short texts. The other scalings are the same for all lengths.
Blog: Position encoding, longer context.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import train_rope
import tyro
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from llm.console import console
from llm.data.files import open_tokens
from llm.data.windows import eval_windows
from llm.files import replacing, write_atomically
from llm.generate.load import load_run
from llm.models.rope import RoPEDecoder
from llm.modules.position_encoding.context_extension import (
    DynamicNTK,
    LinearInterpolation,
    Llama3Bands,
    NTKAware,
    YaRN,
)
from llm.modules.position_encoding.rope import RoPE, Scaling
from llm.training.curve import new_figure, try_to_draw
from llm.training.device import find_device


@dataclass(frozen=True)
class Arguments:
    """Train a RoPE model on short windows and evaluate it on long ones. Flags after `--` go to train_rope.py."""

    short: int = 64
    """Tokens in a window of training."""
    long: int = 256
    """Tokens in a window of evaluation; a multiple of `short`."""
    data: Path = Path("data/sample")
    """Folder that pre_tokenize.py wrote; data/sample is made where it is missing."""
    windows: int = 256
    """Windows of evaluation."""
    out: Path = Path("runs/extend_context")
    """Folder for the run, context.md and context.png."""

    def __post_init__(self):
        if self.short < 2 or self.long <= self.short or self.long % self.short:
            raise ValueError(f"long = {self.long} must be a multiple of short = {self.short} (--long, --short)")


def scalings(short: int, long: int) -> dict[str, Scaling | None]:
    """Every way to extend the context by `long / short`. Dynamic NTK finds this factor itself, so its own is 1."""
    factor = long / short
    return {
        "no scaling": None,
        "linear interpolation": LinearInterpolation(factor),
        "NTK-aware": NTKAware(factor),
        "dynamic NTK": DynamicNTK(1.0, short),
        "YaRN": YaRN(factor, short),
        "Llama 3 bands": Llama3Bands(factor, short),
    }


@torch.no_grad()
def loss_by_position(model: RoPEDecoder, windows: Tensor, scaling: Scaling | None) -> Tensor:
    """(N, T + 1) windows -> nats at each position, the mean over windows: (T,)."""
    for module in model.modules():
        if isinstance(module, RoPE):
            module.scaling = scaling
    total = torch.zeros(windows.shape[1] - 1)
    for batch in windows.to(model.tok_embed.weight.device).split(16):
        logits = model(batch[:, :-1])
        total += F.cross_entropy(logits.transpose(1, 2).float(), batch[:, 1:], reduction="none").sum(0).cpu()
    return total / len(windows)


def loss_as_texts_grow(model: RoPEDecoder, windows: Tensor, scaling: Scaling | None, short: int) -> Tensor:
    """(N, T + 1) windows -> nats at each position, (T,); each stretch of `short` positions is the end of its text."""
    ends = range(short, windows.shape[1], short)
    return torch.cat([loss_by_position(model, windows[:, : end + 1], scaling)[-short:] for end in ends])


def table(losses: dict[str, Tensor], short: int) -> str:
    """A Markdown table of the mean loss in each stretch of `short` positions."""
    stretches = range(0, len(next(iter(losses.values()))), short)
    lines = ["| | " + " | ".join(f"{start} to {start + short - 1}" for start in stretches) + " |"]
    lines += ["|---" * (len(stretches) + 1) + "|"]
    for name, loss in losses.items():
        lines.append(f"| {name} | " + " | ".join(f"{part.mean():.3f}" for part in loss.split(short)) + " |")
    return "\n".join(lines) + "\n"


def draw(losses: dict[str, Tensor], path: Path, short: int) -> None:
    """Draw the loss against the position, averaged over a sixteenth of the text."""
    figure = new_figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, loss in losses.items():
        width = max(1, len(loss) // 16)
        smooth = loss.unfold(0, width, 1).mean(-1)
        axes.plot(torch.arange(len(smooth)) + width / 2, smooth, label=name, color="black" if "no" in name else None)
    axes.axvline(short, color="grey", linestyle=":")
    axes.text(short, axes.get_ylim()[1], " trained up to here", va="top", color="grey", fontsize=8)
    axes.set_xlabel("position")
    axes.set_ylabel("eval loss, nats per token")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
    with replacing(path) as picture:
        figure.savefig(picture, format="png", dpi=140)


@console()
def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    split = arguments.index("--") if "--" in arguments else len(arguments)
    flags = tyro.cli(Arguments, args=arguments[:split])
    sizes = ["--sample", "--data", str(flags.data), "--model.max-seq-len", str(flags.short)]
    train_rope.main([*sizes, "--out", str(flags.out / "rope"), *arguments[split + 1 :]])
    model, _ = load_run(flags.out / "rope", find_device())
    windows = eval_windows(open_tokens(flags.data).eval, flags.long, flags.windows)
    ways = scalings(flags.short, flags.long).items()
    progress = tqdm(ways, unit="scaling")
    losses = {name: loss_as_texts_grow(model, windows, scaling, flags.short) for name, scaling in progress}
    text = table(losses, flags.short)
    write_atomically(flags.out / "context.md", text.encode())
    print(f"\n{text}\nwritten to {flags.out / 'context.md'}")
    try_to_draw(draw, losses, flags.out / "context.png", flags.short)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
