"""Each position encoding against its formula, a loop, or the transformers class that has it."""

import itertools
import os
from importlib import import_module

import pytest
import torch
from conftest import VOCABULARY, redraw, tiny_model
from torch.nn import functional as F
from training import script, write_corpus

from llm.analysis.length import loss_as_texts_grow, scalings, set_scaling
from llm.modules.attention.multi_head import MultiHeadAttention
from llm.modules.cache import Places
from llm.modules.position_encoding.alibi import ALiBi, alibi_slopes
from llm.modules.position_encoding.context_extension import (
    DynamicNTK,
    LinearInterpolation,
    Llama3Bands,
    NTKAware,
    YaRN,
    yarn_mscale,
)
from llm.modules.position_encoding.learned import LearnedPosition
from llm.modules.position_encoding.relative import RelativeAttention, gather, shift
from llm.modules.position_encoding.rope import RoPE, inverse_frequencies, rotate
from llm.modules.position_encoding.sinusoidal import sinusoidal
from llm.modules.position_encoding.t5_bias import T5Bias, bucket

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def heads(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_is_a_product_of_complex_numbers(interleaved):
    x, positions = heads(2, 5, 3, 8), torch.tensor([0, 1, 7, 300, 12])
    naive = torch.empty_like(x)
    for i in range(4):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + 4)
        turn = torch.exp(1j * positions.double() * 500.0 ** (-2 * i / 8))
        turned = torch.complex(x[..., a], x[..., b]) * turn[:, None]
        naive[..., a], naive[..., b] = turned.real, turned.imag
    turned = RoPE(8, 500.0, interleaved=interleaved)(x, positions)
    torch.testing.assert_close(turned, naive, rtol=0, atol=2e-4)  # fp32 angles up to 300


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [16, 6])
def test_rope_scores_depend_on_the_offset_only_and_norms_stay(interleaved, rotary_dim):
    rope = RoPE(16, rotary_dim=rotary_dim, interleaved=interleaved)
    q, k = heads(16, seed=1), heads(16, seed=2)
    starts = torch.arange(0, 200, 7)
    turned_q = rope(q.expand(1, len(starts), 1, 16), starts + 5)
    turned_k = rope(k.expand(1, len(starts), 1, 16), starts)
    scores = (turned_q * turned_k).sum(-1)
    torch.testing.assert_close(scores, scores[:, :1].expand_as(scores), rtol=0, atol=1e-4)
    assert not torch.allclose(scores[0, 0], q @ k, atol=0.01)
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm().expand(1, len(starts), 1), rtol=1e-6, atol=0)


def test_both_pairings_are_equal_up_to_a_fixed_order_of_channels():
    x, positions = heads(2, 9, 3, 12), torch.arange(9) + 40
    order = torch.cat([torch.arange(0, 12, 2), torch.arange(1, 12, 2)])  # even channels first
    halves = RoPE(12)(x[..., order], positions)
    assert torch.equal(halves, RoPE(12, interleaved=True)(x, positions)[..., order])


@pytest.mark.parametrize("interleaved", [False, True])
def test_partial_rotation_turns_the_first_channels_and_leaves_the_rest(interleaved):
    x, positions = heads(2, 9, 3, 12), torch.arange(9)
    turned = RoPE(12, rotary_dim=4, interleaved=interleaved)(x, positions)
    assert torch.equal(turned[..., 4:], x[..., 4:])
    assert torch.equal(turned[..., :4], RoPE(4, interleaved=interleaved)(x[..., :4], positions))
    assert not torch.allclose(turned[:, 1:, :, :4], x[:, 1:, :, :4])


def test_rope_turns_by_token_and_not_by_head():
    x = heads(8).expand(1, 6, 3, 8)
    turned = RoPE(8)(x, torch.arange(6))
    assert torch.equal(turned, turned[:, :, :1].expand_as(turned))
    assert not torch.allclose(turned[:, 1], turned[:, 2])


