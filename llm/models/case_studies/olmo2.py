"""OLMo 2: LLaMA's parts with the norms moved to where they keep training stable.

2 OLMo 2 Furious (Team OLMo, December 2024, arXiv 2501.00656; models of 1B and 32B followed in 2025) is open in weights,
data, code and logs. Its predecessor's loss had spikes, and the report says step by step what helped: RMSNorm on what
each layer adds instead of on what it reads, so that none can add more than its gain, and RMSNorm on queries and keys
over the full width of all heads before RoPE, so that scores stay bounded. The rest is SwiGLU, RoPE with a base of
500,000 and no biases; the 32B model shares keys in groups of five heads, the others have one for each.
Blog: Case studies; Normalization, QK-norm.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from llm.models.case_study import CaseStudyConfig
from llm.models.transformer import Transformer
from llm.modules.attention.qk_norm import FullWidthQKNormAttention
from llm.modules.blocks import OutputNormBlock
from llm.modules.ffn.glu import SwiGLU
from llm.modules.norms import OnceRoundedRMSNorm
from llm.modules.position_encoding.rope import RoPE
from llm.modules.position_encoding.rope_settings import make_scaling, read_rope, write_rope
from llm.name_table import Published, same


@dataclass(frozen=True)
class OLMo2Config(CaseStudyConfig):
    """17.8 M parameters by default, 5.1 M of them the embedding; `sizes` has the published ones."""

    n_kv_heads: int = 16
    """Key and value heads; must divide n_heads."""

    small: ClassVar[dict[str, Any]] = {**CaseStudyConfig.small, "n_kv_heads": 4}


common = {"vocab_size": 100_352, "max_seq_len": 4096, "rope_theta": 500_000.0, "norm_eps": 1e-6}
common |= {"tie_embeddings": False}
sizes = {
    "olmo2-1b": {**common, "d_model": 2048, "n_layers": 16, "n_heads": 16, "n_kv_heads": 16, "d_ff": 8192},
    "olmo2-7b": {**common, "d_model": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 32, "d_ff": 11_008},
    "olmo2-13b": {**common, "d_model": 5120, "n_layers": 40, "n_heads": 40, "n_kv_heads": 40, "d_ff": 13_824},
    "olmo2-32b": {**common, "d_model": 5120, "n_layers": 64, "n_heads": 40, "n_kv_heads": 8, "d_ff": 27_648},
}
sizes = {name: OLMo2Config(**size) for name, size in sizes.items()}

NAMES = (
    ("tok_embed.weight", "model.embed_tokens.weight", same),
    ("norm.weight", "model.norm.weight", same),
    ("lm_head.weight", "lm_head.weight", same),
    ("blocks.{layer}.mixer_norm.weight", "model.layers.{layer}.post_attention_layernorm.weight", same),
    ("blocks.{layer}.ffn_norm.weight", "model.layers.{layer}.post_feedforward_layernorm.weight", same),
    ("blocks.{layer}.mixer.*", "model.layers.{layer}.self_attn.*", same),  # the projections, q_norm and k_norm
    ("blocks.{layer}.ffn.*", "model.layers.{layer}.mlp.*", same),  # gate_proj, up_proj, down_proj
)
FIELDS = (
    ("vocab_size", "vocab_size", 50_304),
    ("max_seq_len", "max_position_embeddings", 2048),
    ("d_model", "hidden_size", 4096),
    ("n_layers", "num_hidden_layers", 32),
    ("n_heads", "num_attention_heads", 32),
    ("n_kv_heads", "num_key_value_heads", "n_heads"),
    ("head_dim", "head_dim", None),
    ("d_ff", "intermediate_size", 11_008),
    ("norm_eps", "rms_norm_eps", 1e-5),
    ("tie_embeddings", "tie_word_embeddings", False),
)


class OLMo2(Transformer):
    published = Published(
        model_type="olmo2",
        architecture="Olmo2ForCausalLM",
        names=NAMES,
        fields=FIELDS,
        required={"hidden_act": ("silu",), "attention_bias": (False,)},
        read=read_rope,
        write=write_rope,
    )

    def make_norm(self) -> OnceRoundedRMSNorm:
        return OnceRoundedRMSNorm(self.config.d_model, self.config.norm_eps)

    def make_block(self, layer: int) -> OutputNormBlock:
        c = self.config
        attention = FullWidthQKNormAttention(
            d_model=c.d_model,
            n_heads=c.n_heads,
            n_kv_heads=c.n_kv_heads,
            head_dim=c.head_width,
            rope=RoPE(c.head_width, c.rope_theta, scaling=make_scaling(c.rope_scaling)),
            qk_norm=partial(OnceRoundedRMSNorm, eps=c.norm_eps),
        )
        return OutputNormBlock(attention, SwiGLU(c.d_model, c.d_ff), self.make_norm)
