"""Recurrent mixers against layers that nobody here wrote: those of transformers, every parameter re-drawn."""

import pytest
import torch
from conftest import redraw

from llm.modules.cache import Cache
from llm.modules.norms import RMSNorm
from llm.modules.recurrent.delta import GatedDeltaNet, KimiDeltaAttention
from llm.modules.recurrent.mamba import Mamba
from llm.modules.recurrent.mamba2 import Mamba2
from llm.modules.recurrent.retention import LightningAttention
from llm.modules.recurrent.rg_lru import GriffinRecurrence
from llm.modules.recurrent.short_convolution import GatedConvolution

transformers = pytest.importorskip("transformers")
models = transformers.models
D_MODEL, LENGTH = 32, 77
"""Longer than a chunk of 64, and no multiple of it."""


def inputs():
    return torch.randn(2, LENGTH, D_MODEL, generator=torch.Generator().manual_seed(1))


def modeling(family):
    return getattr(getattr(models, family), f"modeling_{family}")


def drawn(layer):
    torch.manual_seed(3)
    redraw(layer.eval())
    return layer


def renamed(theirs, **names):
    """Their weights under our names: `old=new`, with `__` for a dot."""
    state = theirs.state_dict()
    for old, new in names.items():
        old, new = old.replace("__", "."), new.replace("__", ".")
        state = {key.replace(old, new) if f".{old}." in f".{key}." else key: value for key, value in state.items()}
    return state


def through_a_cache(layer, x, parts=(66, 1, 10)):
    cache = Cache(torch.zeros(len(x), dtype=torch.int64), [layer.make_cache(len(x), x.shape[1])])
    outputs = []
    for part in x.split(list(parts), 1):
        outputs.append(layer(part, cache.positions(part.shape[1]), cache.layers[0]))
        cache.seen += part.shape[1]
    return torch.cat(outputs, 1)


