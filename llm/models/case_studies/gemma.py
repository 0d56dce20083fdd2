"""Gemma 2 and 3: layers that see a window between layers that see everything, and a norm on both sides of each.

Both scale the embeddings by sqrt(d_model), use tanh GeGLU, gains of 1 + w, four norms a block, heads wider than
d_model / n_heads and a head tied to an embedding of 256,000 entries and more.

Gemma 2 (July 2024, arXiv 2408.00118) alternates a window of 4,096 with full attention and bends scores and logits
towards ceilings, c tanh(x / c) with c = 50 and 30. Scores are divided by sqrt(query_width): the head's width except in
the 27B model, where it is d_model / n_heads.

Gemma 3 (March 2025, arXiv 2503.19786) is after long contexts: five local layers with windows of 512 or 1,024 for each
global one, so that the cache hardly grows. Local layers turn by the old base of 10,000, global ones by 1,000,000, in
the larger models interpolated by 8. A norm on each query and key head takes the place of the ceilings. The models from
4B on see images, too; text-only checkpoints are 270M and 1B. Blog: Case studies, Gemma.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from llm.config import check_positive
from llm.models.case_study import LayerType, WindowedConfig, read_layer_types
from llm.models.transformer import Transformer
from llm.modules.attention.multi_head import MultiHeadAttention
from llm.modules.attention.soft_capping import SoftCappedAttention, cap
from llm.modules.blocks import SandwichBlock
from llm.modules.ffn.activations import gelu_tanh
from llm.modules.ffn.glu import GLU
from llm.modules.norms import ZeroCentredRMSNorm
from llm.modules.position_encoding.rope import RoPE
from llm.modules.position_encoding.rope_settings import (
    make_scaling,
    normalise,
    read_rope,
    take_settings,
    take_theta,
    write_rope,
)
from llm.name_table import PretrainedError, Published, check_count, same


@dataclass(frozen=True)
class GemmaConfig(WindowedConfig):
    """What both have."""

    norm_eps: float = 1e-6
    """Added to the mean square in every normalisation."""
    query_width: int | None = None
    """Scores are divided by its square root; where it is not given, by that of a head's width."""
    window_size: int = 256
    """Tokens that a token sees in a layer with a window, itself among them."""

    small: ClassVar[dict[str, Any]] = {**WindowedConfig.small, "window_size": 16}

    def __post_init__(self):
        super().__post_init__()
        if self.query_width is not None:
            check_positive(self, "query_width")

    def attention_options(self, layer: int) -> dict[str, Any]:
        """What the attention of both takes, without RoPE."""
        return {
            "d_model": self.d_model,
            "n_heads": self.n_heads,
            "n_kv_heads": self.n_kv_heads,
            "head_dim": self.head_width,
            "visible": self.visible(layer),
            "scale": (self.query_width or self.head_width) ** -0.5,
        }


