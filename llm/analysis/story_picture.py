"""A picture of a story as it appears: each token in the colour of the step that wrote it.

    python -m llm.analysis.story_picture runs/masked_diffusion --out docs/diffusion_story.svg

In a browser the tokens appear in the order in which they were written, block after block. Where nothing moves, the
whole story is there, and its colours tell the order within each block. Blog: Diffusion.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from pathlib import Path

import torch
import tyro
from tokenizers import Tokenizer
from torch import Tensor

from llm.console import console
from llm.files import write_atomically
from llm.generate.load import load_run
from llm.generate.sampling import Sampler
from llm.generate.text import encode_prompt, end_of_text
from llm.models.denoiser import Denoiser
from llm.modules.diffusion.unmasking import Unmasking
from llm.training.checkpoint import CheckpointError
from llm.training.device import find_device

WIDTH, MARGIN, SIZE, LEADING = 880, 20, 15, 27  # of the picture, of its border, of letters and of lines, in pixels
SECONDS = 0.25  # for each step
LETTER = 0.602 * SIZE  # width of a letter of the usual monospaced fonts
FONT = "ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace"
EARLY, LATE = (219, 234, 254), (30, 58, 138)  # colours of the first and of the last step


@dataclass(frozen=True)
class Arguments:
    """Write a story with a diffusion model and draw when each token appeared."""

    run: tyro.conf.Positional[Path]
    """Run directory or checkpoint of a diffusion model."""
    prompt: str = "Once upon a time"
    """How the story begins."""
    max_new_tokens: int = 96
    """Tokens to write."""
    temperature: float = 0.5
    """Below 1 keeps to the likelier tokens; 0 takes the likeliest each time."""
    unmasking: Unmasking = field(default_factory=Unmasking)
    """How the model writes."""
    seed: int = 0
    """Draws the tokens."""
    device: str = "auto"
    """auto, cuda, mps or cpu."""
    out: Path = Path("docs/diffusion_story.svg")
    """The picture."""


@dataclass(frozen=True)
class Written:
    """A token as text, the step of its block that wrote it, and the number of steps until then; 0 for the prompt."""

    text: str
    step: int = 0
    moment: int = 0


def watch(predict: Callable[..., Tensor], seen: list[Tensor]) -> Callable[..., Tensor]:
    """`predict`, which also keeps the block (1, n) that it is given, its last argument, before each step."""

    def watched(*arguments) -> Tensor:
        seen.append(arguments[-1].clone())
        return predict(*arguments)

    return watched


def write_watched(model: Denoiser, tokenizer: Tokenizer, a: Arguments, device: torch.device) -> list[Written]:
    """The prompt, and the tokens of the story up to its end, each with the step that wrote it."""
    model.unmasking, seen = a.unmasking, []
    model.predict = watch(model.predict, seen)
    prompt = encode_prompt(tokenizer, a.prompt)
    sampler = Sampler((torch.Generator(device).manual_seed(a.seed),), a.temperature)
    written, steps, moment = [], [], 0
    for block in model.generate(torch.tensor([prompt], device=device), a.max_new_tokens, sampler):
        hidden = torch.stack([state[0] == model.mask_token for state in seen])  # (steps, n): before each step
        n = block.shape[1]
        steps += [(step := int(count)) and (step, moment + step) for count in hidden.sum(0).tolist()[-n:]]
        written += block[0].tolist()
        moment += len(seen)
        seen.clear()
    ends = [i for i, token in enumerate(written) if token in end_of_text(tokenizer)]
    pieces = texts(tokenizer, prompt + written[: ends[0] if ends else len(written)])
    places = [(0, 0)] * len(prompt) + steps
    return [Written(text, *place) for text, place in zip(pieces, places, strict=False)]


def texts(tokenizer: Tokenizer, tokens: list[int]) -> list[str]:
    """What each token adds to the text."""
    so_far = [tokenizer.decode(tokens[:n]) for n in range(len(tokens) + 1)]
    return [after[len(before) :] for before, after in pairwise(so_far)]


def colour(step: int, n_steps: int) -> tuple[str, str]:
    """Background and letters of a token."""
    if not step:
        return "#ffffff", "#6b7280"
    share = (step - 1) / max(1, n_steps - 1)
    rgb = [round(a + share * (b - a)) for a, b in zip(EARLY, LATE, strict=True)]
    return "#{:02x}{:02x}{:02x}".format(*rgb), "#111827" if share < 0.5 else "#ffffff"


def svg(story: list[Written]) -> str:
    """The picture; each token becomes visible at its moment, and after a pause all begins again."""
    n_steps, n_moments = max(t.step for t in story), max(t.moment for t in story) + 12
    x, y, shapes = MARGIN, MARGIN + LEADING + 14, []
    for token in story:
        text = token.text.strip("\n")
        if "\n" in token.text or x + LETTER * len(text) > WIDTH - MARGIN:
            x, y = MARGIN, y + LEADING
        if text:
            appear = appearance(token.moment / n_moments, SECONDS * n_moments) if token.moment else ""
            shapes.append(f"<g>{shape(text, x, y, *colour(token.step, n_steps))}{appear}</g>")
        x += LETTER * len(text)
    size = f'width="{WIDTH}" height="{y + LEADING}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="{FONT}" font-size="{SIZE}">'
    return "\n".join([head, f'<rect {size} fill="#ffffff"/>', legend(n_steps), *shapes, "</svg>\n"])


def shape(text: str, x: float, y: float, fill: str, ink: str) -> str:
    """A token on its background; spaces before it are background alone."""
    letters, width = text.lstrip(), LETTER * len(text)
    box = f'<rect x="{x:.1f}" y="{y - SIZE - 2}" width="{width:.1f}" height="{SIZE + 8}" rx="3" fill="{fill}"/>'
    begin, length = x + width - LETTER * len(letters), LETTER * len(letters)
    return box + f'<text x="{begin:.1f}" y="{y}" fill="{ink}" textLength="{length:.1f}">{escape(letters)}</text>'


def appearance(moment: float, seconds: float) -> str:
    """Invisible until `moment`, a share of the whole time, again and again."""
    times = f"0;{moment:.4f};{moment:.4f};1"
    animation = f'attributeName="opacity" values="0;0;1;1" keyTimes="{times}" dur="{seconds:g}s"'
    return f'<animate {animation} repeatCount="indefinite"/>'


def legend(n_steps: int) -> str:
    """The colours of the steps."""
    parts = [f'<text x="{MARGIN}" y="{MARGIN + 10}" fill="#6b7280">step of its block:</text>']
    for i, step in enumerate(sorted({round(1 + k * (n_steps - 1) / 7) for k in range(8)})):
        fill, ink = colour(step, n_steps)
        x = MARGIN + 180 + 46 * i
        parts.append(f'<rect x="{x}" y="{MARGIN - 7}" width="40" height="{SIZE + 8}" rx="3" fill="{fill}"/>')
        parts.append(f'<text x="{x + 20}" y="{MARGIN + 10}" fill="{ink}" text-anchor="middle">{step}</text>')
    return "".join(parts)


@console()
def main(arguments: list[str] | None = None) -> None:
    """The command."""
    a = tyro.cli(Arguments, args=arguments, prog="python -m llm.analysis.story_picture")
    device = find_device(a.device)
    model, tokenizer = load_run(a.run, device)
    if model.causal:
        raise ValueError(f"{a.run} holds a model that writes from left to right: name a run of a diffusion model")
    write_atomically(a.out, svg(write_watched(model, tokenizer, a, device)).encode())
    print(f"drawn in {a.out}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError, CheckpointError) as error:
        sys.exit(f"error: {error}")