def test_rope_takes_positions_of_each_row():
    x, positions = heads(2, 4, 3, 8), torch.tensor([[-2, -1, 0, 1], [7, 8, 9, 10]])
    rope = RoPE(8)
    turned = torch.stack([rope(row[None], p)[0] for row, p in zip(x, positions, strict=True)])
    assert torch.equal(rope(x, positions), turned)


def test_rope_tells_neighbours_beyond_256_apart_in_bf16():
    x, positions = heads(1, 6, 2, 32).bfloat16(), torch.arange(256, 262)
    turned = RoPE(32)(x, positions)
    assert turned.dtype == torch.bfloat16
    angles = positions.double()[:, None, None] * 1e4 ** (-torch.arange(16).double() / 16)
    exact = rotate(x.double(), angles.cos(), angles.sin())
    torch.testing.assert_close(turned.double(), exact, rtol=2**-8, atol=1e-4)  # one rounding


def test_rope_casts_and_loads_without_losing_its_frequencies():
    with torch.device("meta"):
        rope = RoPE(32).bfloat16()
    assert not rope.state_dict()
    assert not list(rope.buffers())
    x, positions = heads(1, 6, 2, 32, dtype=torch.float32), torch.arange(6)
    assert torch.equal(rope(x, positions), RoPE(32)(x, positions))


def test_turning_back_undoes_the_rotation():
    x = heads(1, 6, 2, 8)
    cos, sin = RoPE(8).cos_sin(torch.arange(6))
    for interleaved in (False, True):
        there = rotate(x, cos, sin, interleaved)
        torch.testing.assert_close(rotate(there, cos, -sin, interleaved), x, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rotary_dim", [0, 3, 10])
def test_rope_names_a_width_that_has_no_pairs(rotary_dim):
    with pytest.raises(ValueError, match=rf"rotary_dim = {rotary_dim} .*--model.n-heads"):
        RoPE(8, rotary_dim=rotary_dim)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gptj"])
def test_rope_equals_the_rotation_of_transformers(name):
    pytest.importorskip("transformers")
    q, positions = heads(2, 7, 3, 16, dtype=torch.float32), torch.arange(7) + 90
    cos, sin = RoPE(16).cos_sin(positions)
    if name == "gptj":
        from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb

        theirs = apply_rotary_pos_emb(q, sin.expand(2, -1, 1, -1).squeeze(2), cos.expand(2, -1, 1, -1).squeeze(2))
        ours = RoPE(16, interleaved=True)(q, positions)
    else:
        apply = import_module(f"transformers.models.{name}.modeling_{name}").apply_rotary_pos_emb
        cos, sin = (torch.cat([t, t], -1).squeeze(-2)[None] for t in (cos, sin))
        theirs, _ = apply(q, q, cos, sin, unsqueeze_dim=2)
        ours = RoPE(16)(q, positions)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_compiled_rope_equals_rope():
    x, positions = heads(2, 7, 3, 16, dtype=torch.float32), torch.arange(7)
    compiled = torch.compile(RoPE(16), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, positions), RoPE(16)(x, positions), rtol=0, atol=1e-6)


def test_frequencies_fall_from_one_to_almost_the_inverse_of_theta():
    frequencies = inverse_frequencies(64, 10_000.0)
    assert frequencies.dtype == torch.float32
    torch.testing.assert_close(frequencies, torch.tensor([1e4 ** (-i / 32) for i in range(32)]))


WIDTHS = [(16, 1.0), (20, 1.0), (64, 1.0), (64, 0.25), (128, 1.0), (128, 0.5)]  # head_dim, turned share
BASES = [1e4, 150_000.0, 1e6]
FACTORS = [1.0, 1.3, 4.0, 40.0]