@dataclass(frozen=True)
class Gemma2Config(GemmaConfig):
    """16.2 M parameters by default, 5.1 M of them the embedding; `sizes` has the published ones."""

    soft_cap: float = 50.0
    """Scores stay between -soft_cap and soft_cap."""
    logit_soft_cap: float = 30.0
    """Logits stay between -logit_soft_cap and logit_soft_cap."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("soft_cap", "logit_soft_cap"):
            check_positive(self, name)


@dataclass(frozen=True)
class Gemma3Config(GemmaConfig):
    """17.9 M parameters by default, 5.1 M of them the embedding: six layers, so that one is global."""

    n_layers: int = 6
    """Number of blocks."""
    d_ff: int = 960
    """Width of the gated feed-forward layer."""
    window_size: int = 64
    """Tokens that a token sees in a layer with a window, itself among them."""
    layer_types: tuple[LayerType, ...] = ("sliding_attention",) * 5 + ("full_attention",)
    """What the layers see, in turn: the window or everything."""
    rope_theta: float = 1_000_000.0
    """Base of the rotation in layers that see everything; rope_scaling is for these only."""
    local_rope_theta: float = 10_000.0
    """Base of the rotation in layers with a window."""

    small: ClassVar[dict[str, Any]] = {**GemmaConfig.small, "d_ff": 240}

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "local_rope_theta")


def size(d_model: int, n_layers: int, n_heads: int, n_kv_heads: int, d_ff: int, head_dim: int, **more: int) -> dict:
    widths = {"d_model": d_model, "n_layers": n_layers, "n_heads": n_heads, "n_kv_heads": n_kv_heads, "d_ff": d_ff}
    return {**widths, "head_dim": head_dim, **more}


two = {"vocab_size": 256_000, "max_seq_len": 8192, "window_size": 4096, "query_width": 256}
three = {"vocab_size": 262_144, "max_seq_len": 32_768, "window_size": 512, "query_width": 256}
sizes = {
    "gemma2-2b": size(2304, 26, 8, 4, 9216, 256, **two),
    "gemma2-9b": size(3584, 42, 16, 8, 14_336, 256, **two),
    "gemma2-27b": size(4608, 46, 32, 16, 36_864, 128, **two | {"query_width": 144}),
    "gemma3-270m": size(640, 18, 4, 1, 2048, 256, **three),
    "gemma3-1b": size(1152, 26, 4, 1, 6912, 256, **three),
}
sizes = {n: (Gemma2Config if n.startswith("gemma2") else Gemma3Config)(**size) for n, size in sizes.items()}

OURS, THEIRS = "blocks.{layer}.", "model.layers.{layer}."
NAMES = (
    ("tok_embed.weight", "model.embed_tokens.weight", same),
    ("norm.weight", "model.norm.weight", same),
    ("lm_head.weight", "lm_head.weight", same),
    (OURS + "mixer_norm.weight", THEIRS + "input_layernorm.weight", same),
    (OURS + "mixer_output_norm.weight", THEIRS + "post_attention_layernorm.weight", same),
    (OURS + "ffn_norm.weight", THEIRS + "pre_feedforward_layernorm.weight", same),
    (OURS + "ffn_output_norm.weight", THEIRS + "post_feedforward_layernorm.weight", same),
    (OURS + "mixer.*", THEIRS + "self_attn.*", same),  # the projections, in Gemma 3 with q_norm and k_norm
    (OURS + "ffn.*", THEIRS + "mlp.*", same),  # gate_proj, up_proj, down_proj
)
FIELDS = (
    ("d_model", "hidden_size", 2304),
    ("n_layers", "num_hidden_layers", 26),
    ("n_heads", "num_attention_heads", 8),
    ("n_kv_heads", "num_key_value_heads", 4),
    ("head_dim", "head_dim", 256),
    ("query_width", "query_pre_attn_scalar", 256),
    ("d_ff", "intermediate_size", 9216),
    ("window_size", "sliding_window", 4096),
    ("norm_eps", "rms_norm_eps", 1e-6),
    ("tie_embeddings", "tie_word_embeddings", True),
)
FIELDS2 = (
    ("vocab_size", "vocab_size", 256_000),
    ("max_seq_len", "max_position_embeddings", 8192),
    ("soft_cap", "attn_logit_softcapping", 50.0),
    ("logit_soft_cap", "final_logit_softcapping", 30.0),
)
FIELDS3 = (("vocab_size", "vocab_size", 262_208), ("max_seq_len", "max_position_embeddings", 131_072))
REQUIRED = {"hidden_activation": ("gelu_pytorch_tanh",), "attention_bias": (False,)}
IGNORED = frozenset({"cache_implementation", "hidden_act", "sliding_window_size"})  # no part of transformers' model


def read2(left: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    return read_layer_types(left, ours) | read_rope(left, ours)


def read3(left: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """RoPE of both kinds of layers, too: `rope_theta`, `rope_scaling` and `rope_local_base_freq`, or `rope_parameters`
    with a dict for each kind. Raises PretrainedError for layers with a window whose RoPE is scaled."""
    period = left.pop("sliding_window_pattern", 6)
    check_count("sliding_window_pattern", period)
    parameters = take_settings(left, "rope_parameters")
    far, near = (take_settings(parameters, kind) for kind in ("full_attention", "sliding_attention"))
    far |= take_settings(left, "rope_scaling")
    if parameters:
        left["rope_parameters"] = parameters  # not for any of our layers: an unknown field
    length = ours["max_seq_len"]
    far = normalise(far, take_theta(left, "rope_theta", 1_000_000.0), length)
    near = normalise(near, take_theta(left, "rope_local_base_freq", 10_000.0), length)
    if near["rope_scaling"]:
        raise PretrainedError(f"config.json scales RoPE in layers with a window ({near['rope_scaling']}): unknown here")
    return read_layer_types(left, ours, period) | far | {"local_rope_theta": near["rope_theta"]}


def write2(config: GemmaConfig) -> dict[str, Any]:
    return {
        **write_rope(config),
        "layer_types": [config.layer_type(layer) for layer in range(config.n_layers)],
        "head_dim": config.head_width,
        "query_pre_attn_scalar": config.query_width or config.head_width,
    }


def write3(config: Gemma3Config) -> dict[str, Any]:
    return {**write2(config), "rope_local_base_freq": config.local_rope_theta}


def scaled_up(x: Tensor) -> Tensor:
    """x (.., D) sqrt(D), the factor first rounded to x's precision: in bf16 it is 34, not 33.94, for D = 1152."""
    return x * x.new_full((), x.shape[-1] ** 0.5)


