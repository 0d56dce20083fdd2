"""Multi-head latent attention: both forms agree, the cache holds only latents, DeepSeek's layers say the same."""

import math

import pytest
import torch
from conftest import redraw

from llm.models import MODELS
from llm.models.latent import Latent
from llm.modules.attention import latent as latent_module
from llm.modules.attention.latent import LatentAttention
from llm.modules.cache import Cache, Places
from llm.modules.masks import Window, causal
from llm.modules.position_encoding.rope import RoPE

SIZES = dict(d_model=48, n_heads=3, kv_lora_rank=20, qk_nope_head_dim=12, qk_rope_head_dim=16, v_head_dim=10)
QUERIES = pytest.mark.parametrize("q_lora_rank", [None, 24])


def make_attention(**overrides):
    torch.manual_seed(0)
    rope = RoPE(SIZES["qk_rope_head_dim"], interleaved=True)
    attention = LatentAttention(**{**SIZES, "rope": rope, **overrides}).double()
    redraw(attention)
    return attention


def make_input(batch_size=2, length=19):
    return torch.randn(batch_size, length, SIZES["d_model"], generator=torch.Generator().manual_seed(1)).double()


def run_through_a_cache(attention, x, parts, padding=0):
    cache = Cache(torch.zeros(len(x), dtype=torch.int64) - padding, [attention.make_cache(len(x), x.shape[1])])
    outputs = []
    for part in x.split(parts, 1):
        outputs.append(attention(part, cache.positions(part.shape[1]), cache.layers[0]))
        cache.seen += part.shape[1]
    return torch.cat(outputs, 1)


