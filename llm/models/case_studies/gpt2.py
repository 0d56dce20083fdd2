"""GPT-2: the decoder that later models vary. Learned positions, LayerNorm before each layer, GELU, biases.

Language Models are Unsupervised Multitask Learners (Radford et al., February 2019; no arXiv paper) showed that a model
trained on web pages alone translates, answers and summarises when it is merely asked. It takes the original decoder,
moves LayerNorm from the sum to the input of each layer, with one more before the head, so that 48 layers train, and
draws the weights that write to the residual stream smaller with depth. The head is tied to the embedding of a
byte-level vocabulary, which can encode every text. Positions are a table of 1,024 rows: later positions do not exist.
Blog: Case studies; Position encoding, learned.
Gallery: docs/gallery/index.html#gpt2
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from llm.models.baseline import Baseline
from llm.models.transformer import Transformer
from llm.modules.attention.multi_head import MultiHeadAttention
from llm.modules.blocks import Block
from llm.modules.cache import Cache
from llm.modules.ffn.activations import gelu, gelu_tanh, quick_gelu
from llm.modules.ffn.mlp import MLP
from llm.modules.norms import LayerNorm
from llm.modules.position_encoding.learned import LearnedPosition

ACTIVATIONS = {"gelu_tanh": gelu_tanh, "gelu": gelu, "quick_gelu": quick_gelu}


class GPT2(Transformer):
    @dataclass(frozen=True)
    class Config(Baseline.Config):
        """18.0 M parameters by default, 5.1 M of them the embedding."""

        activation: Literal["gelu_tanh", "gelu", "quick_gelu"] = "gelu_tanh"
        """The nonlinearity; GPT-2 itself has the tanh approximation of GELU."""

        def __post_init__(self):
            super().__post_init__()
            if self.activation not in ACTIVATIONS:
                known = ", ".join(ACTIVATIONS)
                raise ValueError(f"activation = {self.activation!r} must be one of {known} (--model.activation)")

    def __init__(self, config: Config):
        super().__init__(config)
        self.position = LearnedPosition(config.max_seq_len, config.d_model)

    def make_norm(self) -> LayerNorm:
        return LayerNorm(self.config.d_model, self.config.norm_eps)

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.tok_embed(tokens) + self.position(positions)

    def make_block(self, layer: int) -> Block:
        c = self.config
        attention = MultiHeadAttention(d_model=c.d_model, n_heads=c.n_heads, qkv_bias=True, o_bias=True)
        return Block(attention, MLP(c.d_model, c.d_ff, ACTIVATIONS[c.activation], bias=True), self.make_norm)

    def make_cache(self, batch_size: int, length: int, padding: Tensor | int = 0) -> Cache:
        self.position.check(length)
        return super().make_cache(batch_size, length, padding)
