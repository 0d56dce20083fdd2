"""LLaMA 2 and 3 as published."""

from llm.hub.maps.common import DECODER, fields
from llm.hub.rope import read_rope, write_rope
from llm.hub.tables import Published
from llm.models.case_studies.llama import Llama

PUBLISHED = {
    Llama: Published(
        model_type="llama",
        architecture="LlamaForCausalLM",
        names=DECODER,
        fields=fields(
            **dict(vocab_size=32_000, max_seq_len=2048, d_model=4096, n_layers=32, n_heads=32, n_kv_heads="n_heads"),
            **dict(head_dim=None, d_ff=11_008, norm_eps=1e-6, tie_embeddings=False),
            **dict(attention_bias=False, mlp_bias=False),
        ),
        required={"hidden_act": ("silu",)},
        heads_divide_width=True,
        read=read_rope,
        write=write_rope,
    )
}


def longer(factor: float) -> dict:
    """Llama 3.1 and later: from 8,192 tokens to 131,072."""
    bands = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return {"max_seq_len": 131_072, "rope_scaling": {"rope_type": "llama3", "factor": factor, **bands}}


TWO = dict(vocab_size=32_000, max_seq_len=4096, tie_embeddings=False)
THREE = dict(vocab_size=128_256, max_seq_len=8192, rope_theta=500_000.0, n_kv_heads=8, tie_embeddings=False)
SMALL = THREE | longer(32.0) | {"tie_embeddings": True}
WIDE = dict(d_model=8192, n_layers=80, n_heads=64, d_ff=28_672)
EIGHT_B = dict(d_model=4096, n_layers=32, n_heads=32, d_ff=14_336)
SIZES = {
    Llama: {
        "llama2-7b": dict(TWO, d_model=4096, n_layers=32, n_heads=32, n_kv_heads=32, d_ff=11_008),
        "llama2-13b": dict(TWO, d_model=5120, n_layers=40, n_heads=40, n_kv_heads=40, d_ff=13_824),
        "llama2-70b": dict(TWO, **WIDE, n_kv_heads=8),
        "llama3-8b": THREE | EIGHT_B,
        "llama3-70b": THREE | WIDE,
        "llama3.1-8b": THREE | EIGHT_B | longer(8.0),
        "llama3.1-70b": THREE | WIDE | longer(8.0),
        "llama3.1-405b": dict(THREE, d_model=16_384, n_layers=126, n_heads=128, d_ff=53_248) | longer(8.0),
        "llama3.2-1b": dict(SMALL, d_model=2048, n_layers=16, n_heads=32, d_ff=8192),
        "llama3.2-3b": dict(SMALL, d_model=3072, n_layers=28, n_heads=24, d_ff=8192),
        "llama3.3-70b": THREE | WIDE | longer(8.0),
    }
}