@QUERIES
def test_the_expanded_form_is_the_papers_formula_written_as_loops(q_lora_rank):
    layer, x = make_attention(q_lora_rank=q_lora_rank), make_input(1, 7)
    nope, rope, v_dim, rank = 12, 16, 10, 20
    angle = [10_000 ** (-2 * i / rope) for i in range(rope // 2)]

    def turn(vector, position):
        turned = torch.view_as_complex(vector.reshape(-1, 2)) * torch.polar(
            torch.ones(rope // 2).double(), position * torch.tensor(angle).double()
        )
        return torch.view_as_real(turned).flatten()

    def normed(vector, norm):
        return vector / (vector.square().mean() + 1e-6).sqrt() * norm.weight

    heads = torch.zeros(7, 3, v_dim).double()
    for h in range(3):
        up = layer.kv_b_proj.weight[h * (nope + v_dim) : (h + 1) * (nope + v_dim)]
        for t in range(7):
            if q_lora_rank is None:
                q = layer.q_proj.weight @ x[0, t]
            else:
                q = layer.q_b_proj.weight @ normed(layer.q_a_proj.weight @ x[0, t], layer.q_a_norm)
            q = q[h * (nope + rope) : (h + 1) * (nope + rope)]
            scores, values = [], []
            for s in range(t + 1):
                compressed = layer.kv_a_proj.weight @ x[0, s]
                expanded = up @ normed(compressed[:rank], layer.kv_a_norm)
                with_position = turn(q[nope:], t) @ turn(compressed[rank:], s)
                scores.append((q[:nope] @ expanded[:nope] + with_position) / (nope + rope) ** 0.5)
                values.append(expanded[nope:])
            heads[t, h] = torch.stack(scores).softmax(0) @ torch.stack(values)
    expected = heads.flatten(1) @ layer.o_proj.weight.T
    torch.testing.assert_close(layer(x, torch.arange(7))[0], expected, rtol=0, atol=1e-6)  # angles are fp32


@QUERIES
@pytest.mark.parametrize("mask", [causal, Window(5)])
@pytest.mark.parametrize("overrides", [{}, {"v_head_dim": 40}, {"rope": None, "scale": 0.3}])
def test_the_absorbed_form_equals_the_expanded_one_in_values_and_gradients(q_lora_rank, mask, overrides):
    layer = make_attention(q_lora_rank=q_lora_rank, mask=mask, **overrides)
    x, positions, results = make_input(), torch.arange(19), []
    forms = {layer.attend_expanded: True, layer.attend_absorbed: False}
    for attend, whole_text in forms.items():
        layer.zero_grad()
        queries, compressed = layer.queries(x, positions), layer.compress(x, positions)
        heads = attend(*queries, *compressed, Places(positions, positions, whole_text))
        layer.o_proj(heads.flatten(2)).square().sum().backward()
        results.append([heads, *(p.grad for p in layer.parameters())])
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


@QUERIES
@pytest.mark.parametrize("parts", [[19], [1] * 19, [8, 1, 10], [1, 17, 1]])
def test_through_the_cache_in_any_parts_it_equals_the_whole_at_once(q_lora_rank, parts):
    layer, x = make_attention(q_lora_rank=q_lora_rank), make_input()
    expected = layer(x, torch.arange(19))
    torch.testing.assert_close(run_through_a_cache(layer, x, parts), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("parts", [[19], [9, 1, 9], [1] * 19])
def test_padded_prompts_of_unlike_length_give_what_each_gives_alone(parts):
    layer, x, padding = make_attention(q_lora_rank=24), make_input(3), torch.tensor([0, 4, 11])
    together = run_through_a_cache(layer, x, parts, padding)
    assert together.isfinite().all()
    for row, n in enumerate(padding):
        alone = layer(x[row : row + 1, n:], torch.arange(19 - n))
        torch.testing.assert_close(together[row, n:], alone[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("parts", [[19], [7, 1, 11], [1] * 19])
def test_with_a_window_the_cache_is_a_ring_as_long_as_the_window(parts):
    layer, x = make_attention(mask=Window(5)), make_input()
    assert layer.make_cache(2, 19)["latent"].shape == (2, 5, 20)
    expected = layer(x, torch.arange(19))
    torch.testing.assert_close(run_through_a_cache(layer, x, parts), expected, rtol=0, atol=1e-10)


def test_the_cache_holds_the_latent_and_the_rotated_key_and_nothing_else():
    cache = make_attention().make_cache(2, 19)
    assert {name: tuple(tensor.shape) for name, tensor in cache.items()} == {
        "latent": (2, 19, 20),
        "k_rope": (2, 19, 16),
        "pos": (2, 19),
    }
    assert cache["latent"].dtype is torch.float64


def test_decoding_never_expands_keys_or_values(monkeypatch):
    layer, x, seen = make_attention(), make_input(), []
    original = latent_module.attend

    def spy(q, k, v, *rest, **named):
        seen.append((k.shape, v.shape))
        return original(q, k, v, *rest, **named)

    monkeypatch.setattr(latent_module, "attend", spy)
    monkeypatch.setattr(layer.kv_b_proj, "forward", None)
    run_through_a_cache(layer, x, [18, 1])
    assert seen[-1] == ((2, 1, 19, 36), (2, 1, 19, 36))  # one head of rank + rope channels, for keys and values alike


def test_without_a_cache_training_takes_the_fused_causal_path(monkeypatch):
    layer, calls = make_attention(), []
    original = torch.nn.functional.scaled_dot_product_attention

    def spy(q, k, v, **named):
        calls.append((named["is_causal"], named["attn_mask"], q.shape[-1], v.shape[-1]))
        return original(q, k, v, **named)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    layer(make_input(), torch.arange(19))
    assert calls == [(True, None, 28, 28)]


@pytest.mark.parametrize("small", [False, True])
def test_the_ladder_model_is_as_large_as_the_baseline_and_its_cache_much_smaller(small):
    n_parameters, per_token = {}, {}
    for name in ("baseline", "latent"):
        Model = MODELS[name]
        with torch.device("meta"):
            model = Model(Model.Config(**Model.Config.small if small else {}))
            layer = model.make_cache(1, 4).layers[0]
        n_parameters[name] = sum(p.numel() for p in model.parameters())
        per_token[name] = sum(tensor[0, 0].numel() for key, tensor in layer.items() if key != "pos")
    assert abs(n_parameters["latent"] / n_parameters["baseline"] - 1) < 0.01
    assert per_token == ({"baseline": 256, "latent": 48} if small else {"baseline": 1024, "latent": 144})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("qk_rope_head_dim", 15, "must be even.*--model.qk-rope-head-dim"),
        ("kv_lora_rank", 0, "must be positive.*--model.kv-lora-rank"),
        ("q_lora_rank", 0, "must be positive.*--model.q-lora-rank"),
        ("v_head_dim", -1, "must be positive.*--model.v-head-dim"),
    ],
)
def test_a_wrong_size_is_refused_with_the_flag_that_mends_it(field, value, message):
    with pytest.raises(ValueError, match=message):
        Latent.Config(**{field: value})


YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 256,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}


@QUERIES
@pytest.mark.parametrize("rope_parameters", [{"rope_type": "default", "rope_theta": 10_000.0}, YARN])
@pytest.mark.parametrize("version", [2, 3])
def test_it_equals_deepseeks_layer_in_transformers(version, rope_parameters, q_lora_rank):
    transformers = pytest.importorskip("transformers")
    theirs, rotary = deepseek_layer(transformers, version, rope_parameters, q_lora_rank)
    factor = rope_parameters.get("factor", 1.0)
    mscale = 0.1 * rope_parameters.get("mscale_all_dim", 0.0) * math.log(factor) + 1
    rope = RoPE(16, interleaved=True, scaling=lambda *_: (rotary.inv_freq, rotary.attention_scaling))
    ours = make_attention(q_lora_rank=q_lora_rank, rope=rope, scale=28**-0.5 * mscale**2).float()
    names = {"kv_a_proj_with_mqa": "kv_a_proj", "layernorm": "norm"}
    state = theirs.state_dict()
    for old, new in names.items():
        state = {name.replace(old, new): tensor for name, tensor in state.items()}
    ours.load_state_dict(state)

    x, positions = make_input().float(), torch.arange(19)
    mask = torch.full((19, 19), -torch.inf).triu(1)[None, None]
    expected = theirs(x, attention_mask=mask, position_embeddings=rotary(x, positions[None]))[0]
    torch.testing.assert_close(ours(x, positions), expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(run_through_a_cache(ours, x, [11, 1, 7]), expected, rtol=0, atol=2e-5)


def deepseek_layer(transformers, version, rope_parameters, q_lora_rank):
    """Their attention layer and their rotation, every parameter re-drawn; the large rms_norm_eps shows it is unused."""
    config = getattr(transformers, f"DeepseekV{version}Config")(
        vocab_size=31,
        hidden_size=48,
        num_hidden_layers=1,
        num_attention_heads=3,
        num_key_value_heads=3,
        q_lora_rank=q_lora_rank,
        kv_lora_rank=20,
        qk_nope_head_dim=12,
        qk_rope_head_dim=16,
        v_head_dim=10,
        rms_norm_eps=0.1,
        rope_parameters=rope_parameters,
        max_position_embeddings=1024,
        attn_implementation="eager",
    )
    modeling = getattr(transformers.models, f"deepseek_v{version}")
    modeling = getattr(modeling, f"modeling_deepseek_v{version}")
    torch.manual_seed(3)
    theirs = getattr(modeling, f"DeepseekV{version}Attention")(config, layer_idx=0).eval()
    redraw(theirs)
    return theirs, getattr(modeling, f"DeepseekV{version}RotaryEmbedding")(config)
