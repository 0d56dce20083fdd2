"""Activations and gated layers against their formulas."""

import math

import pytest
import torch
from conftest import redraw

from llm.models.baseline import Baseline
from llm.models.swiglu import SwiGLUDecoder
from llm.modules.ffn import activations
from llm.modules.ffn.glu import GLU, GeGLU, ReGLU, SwiGLU, gated_width
from llm.modules.ffn.mlp import MLP


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def normal_share_below(x):
    return (1 + math.erf(x / math.sqrt(2))) / 2


FORMULAS = {
    "relu": lambda x: max(x, 0.0),
    "gelu": lambda x: x * normal_share_below(x),
    "gelu_tanh": lambda x: x / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x * sigmoid(x),
    "swish": lambda x: x * sigmoid(x),
    "relu_squared": lambda x: max(x, 0.0) ** 2,
}


@pytest.mark.parametrize("name", FORMULAS)
def test_an_activation_is_its_formula(name):
    x = torch.linspace(-4, 4, 41, dtype=torch.float64)
    expected = torch.tensor([FORMULAS[name](value) for value in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(getattr(activations, name)(x), expected, rtol=0, atol=1e-12)


def test_beta_leads_swish_from_half_the_identity_to_relu():
    x = torch.linspace(-4, 4, 41, dtype=torch.float64)
    torch.testing.assert_close(activations.swish(x, 0.0), x / 2)
    torch.testing.assert_close(activations.swish(x, 1e6), activations.relu(x), rtol=0, atol=1e-5)
    slope = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    activations.swish(x, slope).sum().backward()
    assert slope.grad > 0


def test_the_tanh_form_is_near_gelu_but_is_not_gelu():
    x = torch.linspace(-4, 4, 41, dtype=torch.float64)
    distance = (activations.gelu(x) - activations.gelu_tanh(x)).abs().max()
    assert 1e-5 < distance < 1e-3


@pytest.mark.parametrize(
    "variant, gate",
    [(GLU, sigmoid), (ReGLU, FORMULAS["relu"]), (GeGLU, FORMULAS["gelu"]), (SwiGLU, FORMULAS["silu"])],
)
def test_a_gated_layer_is_its_formula(variant, gate):
    torch.manual_seed(0)
    layer = variant(5, 3).double()
    redraw(layer)
    x = torch.randn(5, dtype=torch.float64)
    gates = [gate(value) for value in (layer.gate_proj.weight @ x).tolist()]
    hidden = torch.tensor(gates, dtype=torch.float64) * (layer.up_proj.weight @ x)
    torch.testing.assert_close(layer(x), layer.down_proj.weight @ hidden)


@pytest.mark.parametrize("d_ff", [96, 512, 2048, 11008])
def test_two_thirds_of_the_width_keep_the_parameters(d_ff):
    plain = sum(p.numel() for p in MLP(8, d_ff).parameters())
    gated = sum(p.numel() for p in SwiGLU(8, gated_width(d_ff)).parameters())
    assert gated == pytest.approx(plain, rel=0.01)
    assert gated_width(d_ff) % 8 == 0


def test_the_width_rule_without_rounding_is_exact_where_three_divides():
    assert gated_width(3 * 1024, multiple_of=1) == 2 * 1024
    assert gated_width(8, multiple_of=64) == 64


@pytest.mark.parametrize("sizes", [{}, Baseline.Config.small])
def test_the_swiglu_model_has_the_parameters_of_the_baseline(sizes):
    with torch.device("meta"):
        gated = SwiGLUDecoder(SwiGLUDecoder.Config(**sizes))
        plain = Baseline(Baseline.Config(**sizes))
    count = [sum(p.numel() for p in model.parameters()) for model in (gated, plain)]
    assert count[0] == pytest.approx(count[1], rel=0.005)


def test_gated_layers_equal_the_ones_in_llama_and_gemma(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers")
    from transformers.models.gemma.modeling_gemma import GemmaMLP
    from transformers.models.llama.modeling_llama import LlamaMLP

    llama = LlamaMLP(transformers.LlamaConfig(hidden_size=16, intermediate_size=40, num_attention_heads=2))
    gemma = GemmaMLP(transformers.GemmaConfig(hidden_size=16, intermediate_size=40, num_attention_heads=2))
    for theirs, activation in [(llama, activations.silu), (gemma, activations.gelu_tanh)]:
        redraw(theirs)
        ours = GLU(16, 40, activation)
        ours.load_state_dict(theirs.state_dict())
        x = torch.randn(2, 7, 16)
        torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=2e-5)
