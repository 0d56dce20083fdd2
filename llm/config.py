"""What can be set: the fields that every model has, and those of a training run.

A model's own fields are in its `Config`. Every field is a command-line flag: those of `TrainConfig` bare
(`--max-lr 1e-3`), those of the model under `--model.` (`--model.n-layers 8`).
"""

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

Initialization = Literal["normal", "truncated_normal", "xavier", "kaiming", "zero_output"]


@dataclass(frozen=True)
class ModelConfig:
    """Sizes that every model has. Raises ValueError for a size that is not positive and for a number like nan."""

    vocab_size: int = 10_000
    """Entries of the vocabulary; where it is not given, the data's."""
    max_seq_len: int = 512
    """Context length in tokens, in training and in generation."""
    d_model: int = 512
    """Width of the residual stream."""
    n_layers: int = 4
    """Number of blocks."""
    norm_eps: float = 1e-5
    """Added to the variance in every normalisation."""
    tie_embeddings: bool = True
    """Use the token embedding as the output head, too."""
    initialization: Initialization = "normal"
    """How weights are drawn; llm/modules/initialization.py has the standard deviations of each scheme."""

    small: ClassVar[dict[str, Any]] = {"d_model": 128, "max_seq_len": 256}
    """The same architecture at the size that `--sample` trains on a laptop, as overrides of the defaults."""

    def __post_init__(self):
        check_finite(self, "--model.")
        check_positive(self, "vocab_size", "max_seq_len", "d_model", "n_layers")


@dataclass(frozen=True)
class TrainConfig:
    """One training run: data, budget, optimiser, evaluation, machine. Raises ValueError for values that cannot work."""

    data: Path = Path("data/tinystories")
    """Folder that pre_tokenize.py wrote."""
    out: Path | None = None
    """Run directory; where it is not given, runs/<model> for TinyStories and runs/<model>-<folder> for other data."""
    steps: int = 2_500
    """Optimiser steps."""
    tokens_per_step: int = 131_072
    """Tokens in one optimiser step over all ranks; the accumulation follows from it."""
    micro_batch_size: int = 32
    """Windows that one rank computes at once; lower it when memory runs out: the result stays the same."""
    seed: int = 0
    """Draws the weights and the order of the data."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: for the matrices of the blocks, with AdamW for the rest; the other settings serve both."""
    max_lr: float = 1e-3
    """Learning rate after the warm-up."""
    min_lr: float = 1e-4
    """Learning rate at the last step."""
    warmup_steps: int = 100
    """Steps of linear warm-up; a cosine follows."""
    weight_decay: float = 0.1
    """AdamW's decay, on matrices only."""
    beta1: float = 0.9
    """AdamW's decay of the mean of the gradients."""
    beta2: float = 0.95
    """AdamW's decay of the mean of their squares."""
    grad_clip: float = 1.0
    """Largest norm of the gradient; a larger one is scaled down to it."""

    log_every: int = 10
    """Steps between two lines of metrics.jsonl."""
    eval_every: int = 250
    """Steps between two evaluations."""
    illustrate: bool = True
    """After each evaluation, write a story and draw loss.png."""
    eval_windows: int = 512
    """Windows of the eval split in one evaluation, always the same; fewer where the split is smaller."""
    save_every: int = 250
    """Steps between two checkpoints."""
    resume: str = "auto"
    """auto: go on from the newest good checkpoint of the run directory; never: start anew; or a checkpoint's path."""
    wandb: Literal["auto", "online", "offline", "off"] = "auto"
    """Mirror the metrics to Weights & Biases; auto: when WANDB_API_KEY is set."""

    device: str = "auto"
    """auto, cuda, cuda:1, mps or cpu."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 where the hardware multiplies it, else fp32. Weights are fp32 either way."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; auto: on CUDA only."""
    recompute: bool = False
    """Keep only each block's input for the backward pass and recompute the rest: less memory, a third more work."""
    shard: bool = False
    """Share weights, gradients and optimiser states out over the ranks of torchrun, for models that outgrow a GPU."""

    def __post_init__(self):
        check_finite(self, "--")
        check_positive(self, "steps", "tokens_per_step", "micro_batch_size", "log_every", "eval_every", "eval_windows")
        check_positive(self, "max_lr", "grad_clip", "save_every")
        if self.shard and self.optimizer == "muon":
            raise ValueError(
                "optimizer = 'muon' needs whole matrices, and shard = True gives each rank a part of them: choose "
                "adamw (--optimizer), or leave out --shard"
            )
        if not 0 <= self.min_lr <= self.max_lr:
            raise ValueError(f"min_lr = {self.min_lr} must lie between 0 and max_lr = {self.max_lr} (--min-lr)")
        check_not_negative(self, "seed", "warmup_steps", "weight_decay")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must lie in [0, 1) ({flag(self, name)})")


