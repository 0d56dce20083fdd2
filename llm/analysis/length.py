"""How the loss changes with the position and with the length of the text, also beyond the length of training.

A scaling of RoPE (llm/modules/position_encoding/context_extension.py) has no weights, so a trained model is given one
after training. Blog: Position encoding, longer context.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llm.models.transformer import Transformer
from llm.modules.attention.latent import LatentAttention
from llm.modules.attention.multi_head import MultiHeadAttention
from llm.modules.masks import FirstAndWindow, Mask, Window
from llm.modules.position_encoding.context_extension import (
    DynamicNTK,
    LinearInterpolation,
    Llama3Bands,
    NTKAware,
    YaRN,
)
from llm.modules.position_encoding.rope import RoPE, Scaling
from llm.modules.sparse.block_mixture import BlockMixtureAttention


def scalings(short: int, long: int) -> dict[str, Scaling]:
    """Every way to extend the context by `long / short`. Dynamic NTK finds this factor itself, so its own is 1."""
    factor = long / short
    return {
        "linear interpolation": LinearInterpolation(factor),
        "NTK-aware": NTKAware(factor),
        "dynamic NTK": DynamicNTK(1.0, short),
        "YaRN": YaRN(factor, short),
        "Llama 3 bands": Llama3Bands(factor, short),
    }


def windows_of(width: int) -> dict[str, Mask]:
    """Ways to read a text of any length with the attention of a short one, `width` keys at most (StreamingLLM)."""
    return {"window": Window(width), "first tokens and window": FirstAndWindow(4, width - 4)}


def set_mask(model: nn.Module, mask: Mask) -> None:
    """Let every attention layer of the model see what the mask shows. Raises ValueError where the model has none."""
    layers = [module for module in model.modules() if isinstance(module, MultiHeadAttention | LatentAttention)]
    layers = [module for module in layers if not isinstance(module, BlockMixtureAttention)]  # whose blocks are its mask
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no layer of attention with a mask, so {mask} changes nothing in it"
        )
    for layer in layers:
        layer.mask = mask


def set_scaling(model: nn.Module, scaling: Scaling | None) -> None:
    """Give every RoPE of the model this scaling."""
    for module in model.modules():
        if isinstance(module, RoPE):
            module.scaling = scaling


@torch.no_grad()
def loss_by_position(model: Transformer, windows: Tensor) -> Tensor:
    """(N, T + 1) windows -> nats at each position, the mean over windows: (T,)."""
    total = torch.zeros(windows.shape[1] - 1)
    for batch in windows.to(model.tok_embed.weight.device).split(16):
        logits = model(batch[:, :-1])
        total += F.cross_entropy(logits.transpose(1, 2).float(), batch[:, 1:], reduction="none").sum(0).cpu()
    return total / len(windows)


def loss_as_texts_grow(model: Transformer, windows: Tensor, short: int) -> list[float | None]:
    """(N, T + 1) windows -> the mean loss of their last `short` tokens, which follow none of the tokens before, then
    `short` of them, and so on: the tokens that are scored stay the same, and only the text before them grows. None
    where the model has no position that far."""
    losses = []
    for length in range(short, windows.shape[1], short):
        try:
            losses.append(loss_by_position(model, windows[:, -(length + 1) :])[-short:].mean().item())
        except (IndexError, ValueError):
            losses.append(None)
    return losses
