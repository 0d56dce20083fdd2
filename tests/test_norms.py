"""Normalisation layers against their formulas, blocks against their wiring, both against transformers."""

import os

import pytest
import torch
from conftest import redraw, tiny_model
from torch import nn

from llm.modules.blocks import (
    Block,
    OutputNormBlock,
    ParallelBlock,
    PostNormBlock,
    SandwichBlock,
    TwoNormParallelBlock,
)
from llm.modules.kernels.rms_norm import rms_norm
from llm.modules.norms import LayerNorm, RMSNorm, ZeroCentredRMSNorm

os.environ["HF_HUB_OFFLINE"] = "1"
DIM = 24
NORMS = [RMSNorm, LayerNorm, ZeroCentredRMSNorm]
HALF = [torch.float32, torch.bfloat16]


def drawn(module: nn.Module) -> nn.Module:
    redraw(module)
    return module


def batch(*shape: int, dtype=torch.float64) -> torch.Tensor:
    """Neither centred nor of unit scale: a norm that does nothing would be seen."""
    return (3 * torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 2).to(dtype)


def root_mean_square(x: torch.Tensor, eps: float) -> torch.Tensor:
    return (x.square().mean(-1, keepdim=True) + eps).sqrt()


@pytest.mark.parametrize("eps", [1e-5, 0.5])
def test_rms_norm_is_its_formula(eps):
    norm, x = drawn(RMSNorm(DIM, eps).double()), batch(2, 5, DIM)
    torch.testing.assert_close(norm(x), x / root_mean_square(x, eps) * norm.weight, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("dtype", "share"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.005)])
def test_rms_norm_has_the_gradients_of_its_formula(dtype, share):
    """Those of the gain are sums over 4,096 tokens."""
    x, gain, weights = batch(8, 512, DIM, dtype=dtype), batch(DIM, dtype=dtype), batch(8, 512, DIM, dtype=dtype) - 2
    exact = [part.double().requires_grad_() for part in (x, gain)]
    rough = [part.detach().requires_grad_() for part in (x, gain)]
    expected = torch.autograd.grad((exact[0] / root_mean_square(exact[0], 0.5) * exact[1] * weights).sum(), exact)
    found = torch.autograd.grad((rms_norm(*rough, eps=0.5) * weights).sum(), rough)
    for right, gradient in zip(expected, found, strict=True):
        assert gradient.dtype is dtype
        assert (gradient - right).norm() < share * right.norm()


@pytest.mark.parametrize("eps", [1e-5, 0.5])
def test_zero_centred_rms_norm_multiplies_by_one_plus_the_weight(eps):
    norm, x = drawn(ZeroCentredRMSNorm(DIM, eps).double()), batch(2, 5, DIM)
    torch.testing.assert_close(norm(x), x / root_mean_square(x, eps) * (1 + norm.weight), rtol=0, atol=1e-12)


