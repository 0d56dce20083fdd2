"""Mamba and Mamba-2 as published, in the format of transformers (`mamba-2.8b-hf`, `Mamba-Codestral-7B`)."""

import math
from typing import Any

from llm.hub.maps.common import OURS, fields
from llm.hub.tables import PretrainedError, Published, Row, check_count, check_kind, require, same
from llm.models.case_studies.mamba import Mamba2LM, MambaLM

THEIRS = "backbone.layers.{layer}."
ENDS: tuple[Row, ...] = (
    ("tok_embed.weight", "backbone.embeddings.weight", same),
    ("norm.weight", "backbone.norm_f.weight", same),
    ("lm_head.weight", "lm_head.weight", same),
    (OURS + "mixer_norm.weight", THEIRS + "norm.weight", same),
)
NO_LIMIT = 1_048_576
"""`max_seq_len` where config.json has none: a recurrent layer reads texts of any length."""


def mamba_rows(ours: str, theirs: str) -> tuple[Row, ...]:
    """The tensors of a Mamba or Mamba-2 layer. An o_proj without a D beside it is attention's, in hybrids."""
    return (
        (ours + "conv.*", theirs + "conv1d.*", same),
        (ours + "rates.A_log", theirs + "A_log", same),
        (ours + "decay.A_log", theirs + "A_log", same),
        (ours + "decay.dt_bias", theirs + "dt_bias", same),
        (ours + "o_norm.*", theirs + "norm.*", same),
        ((ours + "D", ours + "o_proj.weight"), (theirs + "D", theirs + "out_proj.weight"), same),
    )


NAMES = (*ENDS, *mamba_rows(OURS + "mixer.", THEIRS + "mixer."), (OURS + "mixer.*", THEIRS + "mixer.*", same))
RENAMED = {"norm_eps": "layer_norm_epsilon"}
# how parameters were drawn, which kernels compute, the precision of the residual stream in half precision, and what the
# first checkpoints copied from the code of the authors
SAME_RESULT = (
    "time_step_min time_step_max time_step_floor time_step_scale time_step_init_scheme rescale_prenorm_residual "
    "residual_in_fp32 use_mambapy use_associative_scan chunk_size fused_add_norm pad_vocab_size_multiple n_layer "
    "d_model d_inner norm_before_gate"
)
REQUIRED = {
    "hidden_act": ("silu",),
    "use_bias": (False,),
    "use_conv_bias": (True,),
    "rms_norm": (True,),
}


def read_width(left: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """Raises PretrainedError where `intermediate_size` is not `expand` times the width of the stream."""
    width = ours["expand"] * ours["d_model"]
    require("intermediate_size", left.pop("intermediate_size", width), (width,))
    return {}


def read_rank(left: dict[str, Any], name: str, d_model: int) -> int | None:
    """The rank of the steps; None for that of the paper, a sixteenth of the stream rounded up."""
    rank = left.pop(name, "auto")
    if rank == "auto":
        return None
    check_count(name, rank)
    return None if rank == math.ceil(d_model / 16) else rank


def read(left: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    return read_width(left, ours) | {"dt_rank": read_rank(left, "time_step_rank", ours["d_model"])}


def write(config: MambaLM.Config) -> dict[str, Any]:
    return {"time_step_rank": config.dt_rank or math.ceil(config.d_model / 16)}


def read_step_limit(left: dict[str, Any], name: str = "time_step_limit") -> None:
    """Raises PretrainedError where step sizes are cut off: transformers does so for prompts, but not for the tokens
    that it writes after them."""
    limit = left.pop(name, None)
    low, high = limit if isinstance(limit, list | tuple) and len(limit) == 2 else (limit, None)
    high = high.get("__float__") if isinstance(high, dict) else high  # JSON has no infinity
    unlimited = limit is None or (low == 0 and not isinstance(low, bool) and str(high).lower() in ("inf", "infinity"))
    if not unlimited:
        raise PretrainedError(f"config.json sets {name} = {limit}: this model has steps of any size, [0, Infinity]")


def read2(left: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """Raises PretrainedError where the heads are not as wide together as the layer."""
    read_step_limit(left)
    read_rank(left, "time_step_rank", ours["d_model"])  # transformers writes it, and Mamba-2 has none
    n_heads, width = left.pop("num_heads", 128), ours["expand"] * ours["d_model"]
    check_kind("num_heads", n_heads)
    if n_heads * ours["head_dim"] != width:
        raise PretrainedError(
            f"config.json sets num_heads = {n_heads} and head_dim = {ours['head_dim']}: their product must be expand "
            f"times hidden_size, {width}"
        )
    return read_width(left, ours)


def write2(config: Mamba2LM.Config) -> dict[str, Any]:
    return {"num_heads": config.n_heads}


PUBLISHED = {
    MambaLM: Published(
        model_type="mamba",
        architecture="MambaForCausalLM",
        names=NAMES,
        fields=fields(
            RENAMED,
            **dict(vocab_size=50_280, max_seq_len=NO_LIMIT, d_model=768, n_layers=32, norm_eps=1e-5),
            **dict(d_state=16, d_conv=4, expand=2, tie_embeddings=True),
        ),
        required=REQUIRED,
        ignored=frozenset(SAME_RESULT.split()),
        read=read,
        write=write,
    ),
    Mamba2LM: Published(
        model_type="mamba2",
        architecture="Mamba2ForCausalLM",
        names=NAMES,
        fields=fields(
            RENAMED | {"n_groups": "n_groups"},
            **dict(vocab_size=32_768, max_seq_len=NO_LIMIT, d_model=4096, n_layers=64, norm_eps=1e-5),
            **dict(d_state=128, d_conv=4, expand=2, head_dim=64, n_groups=8, tie_embeddings=False),
        ),
        required=REQUIRED,
        ignored=frozenset(SAME_RESULT.split()),
        read=read2,
        write=write2,
    ),
}

PILE = dict(vocab_size=50_280, max_seq_len=2048)
PILE2 = dict(vocab_size=50_288, max_seq_len=2048)
SHAPES = {
    "130m": dict(d_model=768, n_layers=24),
    "370m": dict(d_model=1024, n_layers=48),
    "790m": dict(d_model=1536, n_layers=48),
    "1.4b": dict(d_model=2048, n_layers=48),
    "2.8b": dict(d_model=2560, n_layers=64),
}
NAMES2 = {"130m": "130m", "370m": "370m", "790m": "780m", "1.4b": "1.3b", "2.8b": "2.7b"}
SIZES = {
    MambaLM: {f"mamba-{name}": PILE | shape for name, shape in SHAPES.items()},
    Mamba2LM: {f"mamba2-{NAMES2[name]}": PILE2 | shape for name, shape in SHAPES.items()}
    | {
        "codestral-mamba-7b": dict(
            **dict(vocab_size=32_768, max_seq_len=262_144, d_model=4096, n_layers=64, n_groups=8, tie_embeddings=False)
        )
    },
}