def llama_config(kind, head_dim, share, theta, **settings):
    settings = {"rope_type": kind, "rope_theta": theta, "partial_rotary_factor": share, **settings}
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()  # it would rather have original lengths below its own
    sizes = {"hidden_size": 2 * head_dim, "num_attention_heads": 2, "head_dim": head_dim}
    return transformers.LlamaConfig(**sizes, max_position_embeddings=64, rope_parameters=settings)


def assert_frequencies_equal(scaling, kind, n_tokens=5, **settings):
    """Exactly those of transformers, fp32 and factor, at several widths and bases."""
    initialise = pytest.importorskip("transformers.modeling_rope_utils").ROPE_INIT_FUNCTIONS[kind]
    for (head_dim, share), theta in itertools.product(WIDTHS, BASES):
        theirs, factor = initialise(
            llama_config(kind, head_dim, share, theta, **settings), "cpu", torch.tensor(n_tokens)
        )
        ours = scaling(int(head_dim * share), theta, torch.arange(n_tokens))
        assert ours[0].dtype == torch.float32
        assert torch.equal(ours[0], theirs)
        assert ours[1] == factor


@pytest.mark.parametrize("factor", FACTORS)
def test_linear_interpolation_equals_transformers(factor):
    assert_frequencies_equal(LinearInterpolation(factor), "linear", factor=factor)


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("n_tokens", [1, 63, 64, 65, 100, 640])
def test_dynamic_ntk_equals_transformers_below_and_above_the_original_length(factor, n_tokens):
    assert_frequencies_equal(DynamicNTK(factor, original_length=64), "dynamic", n_tokens, factor=factor)


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize(
    "more",
    [{}, {"mscale": 1.0, "mscale_all_dim": 1.0}, {"mscale": 0.7, "mscale_all_dim": 1.3}, {"attention_factor": 1.2}],
)
def test_yarn_equals_transformers(factor, truncate, more):
    for length, fast, slow in [(64, 32, 1), (4096, 32, 1), (8192, 16, 2)]:
        ours = YaRN(factor, length, fast, slow, truncate, **more)
        theirs = {
            "original_max_position_embeddings": length,
            "beta_fast": fast,
            "beta_slow": slow,
            "truncate": truncate,
        }
        assert_frequencies_equal(ours, "yarn", factor=factor, **theirs, **more)


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("length", [64, 512, 8192])
@pytest.mark.parametrize("bands", [(1.0, 4.0), (1.3, 3.7)])
def test_llama3_bands_equal_transformers(factor, length, bands):
    low, high = bands
    theirs = {"low_freq_factor": low, "high_freq_factor": high, "original_max_position_embeddings": length}
    assert_frequencies_equal(Llama3Bands(factor, length, low, high), "llama3", factor=factor, **theirs)


