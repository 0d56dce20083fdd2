"""Mistral 7B as published."""

from llm.hub.maps.common import DECODER, fields
from llm.hub.rope import read_rope, write_rope
from llm.hub.tables import Published
from llm.models.case_studies.mistral import Mistral

PUBLISHED = {
    Mistral: Published(
        model_type="mistral",
        architecture="MistralForCausalLM",
        names=DECODER,
        fields=fields(
            **dict(vocab_size=32_000, max_seq_len=131_072, d_model=4096, n_layers=32, n_heads=32, n_kv_heads=8),
            **dict(head_dim=None, d_ff=14_336, norm_eps=1e-6, tie_embeddings=False, window_size=4096),
        ),
        required={"hidden_act": ("silu",)},
        nullable=frozenset({"sliding_window"}),
        read=read_rope,
        write=write_rope,
    )
}

SEVEN_B = dict(d_model=4096, n_layers=32, n_heads=32, n_kv_heads=8, d_ff=14_336, tie_embeddings=False)
LATER = dict(SEVEN_B, max_seq_len=32_768, window_size=None, rope_theta=1_000_000.0)
SIZES = {
    Mistral: {
        "mistral-7b-v0.1": dict(SEVEN_B, vocab_size=32_000, max_seq_len=32_768, window_size=4096),
        "mistral-7b-v0.2": dict(LATER, vocab_size=32_000),
        "mistral-7b-v0.3": dict(LATER, vocab_size=32_768),
    }
}
