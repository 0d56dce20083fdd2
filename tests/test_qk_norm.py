"""Three norms on queries and keys that are easily confused, each held to the layer in transformers that uses it."""

import math
from functools import partial

import pytest
import torch
from conftest import redraw, tiny_model

from llm.modules.attention.multi_head import MultiHeadAttention
from llm.modules.attention.qk_norm import FullWidthQKNormAttention, L2QKNormAttention, QKNormAttention
from llm.modules.cache import Cache
from llm.modules.norms import RMSNorm
from llm.modules.position_encoding.rope import RoPE

N_HEADS, N_KV_HEADS, HEAD_DIM, D_MODEL, LENGTH, EPS = 6, 2, 16, 40, 17, 1e-2  # an eps that shows where it is used
SIZES = dict(d_model=D_MODEL, n_heads=N_HEADS, n_kv_heads=N_KV_HEADS, head_dim=HEAD_DIM)
NORM = partial(RMSNorm, eps=EPS)


def make(Attention, **options):
    torch.manual_seed(0)
    layer = Attention(**SIZES, **options).double()
    redraw(layer)
    return layer


def make_input():
    return torch.randn(2, LENGTH, D_MODEL, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


KINDS = {
    "per head": lambda **options: make(MultiHeadAttention, qk_norm=partial(RMSNorm, eps=0.0), **options),
    "full width": lambda **options: make(FullWidthQKNormAttention, qk_norm=partial(RMSNorm, eps=0.0), **options),
    "L2": lambda **options: make(L2QKNormAttention, norm_eps=0.0, **options),
    "QKNorm": lambda **options: make(QKNormAttention, length=LENGTH, **options),
}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_scores_do_not_feel_how_large_the_projections_are(kind):
    layer, x, positions = KINDS[kind](rope=RoPE(HEAD_DIM)), make_input(), torch.arange(LENGTH)
    before = layer(x, positions)
    layer.q_proj.weight *= 1000
    layer.k_proj.weight *= 0.03
    torch.testing.assert_close(layer(x, positions), before, rtol=0, atol=1e-9)
    layer.v_proj.weight *= 2
    torch.testing.assert_close(layer(x, positions), 2 * before, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parts", [[1] * 17, [9, 1, 7]])
def test_through_a_cache_it_equals_the_whole_at_once(kind, parts):
    layer, x = KINDS[kind](rope=RoPE(HEAD_DIM)), make_input()
    cache, outputs = Cache(torch.zeros(2, dtype=torch.int64), [layer.make_cache(2, LENGTH)]), []
    for part in x.split(parts, 1):
        outputs.append(layer(part, cache.positions(part.shape[1]), cache.layers[0]))
        cache.seen += part.shape[1]
    torch.testing.assert_close(torch.cat(outputs, 1), layer(x, torch.arange(LENGTH)), rtol=0, atol=1e-9)


@torch.no_grad()
def test_only_over_the_full_width_one_head_feels_another():
    for kind, layer in ((kind, make_layer()) for kind, make_layer in KINDS.items()):
        x, positions = make_input(), torch.arange(LENGTH)
        before = layer.project(x, positions)[0]
        layer.q_proj.weight[:HEAD_DIM] *= 10
        after = layer.project(x, positions)[0]
        assert torch.allclose(after[:, :, 1:], before[:, :, 1:]) == (kind != "full width")


def test_without_a_gain_norm_and_rotation_may_change_places_and_with_one_they_may_not():
    rope, positions = RoPE(HEAD_DIM), torch.arange(LENGTH)
    q = torch.randn(2, LENGTH, N_HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    norm = RMSNorm(HEAD_DIM).double()
    torch.testing.assert_close(norm(rope(q, positions)), rope(norm(q), positions), rtol=0, atol=1e-6)
    redraw(norm)
    assert (norm(rope(q, positions)) - rope(norm(q), positions)).abs().max() > 0.1


def test_qknorm_is_a_cosine_times_its_learned_number():
    layer, x = KINDS["QKNorm"](), make_input()
    heads = []
    for h in range(N_HEADS):
        rows, kv_rows = (slice(i * HEAD_DIM, (i + 1) * HEAD_DIM) for i in (h, h // (N_HEADS // N_KV_HEADS)))
        q, k = x @ layer.q_proj.weight[rows].T, x @ layer.k_proj.weight[kv_rows].T
        cosine = torch.cosine_similarity(q[:, :, None], k[:, None], -1)
        hidden = torch.ones(LENGTH, LENGTH).triu(1).bool()
        weights = (layer.cosine_scale * cosine).masked_fill(hidden, -torch.inf).softmax(-1)
        heads.append(weights @ x @ layer.v_proj.weight[kv_rows].T)
    expected = torch.cat(heads, -1) @ layer.o_proj.weight.T
    torch.testing.assert_close(layer(x, torch.arange(LENGTH)), expected, rtol=0, atol=1e-10)


def test_qknorm_starts_at_the_papers_number_and_refuses_a_text_of_one_token():
    layer = QKNormAttention(**SIZES, length=64)
    assert layer.cosine_scale.item() == pytest.approx(math.log2(64 * 63))
    with pytest.raises(ValueError, match="length = 1 must be at least 2"):
        QKNormAttention(**SIZES, length=1)


def test_the_ladder_model_adds_two_gains_of_one_head_to_each_layer_of_the_baseline():
    ours, baseline = tiny_model("qk_norm", n_layers=3, norm_eps=0.5), tiny_model("baseline", n_layers=3)
    added = {n: p.shape for n, p in ours.named_parameters() if n not in dict(baseline.named_parameters())}
    assert added == {f"blocks.{i}.mixer.{q}_norm.weight": (32,) for i in range(3) for q in "qk"}
    assert ours.blocks[0].mixer.q_norm.eps == 0.5


def compare(ours, theirs, rotation):
    """Outputs of both layers with the same parameters, theirs eager and with an explicit causal mask."""
    redraw(theirs)
    ours.float().load_state_dict(theirs.state_dict())
    x = make_input().float()
    mask = torch.full((LENGTH, LENGTH), -torch.inf).triu(1)[None, None]
    expected = theirs(x, position_embeddings=rotation(x, torch.arange(LENGTH)[None]), attention_mask=mask)[0]
    torch.testing.assert_close(ours(x, torch.arange(LENGTH)), expected, rtol=0, atol=2e-5)


def config_of(Config, **more):
    return Config(
        hidden_size=D_MODEL,
        num_attention_heads=N_HEADS,
        num_key_value_heads=N_KV_HEADS,
        head_dim=HEAD_DIM,
        num_hidden_layers=1,
        intermediate_size=8,
        vocab_size=31,
        rms_norm_eps=EPS,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        attn_implementation="eager",
        **more,
    )


def test_per_head_it_equals_qwen3():
    pytest.importorskip("transformers")
    from transformers.models.qwen3 import modeling_qwen3 as qwen3

    config = config_of(qwen3.Qwen3Config)
    ours = make(MultiHeadAttention, qk_norm=NORM, rope=RoPE(HEAD_DIM))
    compare(ours, qwen3.Qwen3Attention(config, 0).eval(), qwen3.Qwen3RotaryEmbedding(config))


def test_over_the_full_width_it_equals_olmo2():
    pytest.importorskip("transformers")
    from transformers.models.olmo2 import modeling_olmo2 as olmo2

    config = config_of(olmo2.Olmo2Config)
    ours = make(FullWidthQKNormAttention, qk_norm=NORM, rope=RoPE(HEAD_DIM))
    compare(ours, olmo2.Olmo2Attention(config, 0).eval(), olmo2.Olmo2RotaryEmbedding(config))


def test_l2_after_the_rotation_equals_llama4():
    pytest.importorskip("transformers")
    from transformers.models.llama4 import modeling_llama4 as llama4

    config = config_of(llama4.Llama4TextConfig, no_rope_layers=[1], use_qk_norm=True)
    ours = make(L2QKNormAttention, norm_eps=EPS, rope=RoPE(HEAD_DIM, interleaved=True))
    compare(ours, llama4.Llama4TextAttention(config, 0).eval(), llama4.Llama4TextRotaryEmbedding(config))


def test_l2_after_the_rotation_equals_nanochat():
    pytest.importorskip("transformers")
    from transformers.models.nanochat import modeling_nanochat as nanochat

    config = config_of(nanochat.NanoChatConfig)
    rotation = nanochat.NanoChatRotaryEmbedding(config)
    rope = RoPE(HEAD_DIM, scaling=lambda *_: (-rotation.inv_freq, 1.0))  # nanochat turns the other way
    ours = make(L2QKNormAttention, norm_eps=EPS, rope=rope)
    compare(ours, nanochat.NanoChatAttention(config, 0).eval(), rotation)