@pytest.mark.parametrize(
    "kind, scaling",
    [
        ("default", None),
        ("linear", LinearInterpolation(4.0)),
        ("dynamic", DynamicNTK(4.0, original_length=64)),
        ("yarn", YaRN(4.0, original_length=64)),
        ("llama3", Llama3Bands(4.0, original_length=64)),
    ],
)
def test_cosines_and_sines_equal_those_of_a_llama(kind, scaling):
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    settings = {"factor": 4.0, "original_max_position_embeddings": 64, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    for n_tokens in (40, 200):
        theirs = modeling.LlamaRotaryEmbedding(llama_config(kind, 32, 1.0, 1e4, **settings))
        positions = torch.arange(n_tokens)
        for ours, expected in zip(
            RoPE(32, scaling=scaling).cos_sin(positions), theirs(torch.zeros(1), positions[None]), strict=True
        ):
            torch.testing.assert_close(ours.squeeze(1), expected[0, :, :16], rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "scaling", [LinearInterpolation(4.0), NTKAware(4.0), YaRN(4.0, 8), Llama3Bands(4.0, 8), DynamicNTK(4.0, 8)]
)
def test_only_dynamic_ntk_turns_parts_of_a_text_unlike_the_whole(scaling):
    rope, x, positions = RoPE(16, scaling=scaling), heads(1, 20, 2, 16), torch.arange(20)
    parts = torch.cat([rope(x[:, :12], positions[:12]), rope(x[:, 12:], positions[12:])], 1)
    assert torch.equal(parts, rope(x, positions)) == (not isinstance(scaling, DynamicNTK))


def test_dynamic_ntk_takes_the_length_of_each_text_whatever_its_neighbours():
    rope, x = RoPE(16, scaling=DynamicNTK(4.0, 8)), heads(3, 20, 2, 16)
    positions = torch.arange(20) - torch.tensor([[0], [6], [14]])  # padded on the left
    together = rope(x, positions)
    for row in range(3):
        assert torch.equal(together[row], rope(x[row : row + 1], positions[row])[0])


def test_interpolated_positions_are_the_old_ones_divided():
    x, positions = heads(1, 10, 2, 16), torch.arange(10)
    torch.testing.assert_close(RoPE(16, scaling=LinearInterpolation(4.0))(x, positions * 4), RoPE(16)(x, positions))


def test_ntk_interpolates_the_slowest_pair_and_keeps_the_fastest():
    plain = inverse_frequencies(32, 1e4)
    scaled, factor = NTKAware(8.0)(32, 1e4, torch.arange(3))
    torch.testing.assert_close(scaled[[0, -1]], torch.stack([plain[0], plain[-1] / 8]))
    assert factor == 1.0
    assert ((scaled[1:-1] < plain[1:-1]) & (scaled[1:-1] > plain[1:-1] / 8)).all()


@pytest.mark.parametrize("n_tokens, growth", [(3, 1), (64, 1), (96, 1.5), (256, 4)])
def test_dynamic_ntk_with_factor_1_is_the_static_one_for_what_the_text_needs(n_tokens, growth):
    """max(1, n / L) for its factor, as YaRN's authors write it."""
    positions = torch.arange(n_tokens)
    dynamic, _ = DynamicNTK(1.0, original_length=64)(32, 1e4, positions)
    torch.testing.assert_close(dynamic, NTKAware(growth)(32, 1e4, positions)[0])


def test_dynamic_ntk_with_a_larger_factor_grows_beyond_what_the_text_needs():
    dynamic, _ = DynamicNTK(4.0, original_length=64)(32, 1e4, torch.arange(256))
    torch.testing.assert_close(dynamic, NTKAware(13.0)(32, 1e4, torch.arange(256))[0])


def test_yarn_multiplies_scores_by_the_square_of_its_temperature():
    q, positions = heads(1, 1, 1, 16), torch.tensor([37])
    turned = RoPE(16, scaling=YaRN(8.0, original_length=64))(q, positions)
    torch.testing.assert_close(turned.square().sum(), q.square().sum() * yarn_mscale(8.0) ** 2, rtol=1e-5, atol=0)
    assert yarn_mscale(8.0) == pytest.approx(1.2079, abs=1e-4)


@pytest.mark.parametrize(
    "make, name",
    [
        (lambda: LinearInterpolation(0.5), "factor = 0.5"),
        (lambda: NTKAware(float("nan")), "factor = nan"),
        (lambda: DynamicNTK(2.0, 0), "original_length = 0"),
        (lambda: YaRN(2.0, 64, beta_fast=1, beta_slow=32), "beta_slow = 32"),
        (lambda: Llama3Bands(2.0, 64, 4.0, 4.0), "low_freq_factor = 4.0"),
        (lambda: RoPE(2, scaling=NTKAware(2.0)).cos_sin(torch.arange(3)), "rotary_dim = 2"),
    ],
)
def test_a_scaling_that_makes_no_sense_is_named(make, name):
    with pytest.raises(ValueError, match=name):
        make()


def test_sinusoidal_positions_follow_the_formula():
    positions = torch.tensor([[0, 1, 2], [7, 100, 511]])
    for channel in range(12):
        angle = positions.double() / 10_000 ** ((channel - channel % 2) / 12)
        naive = angle.cos() if channel % 2 else angle.sin()
        torch.testing.assert_close(sinusoidal(positions, 12)[..., channel].double(), naive, rtol=0, atol=5e-5)


ENCODED = ["baseline", "learned_position", "relative_position", "t5_bias", "rope", "alibi"]


@pytest.mark.parametrize("name", [*ENCODED, "nope"])
def test_only_a_layer_without_positions_cannot_tell_a_permuted_prefix(name):
    model = tiny_model(name, n_layers=1)
    text = torch.arange(20)[None]
    permuted = torch.cat([text[:, :-1].flip(1), text[:, -1:]], 1)
    before, after = model(text)[:, -1], model(permuted)[:, -1]
    assert torch.allclose(before, after, rtol=0, atol=1e-12) == (name == "nope")
    assert name == "nope" or (before - after).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["relative_position", "t5_bias", "rope", "alibi"])
