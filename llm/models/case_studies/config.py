"""What the configs of case studies share: grouped heads of their own width, a feed-forward width, RoPE; windows.

Default sizes are for TinyStories. The published sizes are in llm/hub/maps, with the names of published checkpoints.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from llm.config import ModelConfig, check_divides, check_layer_types, check_positive, flag
from llm.modules.masks import Mask, Window, causal
from llm.modules.position_encoding.rope import RoPE
from llm.modules.position_encoding.rope_settings import Settings, make_scaling

LayerType = Literal["sliding_attention", "full_attention"]


@dataclass(frozen=True)
class GroupedConfig(ModelConfig):
    """Grouped-query heads and a feed-forward layer; for models without RoPE."""

    n_heads: int = 16
    """Query heads."""
    n_kv_heads: int = 4
    """Key and value heads; must divide n_heads."""
    head_dim: int | None = None
    """Width of a head; where it is not given, d_model / n_heads."""
    d_ff: int = 1376
    """Width of the gated feed-forward layer."""

    small: ClassVar[dict[str, Any]] = {**ModelConfig.small, "n_heads": 4, "n_kv_heads": 2, "d_ff": 352}

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "n_heads", "n_kv_heads", "head_dim", "d_ff")
        check_divides(self, "n_kv_heads", "n_heads")
        if self.head_dim is None:
            check_divides(self, "n_heads", "d_model", " or say how wide a head is (--model.head-dim)")

    @property
    def head_width(self) -> int:
        """`head_dim`, or d_model / n_heads where it is not given."""
        return self.head_dim or self.d_model // self.n_heads


@dataclass(frozen=True)
class CaseStudyConfig(GroupedConfig):
    """Grouped-query heads and RoPE."""

    rope_theta: float = 10_000.0
    """Base of the rotation; raise it for longer contexts."""
    rope_scaling: Settings = field(default_factory=dict)
    """Extension of the context: rope_type (linear, dynamic, yarn, llama3, longrope) and its settings. Empty: none."""

    def __post_init__(self):
        super().__post_init__()
        make_scaling(self.rope_scaling)


@dataclass(frozen=True)
class WindowedConfig(CaseStudyConfig):
    """Layers that see a window beside layers that see everything, as in Gemma and GPT-OSS."""

    window_size: int = 128
    """Tokens that a token sees in a layer with a window, itself among them."""
    layer_types: tuple[LayerType, ...] = ("sliding_attention", "full_attention")
    """What the layers see, in turn: the window or everything."""

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "window_size")
        check_layer_types(self, LayerType.__args__)

    def layer_type(self, layer: int) -> LayerType:
        return self.layer_types[layer % len(self.layer_types)]

    def mask(self, layer: int) -> Mask:
        """What the tokens of a layer see."""
        return Window(self.window_size) if self.layer_type(layer) == "sliding_attention" else causal


def grouped_heads(c: CaseStudyConfig, rotated: float = 1.0) -> dict[str, Any]:
    """The arguments of MultiHeadAttention that these models have in common. `rotated` is the share of each head that
    turns."""
    scaling = make_scaling(c.rope_scaling)
    rope = RoPE(c.head_width, c.rope_theta, rotary_dim=int(c.head_width * rotated), scaling=scaling)
    return dict(d_model=c.d_model, n_heads=c.n_heads, n_kv_heads=c.n_kv_heads, head_dim=c.head_width, rope=rope)


def check_share(config: ModelConfig, name: str) -> None:
    """Raises ValueError where a field is not a share of something: above 0 and at most 1."""
    if not 0 < getattr(config, name) <= 1:
        raise ValueError(f"{name} = {getattr(config, name)} must lie in (0, 1] ({flag(config, name)})")