def check_finite(config: Any, prefix: str) -> None:
    """Raises ValueError, naming the field and its flag, where a number of a dataclass is nan or infinite: comparisons
    with nan are never true, so the other checks may pass it. `prefix` is the beginning of the flags."""
    for field in fields(config):
        value = getattr(config, field.name)
        numbers = value if isinstance(value, tuple) else (value,)
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            name = field.name
            raise ValueError(f"{name} = {value} must be a finite number ({prefix}{name.replace('_', '-')})")


def check_positive(config: ModelConfig | TrainConfig, *names: str) -> None:
    """Raises ValueError, naming the field and its flag, where a size is not above zero; None is no size."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise ValueError(f"{name} = {value} must be positive ({flag(config, name)})")


def check_not_negative(config: ModelConfig | TrainConfig, *names: str) -> None:
    """Raises ValueError, naming the field and its flag, where a number is below zero."""
    for name in names:
        if getattr(config, name) < 0:
            raise ValueError(f"{name} = {getattr(config, name)} must not be negative ({flag(config, name)})")


def check_divides(config: ModelConfig, name: str, whole: str, otherwise: str = "") -> None:
    """Raises ValueError, naming fields and flags, where field `name` does not divide field `whole`. `otherwise` says
    what else would help."""
    if getattr(config, whole) % getattr(config, name):
        raise ValueError(
            f"{name} = {getattr(config, name)} does not divide {whole} = {getattr(config, whole)}: choose a divisor "
            f"({flag(config, name)}){otherwise}"
        )


def check_even(config: ModelConfig, name: str) -> None:
    """Raises ValueError where a width whose channels RoPE rotates in pairs is odd."""
    if getattr(config, name) % 2:
        raise ValueError(f"{name} = {getattr(config, name)} must be even: RoPE rotates pairs ({flag(config, name)})")


def check_even_heads(config: ModelConfig) -> None:
    """Raises ValueError where d_model / n_heads is odd, and queries and keys are to be half as wide."""
    width = config.d_model // config.n_heads
    if width % 2:
        raise ValueError(
            f"n_heads = {config.n_heads} makes heads of d_model / n_heads = {width} channels, which must be even, as "
            f"queries and keys are half as wide: choose another number of heads ({flag(config, 'n_heads')}) or another "
            f"width ({flag(config, 'd_model')})"
        )


def check_layer_types(config: ModelConfig, kinds: tuple[str, ...]) -> None:
    """Make `layer_types` a tuple, since JSON knows lists only. Raises ValueError unless it names some of `kinds`."""
    types = tuple(config.layer_types)
    object.__setattr__(config, "layer_types", types)
    if not types or any(kind not in kinds for kind in types):
        raise ValueError(
            f"layer_types = {types} must be one or several of {', '.join(kinds)} ({flag(config, 'layer_types')})"
        )


def flag(config: ModelConfig | TrainConfig, name: str) -> str:
    """The command-line flag of a field."""
    return ("--model." if isinstance(config, ModelConfig) else "--") + name.replace("_", "-")
