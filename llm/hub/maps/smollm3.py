"""SmolLM3 as published."""

from typing import Any

from llm.hub.maps.common import DECODER, fields
from llm.hub.rope import read_rope, write_rope
from llm.hub.tables import PretrainedError, Published, check_count
from llm.models.case_studies.smollm3 import SmolLM3


def read(left: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """`no_rope_layers` has 1 for a layer with RoPE and 0 for one without; without it, each
    `no_rope_layer_interval`-th layer has none."""
    turns, interval = left.pop("no_rope_layers", None), left.pop("no_rope_layer_interval", 4)
    n_layers = ours["n_layers"]
    if turns is None:
        check_count("no_rope_layer_interval", interval)
        turns = [int((layer + 1) % interval != 0) for layer in range(n_layers)]
    if not isinstance(turns, list) or len(turns) < n_layers or any(turn not in (0, 1) for turn in turns):
        raise PretrainedError(f"config.json sets no_rope_layers = {turns}: {n_layers} layers need 0 or 1 each")
    return read_rope(left, ours, default_theta=2_000_000.0) | {"rope_layers": tuple(map(bool, turns[:n_layers]))}


def write(config: SmolLM3.Config) -> dict[str, Any]:
    pattern = config.rope_layers
    return {**write_rope(config), "no_rope_layers": [int(pattern[i % len(pattern)]) for i in range(config.n_layers)]}


PUBLISHED = {
    SmolLM3: Published(
        model_type="smollm3",
        architecture="SmolLM3ForCausalLM",
        names=DECODER,
        fields=fields(
            **dict(vocab_size=128_256, max_seq_len=32_768, d_model=2048, n_layers=36, n_heads=16, n_kv_heads=4),
            **dict(head_dim=None, d_ff=11_008, norm_eps=1e-6, tie_embeddings=True),
            **dict(attention_bias=False, mlp_bias=False),
        ),
        required={
            "hidden_act": ("silu",),
            "use_sliding_window": (False,),
            "layer_types": ("full_attention", None),
        },
        ignored=frozenset({"sliding_window", "max_window_layers"}),
        read=read,
        write=write,
    )
}
SIZES = {
    SmolLM3: {
        "smollm3-3b": dict(
            **dict(vocab_size=128_256, max_seq_len=65_536, d_model=2048, n_layers=36, n_heads=16, n_kv_heads=4),
            **dict(d_ff=11_008, norm_eps=1e-6, rope_theta=5_000_000.0),
        )
    }
}
