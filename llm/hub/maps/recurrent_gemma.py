"""RecurrentGemma as published."""

from typing import Any

from llm.hub.maps.common import ENDS, OURS, THEIRS, fields
from llm.hub.rope import read_partial_rope, write_rope
from llm.hub.tables import PretrainedError, Published, check_kind, same
from llm.models.case_studies.recurrent_gemma import RecurrentGemma

BLOCK = THEIRS + "temporal_block."
NAMES = (
    ("norm.weight", "model.final_norm.weight", same),
    *ENDS,
    (OURS + "mixer_norm.weight", THEIRS + "temporal_pre_norm.weight", same),
    (OURS + "ffn_norm.weight", THEIRS + "channel_pre_norm.weight", same),
    ((OURS + "mixer.x_proj.*", OURS + "mixer.o_proj.*"), (BLOCK + "linear_x.*", BLOCK + "linear_out.*"), same),
    (OURS + "mixer.gate_proj.*", BLOCK + "linear_y.*", same),
    (OURS + "mixer.conv.*", BLOCK + "conv_1d.*", same),
    (OURS + "mixer.lru.Lambda", BLOCK + "rg_lru.recurrent_param", same),
    *(
        (OURS + f"mixer.lru.{gate}_{part}", BLOCK + f"rg_lru.{gate}_gate_{part}", same)
        for gate in ("recurrent", "input")
        for part in ("weight", "bias")
    ),
    (OURS + "mixer.*", BLOCK + "*", same),  # the projections of attention
    (OURS + "ffn.*", THEIRS + "mlp_block.*", same),
)


def read(left: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """`intermediate_size` counts gate and up together. Raises PretrainedError for a head of another width than
    hidden_size / num_attention_heads, which transformers would pass over."""
    width, types = left.pop("head_dim", None), left.pop("block_types", ["recurrent", "recurrent", "attention"])
    check_kind("head_dim", width, nullable=True)
    check_kind("block_types", types, list)
    if width is not None and width * ours["n_heads"] != ours["d_model"]:
        raise PretrainedError(f"config.json sets head_dim = {width}: it must be hidden_size / num_attention_heads")
    found = read_partial_rope(left, ours)
    if found["rope_scaling"]:
        raise PretrainedError(f"config.json scales RoPE ({found['rope_scaling']}): this model has no such code")
    share = found["partial_rotary_factor"]
    return found | {
        "layer_types": tuple(types),
        "d_ff": ours["d_ff"] // 2,
        "d_rnn": ours["d_rnn"] or ours["d_model"],
        "partial_rotary_factor": 0.5 if share is None else share,
    }


def write(config: RecurrentGemma.Config) -> dict[str, Any]:
    if config.head_width * config.n_heads != config.d_model:
        raise PretrainedError(
            f"transformers opens no RecurrentGemmaForCausalLM with heads of {config.head_width} channels: it takes "
            "d_model / n_heads (--model.head-dim). This model can be trained and kept as a run, but not exported"
        )
    if config.rope_scaling:
        raise PretrainedError(
            "transformers opens no RecurrentGemmaForCausalLM with a scaled RoPE (--model.rope-scaling)"
        )
    share = {"partial_rotary_factor": config.partial_rotary_factor}
    types = {"block_types": list(config.layer_types)}
    return {**write_rope(config), **share, **types, "intermediate_size": 2 * config.d_ff}


PUBLISHED = {
    RecurrentGemma: Published(
        model_type="recurrent_gemma",
        architecture="RecurrentGemmaForCausalLM",
        names=NAMES,
        fields=fields(
            {
                **dict(window_size="attention_window_size", d_rnn="lru_width", d_conv="conv1d_width"),
                "logit_soft_cap": "logits_soft_cap",
            },
            **dict(vocab_size=256_000, max_seq_len=8192, d_model=2560, n_layers=26, n_heads=10, n_kv_heads="n_heads"),
            **dict(d_ff=7680, d_rnn=None, d_conv=4, window_size=2048, logit_soft_cap=30.0, norm_eps=1e-6),
            **dict(tie_embeddings=True, attention_bias=False),
        ),
        required={"hidden_activation": ("gelu_pytorch_tanh",), "embeddings_scale_by_sqrt_dim": (True,)},
        ignored=frozenset({"w_init_variance_scale", "final_w_init_variance_scale"}),
        read=read,
        write=write,
    )
}

COMMON = dict(vocab_size=256_000, max_seq_len=8192, n_kv_heads=1, window_size=2048)
SIZES = {
    RecurrentGemma: {
        "recurrentgemma-2b": dict(COMMON, d_model=2560, n_layers=26, n_heads=10, d_ff=7680, d_rnn=2560),
        "recurrentgemma-9b": dict(COMMON, d_model=4096, n_layers=38, n_heads=16, d_ff=12_288, d_rnn=4096),
    }
}
