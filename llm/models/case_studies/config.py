"""What the configs of case studies share: grouped heads of their own width, a feed-forward width, RoPE; windows."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from llm.config import ModelConfig, check_positive
from llm.modules.masks import Visible, causal, window
from llm.modules.position_encoding.rope_settings import Settings, make_scaling
from llm.name_table import PretrainedError

LayerType = Literal["sliding_attention", "full_attention"]


@dataclass(frozen=True)
class CaseStudyConfig(ModelConfig):
    """Default sizes are for TinyStories; `sizes` in each model's file has the published ones."""

    n_heads: int = 16
    """Query heads."""
    n_kv_heads: int = 4
    """Key and value heads; must divide n_heads."""
    head_dim: int | None = None
    """Width of a head; where it is not given, d_model / n_heads."""
    d_ff: int = 1376
    """Width of the gated feed-forward layer."""
    rope_theta: float = 10_000.0
    """Base of the rotation; raise it for longer contexts."""
    rope_scaling: Settings = field(default_factory=dict)
    """How longer contexts are reached: rope_type (linear, dynamic, yarn, llama3) and its settings. Empty: not."""

    small: ClassVar[dict[str, Any]] = {**ModelConfig.small, "n_heads": 4, "n_kv_heads": 2, "d_ff": 352}

    def __post_init__(self):
        super().__post_init__()
        for name in ("n_heads", "n_kv_heads", "d_ff"):
            check_positive(self, name)
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"n_kv_heads = {self.n_kv_heads} does not divide n_heads = {self.n_heads}: choose a divisor "
                f"(--model.n-kv-heads)"
            )
        if self.head_dim is None and self.d_model % self.n_heads:
            raise ValueError(
                f"n_heads = {self.n_heads} does not divide d_model = {self.d_model}: choose a divisor "
                f"(--model.n-heads) or say how wide a head is (--model.head-dim)"
            )
        make_scaling(self.rope_scaling)

    @property
    def head_width(self) -> int:
        """`head_dim`, or d_model / n_heads where it is not given."""
        return self.head_dim or self.d_model // self.n_heads


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
        object.__setattr__(self, "layer_types", tuple(self.layer_types))  # JSON knows lists only
        if not self.layer_types or any(kind not in LayerType.__args__ for kind in self.layer_types):
            raise ValueError(
                f"layer_types = {self.layer_types} must be one or several of {', '.join(LayerType.__args__)} "
                "(--model.layer-types)"
            )

    def layer_type(self, layer: int) -> LayerType:
        return self.layer_types[layer % len(self.layer_types)]

    def visible(self, layer: int) -> Visible:
        """What the tokens of a layer see."""
        return window(self.window_size) if self.layer_type(layer) == "sliding_attention" else causal


def read_layer_types(left: dict[str, Any], ours: dict[str, Any], period: int = 2) -> dict[str, Any]:
    """`layer_types` as config.json has them or, where it does not, full attention in the last of each `period` layers.

    Raises PretrainedError where there is not one for each layer.
    """
    types, n_layers = left.pop("layer_types", None), ours["n_layers"]
    if types is None:
        types = ("sliding_attention",) * (period - 1) + ("full_attention",)
    elif not isinstance(types, list) or len(types) != n_layers:
        raise PretrainedError(f"config.json sets layer_types = {types}: {n_layers} layers need a list of {n_layers}")
    return {"layer_types": tuple(types)}
