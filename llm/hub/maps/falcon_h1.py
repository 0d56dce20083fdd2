"""Falcon-H1 as published."""

from typing import Any

from llm.hub.maps.common import ENDS, OURS, THEIRS, fields
from llm.hub.maps.mamba import mamba_rows, read_step_limit
from llm.hub.rope import read_rope, write_rope
from llm.hub.tables import PretrainedError, Published, check_count, check_kind, require, same
from llm.models.case_studies.falcon_h1 import FalconH1

MULTIPLIERS = {"ssm_multipliers": 5, "mlp_multipliers": 2}


def read(left: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """The width of a head of Mamba-2 and the lists of multipliers.

    Raises PretrainedError where the heads are not as wide together as the layer, or where the norm precedes the gate.
    """
    read_step_limit(left)
    width, expand, n_heads = left.pop("mamba_d_ssm", 1024), left.pop("mamba_expand", 2), ours["n_mamba_heads"]
    check_kind("mamba_expand", expand)
    check_kind("mamba_d_ssm", width, nullable=True)
    width = expand * ours["d_model"] if width is None else width
    check_count("mamba_n_heads", n_heads)
    head_dim = left.pop("mamba_d_head", "auto")
    head_dim = width // n_heads if head_dim == "auto" else head_dim
    check_count("mamba_d_head", head_dim)
    require("mamba_d_head times mamba_n_heads", n_heads * head_dim, (width,))
    if left.pop("mamba_norm_before_gate", True) and ours["mamba_norm"]:
        raise PretrainedError("config.json sets mamba_norm_before_gate = True: this model normalises after the gate")
    found = {name: read_factors(name, left.pop(name, None), n) for name, n in MULTIPLIERS.items()}
    return read_rope(left, ours) | {"mamba_head_dim": head_dim} | found


def read_factors(name: str, factors: Any, n: int) -> tuple[float, ...]:
    """A list of `n` numbers; all are 1 where there is none."""
    check_kind(name, factors, list, nullable=True)
    for factor in factors or ():
        check_kind(name, factor, float)
    if factors is not None and len(factors) != n:
        raise PretrainedError(f"config.json sets {name} = {factors}: this model needs {n} numbers there")
    return (1.0,) * n if factors is None else tuple(factors)


def write(config: FalconH1.Config) -> dict[str, Any]:
    widths = dict(mamba_d_head=config.mamba_head_dim, mamba_d_ssm=config.n_mamba_heads * config.mamba_head_dim)
    lists = {name: list(getattr(config, name)) for name in MULTIPLIERS}
    return {**write_rope(config), **widths, **lists, "mamba_norm_before_gate": False}


PUBLISHED = {
    FalconH1: Published(
        model_type="falcon_h1",
        architecture="FalconH1ForCausalLM",
        names=(
            ENDS[0],
            ("norm.weight", "model.final_layernorm.weight", same),
            ENDS[2],
            (OURS + "mixer_norm.weight", THEIRS + "input_layernorm.weight", same),
            (OURS + "ffn_norm.weight", THEIRS + "pre_ff_layernorm.weight", same),
            *mamba_rows(OURS + "mixer.mamba.", THEIRS + "mamba."),
            (OURS + "mixer.mamba.*", THEIRS + "mamba.*", same),
            (OURS + "mixer.attention.*", THEIRS + "self_attn.*", same),
            (OURS + "ffn.*", THEIRS + "feed_forward.*", same),
        ),
        fields=fields(
            {
                **dict(n_mamba_heads="mamba_n_heads", n_mamba_groups="mamba_n_groups", d_state="mamba_d_state"),
                **dict(d_conv="mamba_d_conv", mamba_norm="mamba_rms_norm"),
                **{name: name for name in FalconH1.Config.__dataclass_fields__ if name.endswith("_multiplier")},
            },
            **dict(vocab_size=128_000, max_seq_len=8192, d_model=4096, n_layers=32, n_heads=32, n_kv_heads=8),
            **dict(head_dim=None, d_ff=14_336, norm_eps=1e-5, tie_embeddings=False, n_mamba_heads=128),
            **dict(n_mamba_groups=1, d_state=256, d_conv=4, mamba_norm=False, embedding_multiplier=1.0),
            **dict(lm_head_multiplier=1.0, attention_in_multiplier=1.0, key_multiplier=1.0),
            **dict(attention_out_multiplier=1.0, ssm_in_multiplier=1.0, ssm_out_multiplier=1.0),
        ),
        required={
            "hidden_act": ("silu",),
            "attention_bias": (False,),
            "mlp_bias": (False,),
            "projectors_bias": (False,),
            "mamba_proj_bias": (False,),
            "mamba_conv_bias": (True,),
            "mamba_use_mlp": (True,),
            "attn_layer_indices": (None,),
        },
        ignored=frozenset({"mamba_chunk_size", "num_logits_to_keep"}),
        read=read,
        write=write,
    )
}
ROOT = 0.3535533905932738
SIZES = {
    FalconH1: {
        "falcon-h1-0.5b": dict(
            **dict(vocab_size=32_784, max_seq_len=16_384, d_model=1024, n_layers=36, n_heads=8, n_kv_heads=2),
            **dict(head_dim=64, d_ff=2048, rope_theta=1e11, tie_embeddings=False, n_mamba_heads=24, mamba_head_dim=64),
            **dict(embedding_multiplier=5.656854249492381, lm_head_multiplier=0.0390625, ssm_in_multiplier=1.25),
            **dict(key_multiplier=0.39062499999999994, attention_out_multiplier=0.9375),
            **dict(ssm_out_multiplier=0.23570226039551587, ssm_multipliers=(ROOT, 0.25, ROOT, 0.5, ROOT)),
            **dict(mlp_multipliers=(0.8838834764831844, 0.5859375)),
        )
    }
}