class Gemma2(Transformer):
    """Windows and full attention in turn; scores and logits under a ceiling."""

    published = Published(
        model_type="gemma2",
        architecture="Gemma2ForCausalLM",
        names=NAMES,
        fields=(*FIELDS, *FIELDS2),
        required=REQUIRED,
        heads_divide_width=True,
        ignored=IGNORED,
        read=read2,
        write=write2,
    )

    def make_norm(self) -> ZeroCentredRMSNorm:
        return ZeroCentredRMSNorm(self.config.d_model, self.config.norm_eps)

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return scaled_up(self.tok_embed(tokens))

    def make_block(self, layer: int) -> SandwichBlock:
        c = self.config
        rope = RoPE(c.head_width, c.rope_theta, scaling=make_scaling(c.rope_scaling))
        attention = SoftCappedAttention(soft_cap=c.soft_cap, rope=rope, **c.attention_options(layer))
        return SandwichBlock(attention, GLU(c.d_model, c.d_ff, gelu_tanh), self.make_norm)

    def unembed(self, x: Tensor) -> Tensor:
        return cap(super().unembed(x), self.config.logit_soft_cap)


class Gemma3(Transformer):
    """Five layers with windows for each without, and a base of RoPE for each kind; a norm on query and key heads."""

    published = Published(
        model_type="gemma3_text",
        architecture="Gemma3ForCausalLM",
        names=NAMES,
        fields=(*FIELDS, *FIELDS3),
        required=REQUIRED,
        heads_divide_width=True,
        ignored=IGNORED,
        read=read3,
        write=write3,
    )

    def make_norm(self) -> ZeroCentredRMSNorm:
        return ZeroCentredRMSNorm(self.config.d_model, self.config.norm_eps)

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return scaled_up(self.tok_embed(tokens))

    def make_block(self, layer: int) -> SandwichBlock:
        c = self.config
        near = RoPE(c.head_width, c.local_rope_theta)
        far = RoPE(c.head_width, c.rope_theta, scaling=make_scaling(c.rope_scaling))
        rope = near if c.layer_type(layer) == "sliding_attention" else far
        norm = partial(ZeroCentredRMSNorm, eps=c.norm_eps)
        attention = MultiHeadAttention(rope=rope, qk_norm=norm, **c.attention_options(layer))
        return SandwichBlock(attention, GLU(c.d_model, c.d_ff, gelu_tanh), self.make_norm)
