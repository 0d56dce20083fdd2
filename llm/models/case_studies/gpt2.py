"""GPT-2: the decoder that later models vary. Learned positions, LayerNorm before each layer, GELU, biases.

Language Models are Unsupervised Multitask Learners (Radford et al., February 2019; no arXiv paper) showed that a model
trained on web pages alone translates, answers and summarises when it is merely asked. It takes the original decoder and
moves LayerNorm from the sum to the input of each layer, with one more before the head, so that 48 layers train; draws
what writes to the residual stream smaller with depth; and ties the head to the embedding of a byte-level vocabulary,
which has a code for every text. Positions are a table of 1,024 rows: there is none for what comes after.
Blog: Case studies; Position encoding, learned.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from llm.config import DecoderConfig
from llm.models.transformer import Transformer
from llm.modules.attention.multi_head import MultiHeadAttention
from llm.modules.blocks import Block
from llm.modules.cache import Cache
from llm.modules.ffn.activations import gelu_tanh
from llm.modules.ffn.mlp import MLP
from llm.modules.norms import LayerNorm
from llm.modules.position_encoding.learned import LearnedPosition
from llm.name_table import Published, Row, same, split, transpose


@dataclass(frozen=True)
class GPT2Config(DecoderConfig):
    """18.0 M parameters by default, 5.1 M of them the embedding; `sizes` has the published ones."""

    @property
    def embedding_std(self) -> float:
        return 0.02  # GPT-2 does not multiply its embeddings


def size(d_model: int, n_layers: int, n_heads: int) -> dict:
    widths = {"d_model": d_model, "n_layers": n_layers, "n_heads": n_heads, "d_ff": 4 * d_model}
    return {**widths, "vocab_size": 50_257, "max_seq_len": 1024}


sizes = {
    "gpt2": size(768, 12, 12),
    "gpt2-medium": size(1024, 24, 16),
    "gpt2-large": size(1280, 36, 20),
    "gpt2-xl": size(1600, 48, 25),
}
sizes = {name: GPT2Config(**size) for name, size in sizes.items()}


def rows(prefix: str) -> tuple[Row, ...]:
    """Matrices are stored (in, out), and those of queries, keys and values side by side as one."""
    ours, theirs = "blocks.{layer}.", prefix + "h.{layer}."
    fused = [tuple(f"{ours}mixer.{name}_proj.{kind}" for name in "qkv") for kind in ("weight", "bias")]
    return (
        ("tok_embed.weight", prefix + "wte.weight", same),
        ("position.table.weight", prefix + "wpe.weight", same),
        ("norm.*", prefix + "ln_f.*", same),
        (ours + "mixer_norm.*", theirs + "ln_1.*", same),
        (ours + "ffn_norm.*", theirs + "ln_2.*", same),
        (fused[0], theirs + "attn.c_attn.weight", transpose.then(split(3))),
        (fused[1], theirs + "attn.c_attn.bias", split(3)),
        (ours + "mixer.o_proj.weight", theirs + "attn.c_proj.weight", transpose),
        (ours + "mixer.o_proj.bias", theirs + "attn.c_proj.bias", same),
        (ours + "ffn.up_proj.weight", theirs + "mlp.c_fc.weight", transpose),
        (ours + "ffn.up_proj.bias", theirs + "mlp.c_fc.bias", same),
        (ours + "ffn.down_proj.weight", theirs + "mlp.c_proj.weight", transpose),
        (ours + "ffn.down_proj.bias", theirs + "mlp.c_proj.bias", same),
    )


# transformers writes the prefix today; OpenAI's four models were saved without it
NAMES = (*rows("transformer."), *rows(""), ("lm_head.weight", "lm_head.weight", same))
FIELDS = (
    ("vocab_size", "vocab_size", 50_257),
    ("max_seq_len", "n_positions", 1024),
    ("d_model", "n_embd", 768),
    ("n_layers", "n_layer", 12),
    ("n_heads", "n_head", 12),
    ("d_ff", "n_inner", None),
    ("norm_eps", "layer_norm_epsilon", 1e-5),
    ("tie_embeddings", "tie_word_embeddings", True),
)
DROPOUT = {"attn_pdrop", "embd_pdrop", "resid_pdrop", "summary_first_dropout"}
SUMMARY = {"summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels"}  # of another head


def read_width(left: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    return {"d_ff": ours["d_ff"] or 4 * ours["d_model"]}


class GPT2(Transformer):
    published = Published(
        model_type="gpt2",
        architecture="GPT2LMHeadModel",
        names=NAMES,
        fields=FIELDS,
        required={"activation_function": ("gelu_new", "gelu_pytorch_tanh"), "scale_attn_weights": (True,)},
        ignored=frozenset(
            DROPOUT | SUMMARY | {"n_ctx", "output_past", "predict_special_tokens", "reorder_and_upcast_attn"}
        ),
        ignored_weights=lambda config: r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias",  # the causal mask
        read=read_width,
    )

    def __init__(self, config: GPT2Config):
        super().__init__(config)
        self.position = LearnedPosition(config.max_seq_len, config.d_model)

    def make_norm(self) -> LayerNorm:
        return LayerNorm(self.config.d_model, self.config.norm_eps)

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.tok_embed(tokens) + self.position(positions)

    def make_block(self, layer: int) -> Block:
        c = self.config
        attention = MultiHeadAttention(d_model=c.d_model, n_heads=c.n_heads, qkv_bias=True, o_bias=True)
        return Block(attention, MLP(c.d_model, c.d_ff, gelu_tanh, bias=True), self.make_norm)

    def make_cache(self, batch_size: int, length: int, padding: Tensor | int = 0) -> Cache:
        self.position.check(length)
        return super().make_cache(batch_size, length, padding)