@pytest.mark.parametrize("eps", [1e-5, 0.5])
@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm_is_its_formula(eps, bias):
    norm, x = drawn(LayerNorm(DIM, eps, bias).double()), batch(2, 5, DIM)
    centred = x - x.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * norm.weight
    if bias:
        expected = expected + norm.bias
    assert (norm.bias is not None) == bias
    torch.testing.assert_close(norm(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", NORMS)
def test_a_fresh_norm_has_gain_one_and_no_shift(norm):
    x = batch(4, DIM)
    y = norm(DIM).double()(x)
    torch.testing.assert_close(y.square().mean(-1), torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-4)
    assert (y.mean(-1).abs() < 1e-12).all() == (norm is LayerNorm)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_of_the_input_is_kept(norm, dtype):
    assert norm(DIM).to(dtype)(batch(4, DIM, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("norm", NORMS)
def test_half_precision_is_averaged_in_fp32(norm):
    """A sum of squares kept in fp16 overflows at 65504; one kept in bf16 loses its smaller terms."""
    x = batch(4, 4096, dtype=torch.float16) * 30
    assert norm(4096).half()(x).isfinite().all()
    x = batch(4, 4096, dtype=torch.bfloat16)
    exact = norm(4096).double()(x.double())
    torch.testing.assert_close(norm(4096).bfloat16()(x).double(), exact, rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize("dtype", HALF)
def test_rms_norm_equals_llamas_whose_gain_multiplies_after_the_cast(dtype):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    theirs = drawn(llama.LlamaRMSNorm(DIM, eps=1e-5)).to(dtype)
    ours = RMSNorm(DIM, 1e-5).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    x = batch(64, DIM, dtype=dtype)
    close = {"rtol": 0, "atol": 1e-6} if dtype is torch.float32 else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(ours(x), theirs(x), **close)


@pytest.mark.parametrize("dtype", HALF)
def test_zero_centred_rms_norm_equals_gemmas_whose_gain_multiplies_before_the_cast(dtype):
    gemma3 = pytest.importorskip("transformers.models.gemma3.modeling_gemma3")
    theirs = drawn(gemma3.Gemma3RMSNorm(DIM, eps=1e-5)).to(dtype)
    ours = ZeroCentredRMSNorm(DIM, 1e-5).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    x = batch(64, DIM, dtype=dtype)
    close = {"rtol": 0, "atol": 1e-6} if dtype is torch.float32 else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(ours(x), theirs(x), **close)


class Mixer(nn.Module):
    """Stands in for attention: adds the position and mixes channels, so that a wrong argument or order is seen."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(DIM, DIM)

    def forward(self, x, positions, cache=None):
        if cache is not None:
            cache["seen"] = x
        return self.proj(x).tanh() + positions[:, None]


def stand_in_ffn() -> nn.Module:
    return nn.Sequential(nn.Linear(DIM, DIM), nn.Tanh())


def written_out(block: nn.Module, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """What each block is in its paper, from the submodules of the block itself."""
    b, mixer = block, lambda x: block.mixer(x, positions)
    match block:
        case PostNormBlock():
            a = b.mixer_norm(x + mixer(x))
            return b.ffn_norm(a + b.ffn(a))
        case OutputNormBlock():
            a = x + b.mixer_norm(mixer(x))
            return a + b.ffn_norm(b.ffn(a))
        case SandwichBlock():
            a = x + b.mixer_output_norm(mixer(b.mixer_norm(x)))
            return a + b.ffn_output_norm(b.ffn(b.ffn_norm(a)))
        case ParallelBlock():
            return x + mixer(b.norm(x)) + b.ffn(b.norm(x))
        case TwoNormParallelBlock():
            return x + mixer(b.mixer_norm(x)) + b.ffn(b.ffn_norm(x))
        case Block():
            a = x + mixer(b.mixer_norm(x))
            return a + b.ffn(b.ffn_norm(a))


BLOCKS = {
    Block: 2,
    PostNormBlock: 2,
    OutputNormBlock: 2,
    SandwichBlock: 4,
    ParallelBlock: 1,
    TwoNormParallelBlock: 2,
}  # norms each


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_block_is_wired_as_its_paper_says(kind):
    block = drawn(kind(Mixer(), stand_in_ffn(), lambda: RMSNorm(DIM)).double())
    x, positions, cache = batch(2, 5, DIM), torch.arange(5), {}
    torch.testing.assert_close(block(x, positions), written_out(block, x, positions), rtol=0, atol=1e-12)
    block(x, positions, cache)
    assert "seen" in cache
    assert sum(isinstance(module, RMSNorm) for module in block.modules()) == BLOCKS[kind]


class TheirMixer(nn.Module):
    """The stand-in under the signature of transformers' attention."""

    def __init__(self, mixer: Mixer, positions: torch.Tensor):
        super().__init__()
        self.mixer, self.positions = mixer, positions

    def forward(self, hidden_states, **kwargs):
        return self.mixer(hidden_states, self.positions), None


def test_the_output_norm_block_equals_olmo2s_layer():
    transformers = pytest.importorskip("transformers")
    olmo2 = pytest.importorskip("transformers.models.olmo2.modeling_olmo2")
    block = drawn(OutputNormBlock(Mixer(), stand_in_ffn(), lambda: RMSNorm(DIM)))
    config = transformers.Olmo2Config(hidden_size=DIM, num_attention_heads=2, intermediate_size=8, rms_norm_eps=1e-5)
    theirs = olmo2.Olmo2DecoderLayer(config, 0)
    theirs.self_attn, theirs.mlp = TheirMixer(block.mixer, torch.arange(5)), block.ffn
    theirs.post_attention_layernorm.load_state_dict(block.mixer_norm.state_dict())
    theirs.post_feedforward_layernorm.load_state_dict(block.ffn_norm.state_dict())
    x = batch(2, 5, DIM, dtype=torch.float32)
    torch.testing.assert_close(block(x, torch.arange(5)), theirs(x), rtol=0, atol=1e-5)


def test_the_sandwich_block_with_zero_centred_norms_equals_gemma2s_layer():
    transformers = pytest.importorskip("transformers")
    gemma2 = pytest.importorskip("transformers.models.gemma2.modeling_gemma2")
    block = drawn(SandwichBlock(Mixer(), stand_in_ffn(), lambda: ZeroCentredRMSNorm(DIM)))
    config = transformers.Gemma2Config(
        hidden_size=DIM, num_attention_heads=2, num_key_value_heads=2, intermediate_size=8, rms_norm_eps=1e-5
    )
    theirs = gemma2.Gemma2DecoderLayer(config, 0)
    theirs.self_attn, theirs.mlp = TheirMixer(block.mixer, torch.arange(5)), block.ffn
    theirs.input_layernorm.load_state_dict(block.mixer_norm.state_dict())
    theirs.post_attention_layernorm.load_state_dict(block.mixer_output_norm.state_dict())
    theirs.pre_feedforward_layernorm.load_state_dict(block.ffn_norm.state_dict())
    theirs.post_feedforward_layernorm.load_state_dict(block.ffn_output_norm.state_dict())
    x = batch(2, 5, DIM, dtype=torch.float32)
    torch.testing.assert_close(block(x, torch.arange(5)), theirs(x), rtol=0, atol=1e-5)


def test_the_parallel_block_equals_gpt_js_layer():
    transformers = pytest.importorskip("transformers")
    gptj = pytest.importorskip("transformers.models.gptj.modeling_gptj")
    block = drawn(ParallelBlock(Mixer(), stand_in_ffn(), lambda: LayerNorm(DIM)))
    theirs = gptj.GPTJBlock(transformers.GPTJConfig(n_embd=DIM, n_head=2, rotary_dim=4, attn_implementation="eager"))
    theirs.attn, theirs.mlp = TheirMixer(block.mixer, torch.arange(5)), block.ffn
    theirs.ln_1.load_state_dict(block.norm.state_dict())
    x = batch(2, 5, DIM, dtype=torch.float32)
    torch.testing.assert_close(block(x, torch.arange(5)), theirs(x)[0], rtol=0, atol=1e-5)


def test_the_two_norm_parallel_block_equals_gpt_neoxs_layer():
    transformers = pytest.importorskip("transformers")
    neox = pytest.importorskip("transformers.models.gpt_neox.modeling_gpt_neox")
    block = drawn(TwoNormParallelBlock(Mixer(), stand_in_ffn(), lambda: LayerNorm(DIM)))
    config = transformers.GPTNeoXConfig(hidden_size=DIM, num_attention_heads=2, intermediate_size=8)
    theirs = neox.GPTNeoXLayer(config, 0).eval()
    theirs.attention, theirs.mlp = TheirMixer(block.mixer, torch.arange(5)), block.ffn
    theirs.input_layernorm.load_state_dict(block.mixer_norm.state_dict())
    theirs.post_attention_layernorm.load_state_dict(block.ffn_norm.state_dict())
    x = batch(2, 5, DIM, dtype=torch.float32)
    torch.testing.assert_close(block(x, torch.arange(5)), theirs(x), rtol=0, atol=1e-5)


def test_post_norm_ends_in_its_last_blocks_norm_and_has_no_other(tokens):
    model = tiny_model("post_norm")
    assert torch.equal(model.hidden(tokens), model.norm(model.hidden(tokens)))
    norms = [name for name, _ in model.named_parameters() if "norm" in name]
    assert len(norms) == 2 * model.config.n_layers


def test_layer_norms_shift_can_be_left_out():
    model = tiny_model("layer_norm", norm_bias=False)
    assert not [name for name, _ in model.named_parameters() if name.endswith("bias")]
    assert len([name for name, _ in tiny_model("layer_norm").named_parameters() if name.endswith("norm.bias")]) == 5