def test_relative_encodings_do_not_care_where_a_text_starts(name):
    mixer = tiny_model(name, n_layers=1).blocks[0].mixer
    x = heads(2, 9, mixer.q_proj.in_features)
    here, there = torch.arange(9), torch.arange(9) + 30
    torch.testing.assert_close(mixer(x, here), mixer(x, there), rtol=0, atol=1e-5)


def test_learned_positions_are_a_table_whose_first_row_stands_for_padding():
    position = LearnedPosition(16, 8)
    positions = torch.tensor([[-2, -1, 0, 1], [12, 13, 14, 15]])
    assert torch.equal(position(positions), position.table.weight[torch.tensor([[0, 0, 0, 1], [12, 13, 14, 15]])])


def test_learned_positions_end_with_an_error_that_names_the_flag():
    model = tiny_model("learned_position")
    n = model.config.max_seq_len
    message = rf"{n + 1} tokens .*max_seq_len = {n}.*--model.max-seq-len"
    with pytest.raises(ValueError, match=message):
        model(torch.zeros(1, n + 1, dtype=torch.int64))
    with pytest.raises(ValueError, match=message):
        model.make_cache(1, n + 1)
    assert model(torch.zeros(1, n, dtype=torch.int64)).shape == (1, n, VOCABULARY)


def test_learned_positions_end_in_a_cache_too():
    model = tiny_model("learned_position")
    cache = model.make_cache(2, 64, torch.tensor([0, 3]))
    model(torch.zeros(2, 60, dtype=torch.int64), cache)
    with pytest.raises(ValueError, match=r"70 tokens do not fit.*max_seq_len = 64"):
        model(torch.zeros(2, 10, dtype=torch.int64), cache)
    assert model(torch.zeros(2, 4, dtype=torch.int64), cache).isfinite().all()


@pytest.mark.parametrize("n_heads", [1, 2, 3, 5, 8, 12, 16, 20, 33])
def test_alibi_slopes_equal_those_of_bloom_and_mpt(n_heads):
    bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom")
    mpt = pytest.importorskip("transformers.models.mpt.modeling_mpt")
    ours = alibi_slopes(n_heads)
    theirs = bloom.build_alibi_tensor(torch.ones(1, 2, dtype=torch.int64), n_heads, torch.float32)  # (H, 1, 2)
    torch.testing.assert_close(ours, theirs[:, 0, 1], rtol=1e-6, atol=0)
    torch.testing.assert_close(ours, -mpt.build_mpt_alibi_tensor(n_heads, 2)[:, 0, 0], rtol=1e-6, atol=0)


def test_alibi_slopes_of_the_paper():
    assert alibi_slopes(8).tolist() == [2.0**-h for h in range(1, 9)]
    assert alibi_slopes(16)[:2].tolist() == pytest.approx([2**-0.5, 2**-1])
    assert alibi_slopes(3).tolist() == [2**-4, 2**-8, 2**-2]


