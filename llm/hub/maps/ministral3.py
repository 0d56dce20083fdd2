"""Ministral 3's text model as published."""

from typing import Any

from llm.hub.maps.common import DECODER, fields
from llm.hub.rope import read_rope, write_rope
from llm.hub.tables import Published, check_count, check_kind
from llm.models.case_studies.ministral3 import Ministral3
from llm.modules.position_encoding.rope_settings import LENGTH

YARN = {
    **{"rope_type": "yarn", "rope_theta": 1_000_000.0, "factor": 16.0, LENGTH: 16_384},
    **{"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1},
}


def read(left: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """The growth of queries stands among RoPE's settings. Where there are none, transformers takes those of the
    published models."""
    name = "rope_scaling" if left.get("rope_scaling") else "rope_parameters"
    given = left.get(name)
    check_kind(name, given, dict, nullable=True)
    settings = dict(given or YARN)
    growth, length = settings.pop("llama_4_scaling_beta", 0.0), settings.get(LENGTH, ours["max_seq_len"])
    settings.pop("max_position_embeddings", None)  # the same a second time
    check_kind("llama_4_scaling_beta", growth, float)
    check_count(LENGTH, length)
    if settings.get("rope_type", settings.get("type", "default")) == "default":
        settings.pop(LENGTH, None)
    left[name] = settings
    return read_rope(left, ours) | {"query_growth": growth, "query_length": length}


def write(config: Ministral3.Config) -> dict[str, Any]:
    """transformers reads the growth of queries from `rope_parameters` only, and needs the length of it there."""
    growth = {"llama_4_scaling_beta": float(config.query_growth), LENGTH: config.query_length}
    scaling = config.rope_scaling or {"rope_type": "default"}
    trained = {name: value for name, value in write_rope(config).items() if name == "max_position_embeddings"}
    return {"rope_parameters": {**scaling, "rope_theta": config.rope_theta, **growth}, **trained}


PUBLISHED = {
    Ministral3: Published(
        model_type="ministral3",
        architecture="Ministral3ForCausalLM",
        names=DECODER,
        fields=fields(
            **dict(vocab_size=131_072, max_seq_len=262_144, d_model=4096, n_layers=34, n_heads=32, n_kv_heads=8),
            **dict(head_dim=128, d_ff=14_336, norm_eps=1e-5, tie_embeddings=False, window_size=None),
        ),
        required={"hidden_act": ("silu",)},
        nullable=frozenset({"head_dim"}),
        read=read,
        write=write,
    )
}

SIZES = {
    Ministral3: {
        "ministral3-8b": dict(
            **dict(vocab_size=131_072, max_seq_len=262_144, d_model=4096, n_layers=34, n_heads=32, n_kv_heads=8),
            **dict(head_dim=128, d_ff=14_336, tie_embeddings=False, rope_theta=1_000_000.0),
            **dict(query_growth=0.1, query_length=16_384),
            rope_scaling={name: YARN[name] for name in YARN if name not in ("rope_theta", "llama_4_scaling_beta")},
        )
    }
}
