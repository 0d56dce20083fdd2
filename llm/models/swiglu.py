"""The baseline with SwiGLU for the GELU layer: a gate, and 2/3 of the width, so that the parameters stay as many.

    FFN(x) = (SiLU(x W_gate) * (x W_up)) W_down        the baseline: GELU(x W_up) W_down

`d_ff` stays the width of the layer that is replaced; the gated one is 2/3 as wide.
GLU Variants Improve Transformer, arXiv 2002.05202; the choice of LLaMA, arXiv 2302.13971. Blog: Activations, GLU.
Gallery: docs/gallery/index.html#swiglu
"""

from torch import nn

from llm.models.baseline import Baseline
from llm.modules.ffn.glu import SwiGLU, gated_width


class SwiGLUDecoder(Baseline):
    def make_ffn(self, layer: int) -> nn.Module:
        return SwiGLU(self.config.d_model, gated_width(self.config.d_ff))
