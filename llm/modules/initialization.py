"""How weights are drawn before training, so that signals and gradients neither vanish nor explode with depth.

Standard deviations, with L = n_layers and a matrix that turns `in` channels into `out`:

| scheme           | matrices (`.._proj`) | o_proj, down_proj              | drawn from                               |
|------------------|----------------------|--------------------------------|------------------------------------------|
| normal           | 0.02                 | 0.02 / sqrt(2 L)               | a normal distribution                    |
| truncated_normal | 0.987 / sqrt(in)     | 0.987 / sqrt(in) / sqrt(2 L)   | N(0, 1 / in), cut off at 3 deviations    |
| xavier           | sqrt(2 / (in + out)) | sqrt(2 / (in + out))           | a uniform distribution                   |
| kaiming          | sqrt(2 / in)         | sqrt(2 / in)                   | a normal distribution                    |
| zero_output      | 0.02                 | 0                              | a normal distribution                    |

The token embedding has 0.02 in `normal` and `zero_output`. In the schemes that keep the scale it has 1 / sqrt(d_model)
where it is the head, too, so that logits begin with unit variance, and 1 where it is not. Beside matrices that keep
the scale, embeddings of 0.02 would drown in what the blocks add. `Baseline` has 1 / sqrt(d_model) in every scheme and
multiplies by sqrt(d_model), as in Attention Is All You Need.

An untied head, routers and other parameters with two axes or more have 0.02, biases are 0, and gains and other vectors
keep the values that their modules set. Stacked experts (E, out, in) are E matrices. A module may define
`init_weights(scheme, n_layers)` to initialise itself; then the table leaves its parameters alone.

o_proj and down_proj write to the residual stream, 2 L times in all. A factor of 1 / sqrt(2 L) keeps their sum as large
as one of them; zero makes every block the identity at the start.

normal: Language Models are Unsupervised Multitask Learners (GPT-2), section 2.3. truncated_normal: inputs of unit
variance give outputs of unit variance, as in Efficient BackProp (LeCun et al., 1998), with GPT-2's factor. xavier:
Understanding the difficulty of training deep feedforward neural networks (Glorot and Bengio, 2010), a compromise
between the forward and the backward pass. kaiming: Delving Deep into Rectifiers, arXiv 1502.01852, with twice the
variance since ReLU halves it. zero_output: the part of Fixup, arXiv 1901.09321, that a model with norms can use.
Blog: Initialization.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def normal(weight: Tensor, writes_residual: bool, n_layers: int) -> None:
    nn.init.normal_(weight, std=0.02 / (2 * n_layers) ** 0.5 if writes_residual else 0.02)


def truncated_normal(weight: Tensor, writes_residual: bool, n_layers: int) -> None:
    std = (weight.shape[-1] * (2 * n_layers if writes_residual else 1)) ** -0.5
    nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std)


def xavier(weight: Tensor, writes_residual: bool, n_layers: int) -> None:
    limit = (6 / sum(weight.shape[-2:])) ** 0.5  # a uniform distribution within +-limit deviates by limit / sqrt(3)
    nn.init.uniform_(weight, -limit, limit)


def kaiming(weight: Tensor, writes_residual: bool, n_layers: int) -> None:
    nn.init.normal_(weight, std=(2 / weight.shape[-1]) ** 0.5)


def zero_output(weight: Tensor, writes_residual: bool, n_layers: int) -> None:
    nn.init.normal_(weight, std=0.0 if writes_residual else 0.02)


SCHEMES: dict[str, Callable[[Tensor, bool, int], None]] = {
    "normal": normal,
    "truncated_normal": truncated_normal,
    "xavier": xavier,
    "kaiming": kaiming,
    "zero_output": zero_output,
}


def embedding_std(scheme: str, d_model: int, tied: bool) -> float:
    """The standard deviation of the token embedding in a model that adds nothing of its own to the table."""
    if scheme in ("normal", "zero_output"):
        return 0.02
    return d_model**-0.5 if tied else 1.0


@torch.no_grad()
def initialize(model: nn.Module, scheme: str, n_layers: int, embedding_std: float = 0.02) -> None:
    """Draw the parameters of `model` in place from the global generator: `init_weights` first, then the table.

    Raises ValueError for a scheme that the table does not have.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"initialization = {scheme!r} must be one of {', '.join(SCHEMES)} (--model.initialization)")
    drawn = set()
    for module in model.modules():
        if hasattr(module, "init_weights"):
            module.init_weights(scheme, n_layers)
            drawn |= set(module.parameters())
    for name, parameter in model.named_parameters():
        path = name.split(".")
        if parameter in drawn:
            continue
        if path[-1] == "bias" or path[-1].endswith("_proj_bias"):
            nn.init.zeros_(parameter)
        elif parameter.dim() >= 2 and any(part.endswith("_proj") for part in path):
            writes_residual = "o_proj" in path or "down_proj" in path
            SCHEMES[scheme](parameter, writes_residual, n_layers)
        elif parameter.dim() >= 2:
            nn.init.normal_(parameter, std=embedding_std if name == "tok_embed.weight" else 0.02)
