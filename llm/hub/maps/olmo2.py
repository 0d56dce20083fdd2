"""OLMo 2 as published."""

from llm.hub.maps.common import ENDS, FFN, MIXER, OURS, THEIRS, fields
from llm.hub.rope import read_rope, write_rope
from llm.hub.tables import Published, same
from llm.models.case_studies.olmo2 import OLMo2

PUBLISHED = {
    OLMo2: Published(
        model_type="olmo2",
        architecture="Olmo2ForCausalLM",
        names=(
            *ENDS,
            (OURS + "mixer_norm.weight", THEIRS + "post_attention_layernorm.weight", same),
            (OURS + "ffn_norm.weight", THEIRS + "post_feedforward_layernorm.weight", same),
            MIXER,
            FFN,
        ),
        fields=fields(
            **dict(vocab_size=50_304, max_seq_len=2048, d_model=4096, n_layers=32, n_heads=32, n_kv_heads="n_heads"),
            **dict(head_dim=None, d_ff=11_008, norm_eps=1e-5, tie_embeddings=False),
        ),
        required={"hidden_act": ("silu",), "attention_bias": (False,)},
        read=read_rope,
        write=write_rope,
    )
}

COMMON = dict(vocab_size=100_352, max_seq_len=4096, rope_theta=500_000.0, norm_eps=1e-6, tie_embeddings=False)
SIZES = {
    OLMo2: {
        "olmo2-1b": dict(COMMON, d_model=2048, n_layers=16, n_heads=16, n_kv_heads=16, d_ff=8192),
        "olmo2-7b": dict(COMMON, d_model=4096, n_layers=32, n_heads=32, n_kv_heads=32, d_ff=11_008),
        "olmo2-13b": dict(COMMON, d_model=5120, n_layers=40, n_heads=40, n_kv_heads=40, d_ff=13_824),
        "olmo2-32b": dict(COMMON, d_model=5120, n_layers=64, n_heads=40, n_kv_heads=8, d_ff=27_648),
    }
}