def test_alibi_attention_equals_that_of_bloom():
    """Bloom adds slope x j where the paper subtracts slope x (i - j): the softmax over j sees no difference."""
    transformers = pytest.importorskip("transformers")
    modeling = pytest.importorskip("transformers.models.bloom.modeling_bloom")
    config = transformers.BloomConfig(hidden_size=24, n_head=3, attn_implementation="eager")
    theirs = modeling.BloomAttention(config, layer_idx=0).double().eval()
    redraw(theirs)
    bias = ALiBi(3)
    ours = MultiHeadAttention(d_model=24, n_heads=3, score_bias=bias, qkv_bias=True, o_bias=True).double()
    for part in ("weight", "bias"):  # fused as [head][q, k, v]
        fused = getattr(theirs.query_key_value, part).unflatten(0, (3, 3, 8))
        for i, projection in enumerate((ours.q_proj, ours.k_proj, ours.v_proj)):
            getattr(projection, part).data = fused[:, i].flatten(0, 1)
        getattr(ours.o_proj, part).data = getattr(theirs.dense, part).data
    x, hidden = heads(2, 7, 24), torch.full((7, 7), -1e30, dtype=torch.float64).triu(1)
    slopes = modeling.build_alibi_tensor(torch.ones(2, 7, dtype=torch.int64), 3, torch.float64)
    expected, _ = theirs(x, torch.zeros_like(x), slopes, hidden)
    torch.testing.assert_close(ours(x, torch.arange(7)), expected, rtol=0, atol=1e-6)  # they take fp32 softmax


@pytest.mark.parametrize("n_buckets, max_distance", [(32, 128), (16, 64), (8, 20), (33, 100), (2, 5)])
def test_buckets_equal_those_of_t5(n_buckets, max_distance):
    modeling = pytest.importorskip("transformers.models.t5.modeling_t5")
    distance = torch.arange(-50, 3000)
    theirs = modeling.T5Attention._relative_position_bucket(
        -distance, bidirectional=False, num_buckets=n_buckets, max_distance=max_distance
    )
    assert torch.equal(bucket(distance, n_buckets, max_distance), theirs)
    assert theirs.max() == n_buckets - 1


