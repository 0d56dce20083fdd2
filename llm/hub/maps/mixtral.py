"""Mixtral as published: experts one by one, and stacked as transformers 5 has them in memory."""

from functools import partial

from llm.hub.maps.common import ENDS, MIXER, OURS, PRE_NORM, THEIRS, fields
from llm.hub.rope import read_rope, write_rope
from llm.hub.tables import Published, join, same
from llm.models.case_studies.mixtral import Mixtral

ROUTER, GATE_UP, DOWN = (
    OURS + "ffn." + name for name in ("router.weight", "experts.gate_up_proj", "experts.down_proj")
)
EXPERT = THEIRS + "block_sparse_moe.experts.{expert}"
EXPERT_ROWS = (
    (ROUTER, THEIRS + "block_sparse_moe.gate.weight", same),
    (GATE_UP + "[{expert}]", (EXPERT + ".w1.weight", EXPERT + ".w3.weight"), join(2)),
    (DOWN + "[{expert}]", EXPERT + ".w2.weight", same),
    (ROUTER, THEIRS + "mlp.gate.weight", same),
    (GATE_UP, THEIRS + "mlp.experts.gate_up_proj", same),
    (DOWN, THEIRS + "mlp.experts.down_proj", same),
)
PUBLISHED = {
    Mixtral: Published(
        model_type="mixtral",
        architecture="MixtralForCausalLM",
        names=(*ENDS, *PRE_NORM, MIXER, *EXPERT_ROWS),
        fields=fields(
            {"n_experts": "num_local_experts"},
            **dict(vocab_size=32_000, max_seq_len=131_072, d_model=4096, n_layers=32, n_heads=32, n_kv_heads=8),
            **dict(head_dim=None, d_ff=14_336, n_experts=8, top_k=2, window_size=None, norm_eps=1e-5),
            **dict(tie_embeddings=False),
        ),
        required={"hidden_act": ("silu",)},
        ignored=frozenset({"router_jitter_noise"}),  # in training only
        read=partial(read_rope, default_theta=1_000_000.0),
        write=write_rope,
    )
}

COMMON = dict(vocab_size=32_000, n_kv_heads=8, rope_theta=1_000_000.0, tie_embeddings=False)
SIZES = {
    Mixtral: {
        "mixtral-8x7b": dict(COMMON, max_seq_len=32_768, d_model=4096, n_layers=32, n_heads=32, d_ff=14_336),
        "mixtral-8x22b": dict(COMMON, max_seq_len=65_536, d_model=6144, n_layers=56, n_heads=48, d_ff=16_384),
    }
}
