"""How much attention a trained model gives to the first token of a text: is there an attention sink?

    python -m llm.analysis.sinks runs/baseline runs/gated_attention

Softmax must put its weight of 1 somewhere. Many trained models put what they do not need on the first token, the sink
(StreamingLLM, arXiv 2309.17453). A gate on the output of attention is said to make it needless (Gated Attention, arXiv
2505.06708). The queries of the second half of each text are asked; without a preference the first of t tokens would
have 1 / t. Blog: Attention, sparse attention; case studies.
"""

import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor, nn

from llm.analysis.judge import stories
from llm.console import console
from llm.data.files import open_tokens
from llm.generate.load import load_run
from llm.models.transformer import Transformer
from llm.modules.attention.multi_head import MultiHeadAttention
from llm.training.checkpoint import CheckpointError


@dataclass(frozen=True)
class Arguments:
    """Print how much attention each run's layers give to the first token of a text."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories, checkpoints, or hub folders with the data's tokenizer."""
    data: Path = Path("data/stories")
    """Folder that pre_tokenize.py wrote."""
    texts: int = 64
    """Stories of the eval split, each as long as the model's context."""


@torch.no_grad()
def first_token_weights(model: Transformer, texts: Tensor) -> Tensor:
    """texts (B, T) -> the attention weight of token 0 in each layer, head and query, the mean over texts: (L, H, T).

    If the value of token 0 is 1 and all others are 0, then what a head returns is this weight. Raises ValueError for a
    model with a layer that is no multi-head attention.
    """
    layers = [block.mixer for block in model.blocks]
    if other := sorted({type(layer).__name__ for layer in layers if not isinstance(layer, MultiHeadAttention)}):
        raise ValueError(f"{type(model).__name__} mixes tokens with {', '.join(other)}: name a model of attention only")
    weights = []

    def look(layer: nn.Module, inputs: tuple, _: Tensor) -> None:
        x, positions = inputs[:2]
        q, k, v = layer.project(x, positions)
        k, v, places = layer.store(None, positions, k, v)
        first = torch.zeros_like(v)
        first[:, 0] = 1
        heads = layer.attend(q.transpose(1, 2), k.transpose(1, 2), first.transpose(1, 2), places)
        weights.append(heads[..., 0].float().mean(0).cpu())

    hooks = [layer.register_forward_hook(look) for layer in layers]
    try:
        model(texts)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(weights)


@console()
def main(arguments: list[str] | None = None) -> None:
    """The command."""
    a = tyro.cli(Arguments, args=arguments, prog="python -m llm.analysis.sinks")
    data = open_tokens(a.data)
    print("| model | attention to token 0, by layer | largest head | without a preference |\n|---|---|---|---|")
    for run in a.runs:
        model = load_run(run, torch.device("cpu"))[0]
        length = model.config.max_seq_len
        late = first_token_weights(model, stories(data, a.texts, length))[..., length // 2 :].mean(-1)  # (L, H)
        layers = ", ".join(f"{layer.mean():.4f}" for layer in late)
        uniform = statistics.mean(1 / (t + 1) for t in range(length // 2, length))
        print(f"| {type(model).__name__} | {layers} | {late.max():.4f} | {uniform:.4f} |", flush=True)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError, CheckpointError) as error:
        sys.exit(f"error: {error}")