@torch.no_grad()
def assert_equal(ours, state, expected, atol=2e-5):
    ours.load_state_dict(state)
    assert expected.abs().mean() > 0.01  # nothing is hidden by small numbers
    torch.testing.assert_close(ours(inputs(), torch.arange(LENGTH)), expected, rtol=0, atol=atol)
    torch.testing.assert_close(through_a_cache(ours, inputs()), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("d_state", [4, 16])
@torch.no_grad()
def test_mamba(d_state):
    config = transformers.MambaConfig(
        hidden_size=D_MODEL, state_size=d_state, num_hidden_layers=1, time_step_rank=6, use_mambapy=False, expand=2
    )
    theirs = drawn(modeling("mamba").MambaMixer(config, 0))
    ours = Mamba(d_model=D_MODEL, d_inner=64, d_state=d_state, dt_rank=6)
    assert_equal(ours, renamed(theirs, conv1d="conv", A_log="rates.A_log", out_proj="o_proj"), theirs(inputs()))


@torch.no_grad()
def test_jambas_mamba_has_norms_inside():
    config = transformers.JambaConfig(
        hidden_size=D_MODEL,
        mamba_d_state=8,
        mamba_dt_rank=6,
        mamba_expand=2,
        num_hidden_layers=1,
        use_mamba_kernels=False,
    )
    theirs = drawn(modeling("jamba").JambaMambaMixer(config, 0))
    ours = Mamba(d_model=D_MODEL, d_inner=64, d_state=8, dt_rank=6, norm=lambda width: RMSNorm(width, 1e-6))
    names = dict(conv1d="conv", A_log="rates.A_log", out_proj="o_proj")
    names |= dict(dt_layernorm="dt_norm", b_layernorm="b_norm", c_layernorm="c_norm")
    assert_equal(ours, renamed(theirs, **names), theirs(inputs()))


@pytest.mark.parametrize("n_groups", [1, 2])
@torch.no_grad()
def test_mamba2(n_groups):
    sizes = dict(head_dim=16, n_groups=n_groups)
    config = transformers.Mamba2Config(
        hidden_size=D_MODEL, num_heads=4, state_size=12, num_hidden_layers=1, chunk_size=16, expand=2, **sizes
    )
    theirs = drawn(modeling("mamba2").Mamba2Mixer(config, 0))
    ours = Mamba2(d_model=D_MODEL, n_heads=4, d_state=12, norm_eps=config.layer_norm_epsilon, **sizes)
    names = dict(conv1d="conv", A_log="decay.A_log", dt_bias="decay.dt_bias", norm="o_norm", out_proj="o_proj")
    assert_equal(ours, renamed(theirs, **names), theirs(inputs()))


@pytest.mark.parametrize("n_k_heads", [2, 4])
@torch.no_grad()
def test_gated_delta_net_as_in_qwen3_5(n_k_heads):
    config = transformers.Qwen3_5TextConfig(
        hidden_size=D_MODEL,
        linear_num_value_heads=4,
        linear_num_key_heads=n_k_heads,
        linear_key_head_dim=12,
        linear_value_head_dim=20,
        num_hidden_layers=1,
        rms_norm_eps=1e-5,
        layer_types=["linear_attention"],
    )
    theirs = drawn(modeling("qwen3_5").Qwen3_5GatedDeltaNet(config, 0))
    ours = GatedDeltaNet(d_model=D_MODEL, n_heads=4, n_k_heads=n_k_heads, head_dim=12, v_head_dim=20)
    names = dict(conv1d="conv", A_log="decay.A_log", dt_bias="decay.dt_bias", norm="o_norm", out_proj="o_proj")
    state = renamed(theirs, **names, in_proj_z="gate_proj", in_proj_b="beta_proj", in_proj_a="decay_proj")
    qkv = state.pop("in_proj_qkv.weight").split(ours.widths)
    state |= {f"{name}_proj.weight": part for name, part in zip("qkv", qkv, strict=True)}
    assert_equal(ours, state, theirs(inputs()), atol=1e-4)


@torch.no_grad()
def test_gated_delta_net_as_in_qwen3_next():
    config = transformers.Qwen3NextConfig(
        hidden_size=D_MODEL,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=12,
        linear_value_head_dim=20,
        num_hidden_layers=1,
        rms_norm_eps=1e-5,
        layer_types=["linear_attention"],
    )
    theirs = drawn(modeling("qwen3_next").Qwen3NextGatedDeltaNet(config, 0))
    ours = GatedDeltaNet(d_model=D_MODEL, n_heads=4, n_k_heads=2, head_dim=12, v_head_dim=20)
    names = dict(conv1d="conv", A_log="decay.A_log", dt_bias="decay.dt_bias", norm="o_norm", out_proj="o_proj")
    state = renamed(theirs, **names)
    packed = state.pop("in_proj_qkvz.weight").unflatten(0, (2, -1)).split([12, 12, 40, 40], 1)
    state |= {
        f"{name}_proj.weight": part.flatten(0, 1) for name, part in zip(("q", "k", "v", "gate"), packed, strict=True)
    }
    packed = state.pop("in_proj_ba.weight").unflatten(0, (2, -1)).split([2, 2], 1)
    state |= {f"{name}_proj.weight": part.flatten(0, 1) for name, part in zip(("beta", "decay"), packed, strict=True)}
    assert_equal(ours, state, theirs(inputs()), atol=1e-4)


@torch.no_grad()
def test_kimi_delta_attention():
    config = transformers.KimiLinearConfig(
        hidden_size=D_MODEL,
        linear_num_heads=2,
        linear_head_dim=16,
        linear_conv_kernel_dim=4,
        num_hidden_layers=1,
        rms_norm_eps=1e-5,
        layer_types=["linear_attention"],
    )
    theirs = drawn(modeling("kimi_linear").KimiLinearDeltaAttention(config, 0))
    ours = KimiDeltaAttention(d_model=D_MODEL, n_heads=2, gate_rank=16)
    names = dict(conv1d="conv", b_proj="beta_proj", g_a_proj="gate_a_proj", g_b_proj="gate_b_proj")
    names |= dict(forget_gate__f_a_proj="decay_a_proj", forget_gate__f_b_proj="decay_b_proj", forget_gate="decay")
    state = renamed(theirs, **names)
    state["decay.A_log"] = state["decay.A_log"].flatten()
    assert_equal(ours, state, theirs(inputs()), atol=1e-4)


@pytest.mark.parametrize("layer", [0, 2])
@torch.no_grad()
def test_lightning_attention_as_in_minimax(layer):
    config = transformers.MiniMaxConfig(
        hidden_size=D_MODEL, num_attention_heads=4, head_dim=12, num_hidden_layers=4, block_size=32
    )
    theirs = modeling("minimax").MiniMaxLightningAttention(config, layer)
    drawn(theirs)
    ours = LightningAttention(d_model=D_MODEL, n_heads=4, head_dim=12, depth=layer / 3, norm_eps=1e-6)
    state = {n: t for n, t in renamed(theirs, norm="o_norm", output_gate="gate_proj", out_proj="o_proj").items()}
    state = {name: tensor for name, tensor in state.items() if "decay" not in name and "slope" not in name}
    heads = state.pop("qkv_proj.weight").unflatten(0, (4, 3, 12))
    state |= {f"{name}_proj.weight": heads[:, i].flatten(0, 1) for i, name in enumerate("qkv")}
    expected = theirs(inputs(), position_embeddings=None, attention_mask=None)[0]
    assert_equal(ours, state, expected, atol=1e-4)


@torch.no_grad()
def test_lfm2s_gated_convolution():
    config = transformers.Lfm2Config(
        hidden_size=D_MODEL, num_hidden_layers=1, conv_L_cache=3, conv_bias=True, layer_types=["conv"]
    )
    theirs = drawn(modeling("lfm2").Lfm2ShortConv(config, 0))
    ours = GatedConvolution(d_model=D_MODEL, width=3, bias=True)
    assert_equal(ours, renamed(theirs, out_proj="o_proj"), theirs(inputs()))


@torch.no_grad()
def test_griffins_recurrence_as_in_recurrent_gemma():
    config = transformers.RecurrentGemmaConfig(
        hidden_size=D_MODEL, lru_width=48, num_attention_heads=4, num_hidden_layers=1, conv1d_width=4
    )
    theirs = drawn(modeling("recurrent_gemma").RecurrentGemmaRecurrentBlock(config, 0))
    ours = GriffinRecurrence(d_model=D_MODEL, d_rnn=48, n_heads=4)
    names = dict(linear_y="gate_proj", linear_x="x_proj", linear_out="o_proj", conv_1d="conv", rg_lru="lru")
    names |= dict(recurrent_param="Lambda", input_gate_weight="input_weight", input_gate_bias="input_bias")
    names |= dict(recurrent_gate_weight="recurrent_weight", recurrent_gate_bias="recurrent_bias")
    positions = torch.arange(LENGTH)[None].expand(2, -1)
    expected = theirs(inputs(), positions, None, use_cache=False)[0]
    assert_equal(ours, renamed(theirs, **names), expected)