def test_t5_attention_equals_that_of_the_t5_decoder():
    transformers = pytest.importorskip("transformers")
    modeling = pytest.importorskip("transformers.models.t5.modeling_t5")
    sizes = {"d_model": 24, "d_kv": 8, "num_heads": 3, "dropout_rate": 0.0}
    buckets = {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 20}
    config = transformers.T5Config(**sizes, **buckets, is_decoder=True, attn_implementation="eager")
    theirs = modeling.T5Attention(config, has_relative_attention_bias=True, layer_idx=0).double().eval()
    redraw(theirs)
    ours = MultiHeadAttention(d_model=24, n_heads=3, score_bias=T5Bias(3, 8, 20), scale=1.0).double()
    for name in "qkvo":
        getattr(ours, f"{name}_proj").weight = getattr(theirs, name).weight
    ours.score_bias.table.weight = theirs.relative_attention_bias.weight
    x = heads(2, 40, 24)
    mask = torch.full((40, 40), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    torch.testing.assert_close(ours(x, torch.arange(40)), theirs(x, mask=mask)[0], rtol=0, atol=1e-10)


def test_t5_bias_names_buckets_that_cannot_be():
    for n_buckets, max_distance in [(1, 128), (32, 16)]:
        with pytest.raises(ValueError, match=f"n_buckets = {n_buckets} .*max_distance = {max_distance}"):
            T5Bias(4, n_buckets, max_distance)


@pytest.mark.parametrize("bias", [T5Bias(3, 8, 20), ALiBi(3)], ids=["t5", "alibi"])
def test_a_bias_takes_the_positions_of_each_row(bias):
    q_pos, k_pos = torch.tensor([[4, 5], [-1, 9]]), torch.tensor([[5, -1, 3], [8, 9, 1]])
    rows = torch.stack([bias(q, k) for q, k in zip(q_pos, k_pos, strict=True)])
    assert rows.shape == (2, 3, 2, 3)
    assert torch.equal(bias(q_pos, k_pos), rows)


def relative_attention(d_model=24, n_heads=3):
    attention = RelativeAttention(d_model=d_model, n_heads=n_heads).double()
    redraw(attention)
    return attention


def test_relative_attention_follows_the_four_terms_of_the_paper():
    attention, x = relative_attention(), heads(2, 7, 24)
    q, k, v = (p(x).unflatten(-1, (3, 8)) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    w_r = attention.r_proj.weight.unflatten(0, (3, 8))
    result = torch.zeros(2, 7, 3, 8, dtype=torch.float64)
    for b, i, h in itertools.product(range(2), range(7), range(3)):
        scores = torch.zeros(i + 1, dtype=torch.float64)
        for j in range(i + 1):
            r = w_r[h] @ sinusoidal(torch.tensor(i - j), 24).double()
            u, w = attention.u[h], attention.v[h]
            terms = q[b, i, h] @ k[b, j, h], q[b, i, h] @ r, u @ k[b, j, h], w @ r
            scores[j] = sum(terms) / 8**0.5
        result[b, i, h] = scores.softmax(0) @ v[b, : i + 1, h]
    expected = attention.o_proj(result.flatten(2))
    torch.testing.assert_close(attention(x, torch.arange(7)), expected, rtol=0, atol=1e-10)


def test_relative_attention_equals_that_of_xlnet():
    transformers = pytest.importorskip("transformers")
    config = transformers.XLNetConfig(vocab_size=9, d_model=24, n_layer=1, n_head=3, d_inner=24, attn_type="uni")
    model = transformers.XLNetModel(config).double().eval()
    redraw(model)
    theirs, ours = model.layer[0].rel_attn, relative_attention()
    for name in "qkv":
        getattr(ours, f"{name}_proj").weight.data = getattr(theirs, name).flatten(1).T
    sine_first = torch.cat([torch.arange(0, 24, 2), torch.arange(1, 24, 2)])
    ours.r_proj.weight.data[:, sine_first] = theirs.r.flatten(1).T
    ours.o_proj.weight.data = theirs.o.flatten(1)
    ours.u.data, ours.v.data = theirs.r_w_bias.data, theirs.r_r_bias.data
    x, n = heads(2, 7, 24), 7
    k_r = torch.einsum("ibd,dhc->ibhc", model.relative_positional_encoding(n, n, bsz=2).double(), theirs.r)
    q, k, v = (torch.einsum("bid,dhc->ibhc", x, getattr(theirs, name)) for name in "qkv")
    hidden = torch.ones(n, n, dtype=torch.float64).triu(1)[:, :, None, None]
    attended = theirs.rel_attn_core(q, k, v, k_r, attn_mask=hidden.expand(n, n, 2, 3))
    expected = torch.einsum("ibhc,dhc->bid", attended, theirs.o)
    torch.testing.assert_close(ours(x, torch.arange(n)), expected, rtol=0, atol=1e-6)


def test_the_shift_puts_scores_where_a_look_up_finds_them():
    by_distance, positions = heads(2, 3, 6, 6), torch.arange(6)
    past = torch.ones(6, 6, dtype=torch.bool).tril()
    assert torch.equal(shift(by_distance)[..., past], gather(by_distance, Places(positions, positions))[..., past])
    i, j = 4, 1
    assert torch.equal(shift(by_distance)[..., i, j], by_distance[..., i, 5 - (i - j)])


def test_relative_attention_takes_keys_in_any_order():
    attention, positions = relative_attention(), torch.arange(6)
    q, k, v = heads(3, 2, 3, 6, 8)
    expected = attention.attend(q, k, v, Places(positions, positions, whole_text=True))
    rows, order = positions.expand(2, -1), torch.tensor([3, 0, 5, 1, 4, 2])  # as in the slots of a ring
    shuffled = attention.attend(q, k[:, :, order], v[:, :, order], Places(rows, rows[:, order]))
    torch.testing.assert_close(shuffled, expected)


@pytest.mark.parametrize("name", ENCODED)
def test_every_encoding_runs_in_bf16_under_autocast(name):
    model = tiny_model(name).float().train()
    tokens = torch.randint(VOCABULARY, (2, 17), generator=torch.Generator().manual_seed(3))
    exact, _ = model.loss(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = model.loss(tokens)
    loss.backward()
    torch.testing.assert_close(loss, exact, rtol=0.02, atol=0)


def test_the_same_last_tokens_are_scored_as_the_text_before_them_grows():
    """Only dynamic NTK looks at the length: as far as trained it does nothing, at the full one what NTK-aware does."""
    model = tiny_model("rope")
    windows = torch.randint(VOCABULARY, (3, 65), generator=torch.Generator().manual_seed(0))

    def at_the_end(way, length):
        set_scaling(model, way)
        logits = model(windows[:, 64 - length : 64])
        return F.cross_entropy(logits[:, -16:].transpose(1, 2), windows[:, -16:]).item()

    ways = {"no scaling": None, **scalings(16, 64)}
    grown = {name: set_scaling(model, way) or loss_as_texts_grow(model, windows, 16) for name, way in ways.items()}
    dynamic = grown.pop("dynamic NTK")
    for name, losses in grown.items():
        assert losses == pytest.approx([at_the_end(ways[name], length) for length in (16, 32, 48, 64)], rel=1e-5)
    for n, way in [(0, None), (1, NTKAware(2.0)), (3, ways["NTK-aware"])]:
        assert dynamic[n] == pytest.approx(at_the_end(way, 16 * (n + 1)), rel=1e-5)
    assert dynamic[0] != pytest.approx(at_the_end(ways["NTK-aware"], 16), rel=1e-4)


@pytest.mark.filterwarnings("ignore:Unable to enable fault handler")
def test_the_script_writes_rows_table_and_picture_and_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = write_corpus(tmp_path)
    script_module = script("extend_context")
    flags = ["--short", "16", "--times", "3", "--steps", "2", "--windows", "5", "--seeds", "1", "--data", str(data)]
    flags += ["--processes", "1", "--out", str(tmp_path / "context.jsonl"), "--models", "learned_position", "mamba2"]
    script_module.main(flags)
    first = (tmp_path / "context.jsonl").read_text(encoding="utf-8")
    script_module.main([*flags, "rope"])
    assert (tmp_path / "context.jsonl").read_text(encoding="utf-8").startswith(first)
    text = (tmp_path / "context.md").read_text(encoding="utf-8")
    assert text in capsys.readouterr().out
    header, _, *lines, _, origin = text.splitlines()
    assert header == "| text of | 16 | 32 | 48 |" and "1,024 tokens of training each" in origin
    rows = {name: losses for name, *losses in (line.strip("| ").split(" | ") for line in lines)}
    read = ["rope", *(f"rope, {name}" for name in script_module.SCALINGS)]
    through = ["rope, window", "rope, first tokens and window"]
    assert set(rows) == {"learned_position", "mamba2", *read, *(f"{name}, tuned" for name in read), *through}
    assert rows.pop("learned_position")[1:] == ["none", "none"]
    assert all(float(loss) > 0 for losses in rows.values() for loss in losses)
    assert rows["rope, dynamic NTK"][0] == rows["rope"][0] != rows["rope, YaRN"][0]
    assert rows["rope, dynamic NTK"][2] == rows["rope, NTK-aware"][2]
    assert (tmp_path / "context.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("flags, says", [(["--models", "llada"], "is called llada"), (["--times", "1"], "times = 1")])
def test_the_script_names_what_it_does_not_know(flags, says, capsys):
    with pytest.raises(SystemExit):
        script("extend_context").main(flags)
    assert says in capsys.readouterr().err
