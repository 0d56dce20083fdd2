"""Attention: the fused path against the equation, masks against loops, caches against recomputing, mixers against
transformers."""

import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import redraw, tiny_model
from torch._dynamo.testing import CompileCounter

from llm.models.grouped_query import GroupedQuery
from llm.models.sparse import Sparse
from llm.modules import masks
from llm.modules.attention.big_bird import BigBird, scramble
from llm.modules.attention.core import explicit_attention
from llm.modules.attention.gated import GatedAttention
from llm.modules.attention.multi_head import MultiHeadAttention
from llm.modules.attention.sinks import SinkAttention
from llm.modules.attention.soft_capping import SoftCappedAttention
from llm.modules.attention.streaming import StreamingAttention, store_first
from llm.modules.cache import Cache, Places
from llm.modules.kernels import flex
from llm.modules.kernels.attention import attend, fused_attention, fused_sink_attention
from llm.modules.kernels.flex import block_mask, flex_attention, flex_serves
from llm.modules.kernels.query_blocks import QueryBlocks, blocked_attention, blocks_serve

os.environ["HF_HUB_OFFLINE"] = "1"
T = 40
POSITIONS = torch.arange(T)


def whole(length=T, device="cpu"):
    """Queries and keys are one text."""
    positions = torch.arange(length, device=device)
    return Places(positions, positions, whole_text=True)


def by_loop(sees, length=T):
    return torch.tensor([[sees(i, j) for j in range(length)] for i in range(length)])


def big_bird_by_loop(i, j):
    """Blocks of 3: one global, two nearby, two drawn by the mask's own hash, but listed as the docstring says."""
    mine, other = i // 3, j // 3
    candidates = list(range(1, mine - 1))
    drawn = [
        candidates[scramble(torch.tensor(mine), (5 * 1_000 + 2) * 1_000 + d) % len(candidates)]
        for d in (0, 1)
        if candidates
    ]
    return j <= i and (other == 0 or other >= mine - 1 or other in drawn)


PATTERNS = {
    "causal": (masks.causal, lambda i, j: j <= i),
    "window": (masks.Window(7), lambda i, j: i - 7 < j <= i),
    "dilated": (masks.Dilated(4, 3), lambda i, j: j in (i, i - 3, i - 6, i - 9)),
    "strided": (masks.Strided(6), lambda i, j: j in range(i, -1, -6)),
    "own block": (masks.OwnBlock(6), lambda i, j: j in range(i - i % 6, i + 1)),
    "summaries": (masks.Summaries(6, 2), lambda i, j: j == i or (j < i and j % 6 in (4, 5))),
    "first and window": (masks.FirstAndWindow(3, 5), lambda i, j: j <= i and (j < 3 or j > i - 5)),
    "big bird": (BigBird(block_size=3, n_global=1, n_window=2, n_random=2, seed=5, layer=2), big_bird_by_loop),
}
SHORT = {name: mask for name, (mask, *_) in PATTERNS.items()} | {"everything": masks.everything}
"""What a short text is computed under in blocks of queries."""


def random_qkv(n_heads=4, n_kv_heads=4, queries=T, keys=T, head_dim=8, v_dim=8, dtype=torch.float64):
    torch.manual_seed(0)
    shapes = [(n_heads, queries, head_dim), (n_kv_heads, keys, head_dim), (n_kv_heads, keys, v_dim)]
    return [torch.randn(2, *shape, dtype=dtype, requires_grad=True) for shape in shapes]


def assert_same(ours, theirs, *leaves, atol=1e-10):
    """Equal values, and equal gradients of a weighted sum with respect to `leaves`."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)
    weights = torch.randn(ours.shape, dtype=ours.dtype, generator=torch.Generator().manual_seed(3)).to(ours.device)
    gradients = [torch.autograd.grad((y * weights).sum(), leaves, retain_graph=True) for y in (ours, theirs)]
    assert all(g.any() for g in gradients[0])
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=atol)


def mixer(Mixer=MultiHeadAttention, **options):
    """A mixer of width 24 in float64, every parameter re-drawn, and an input for it."""
    torch.manual_seed(0)
    layer = Mixer(**{"d_model": 24, "n_heads": 6, **options}).double()
    redraw(layer)
    return layer, torch.randn(2, T, 24, dtype=torch.float64)


def step_by_step(layer, x, parts, padding=0):
    """The output of `layer` for x (B, T, D), given to it in `parts` through a cache made for 1000 tokens."""
    cache = Cache(torch.zeros(len(x), dtype=torch.int64) - padding, [layer.make_cache(len(x), 1000)])
    outputs = []
    for part in x.split(parts, 1):
        outputs.append(layer(part, cache.positions(part.shape[1]), cache.layers[0]))
        cache.seen += part.shape[1]
    return torch.cat(outputs, 1)


@pytest.mark.parametrize("n_kv_heads", [6, 3, 2, 1])
@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("kind", ["none", "causal", "boolean", "bias", "fewer queries"])
def test_fused_attention_equals_the_equation(n_kv_heads, scale, kind):
    queries = 5 if kind == "fewer queries" else T
    q, k, v = random_qkv(n_heads=6, n_kv_heads=n_kv_heads, queries=queries)
    lower = torch.ones(T, T, dtype=torch.bool).tril()
    bias = torch.randn(6, T, T, dtype=torch.float64, requires_grad=True)
    mask = {"causal": lower, "boolean": torch.rand(2, 1, T, T) < 0.5, "bias": bias, "fewer queries": lower[-5:]}.get(
        kind
    )
    if kind == "boolean":
        mask[..., 0] = True
    shown, added = (None, mask) if kind == "bias" else (mask, None)
    explicit = explicit_attention(q, k, v, shown, scale, bias=added)
    fused = fused_attention(q, k, v, None if kind == "causal" else mask, scale, is_causal=kind == "causal")
    assert_same(fused, explicit, q, k, v, *([bias] if kind == "bias" else []))


def test_explicit_attention_is_the_textbook_loop():
    q, k, v = random_qkv(n_heads=6, n_kv_heads=3, v_dim=5)
    result = explicit_attention(q, k, v, torch.ones(T, T, dtype=torch.bool).tril(), scale=0.3)
    for b, h, t in [(0, 0, 0), (1, 3, 17), (0, 5, T - 1)]:
        scores = [0.3 * q[b, h, t] @ k[b, h // 2, s] for s in range(t + 1)]
        weights = torch.stack(scores).exp() / torch.stack(scores).exp().sum()
        expected = sum(w * v[b, h // 2, s] for s, w in enumerate(weights))
        torch.testing.assert_close(result[b, h, t], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("visible", [masks.causal, masks.Window(7), masks.everything])
def test_attention_applies_mask_and_bias_together(visible):
    q, k, v = random_qkv(n_kv_heads=2)
    bias = torch.randn(4, T, T, dtype=torch.float64, requires_grad=True)
    seen = visible.visible(POSITIONS[:, None], POSITIONS[None])
    expected = explicit_attention(q, k, v, seen, 0.4, bias=bias)
    assert_same(attend(q, k, v, whole(), visible, bias=lambda *_: bias, scale=0.4), expected, q, k, v, bias)
    expected = explicit_attention(q, k, v, seen, 0.4)
    assert_same(attend(q, k, v, whole(), visible, scale=0.4), expected, q, k, v)


@pytest.mark.parametrize("name", SHORT)
@pytest.mark.parametrize("length", [1, 127, 128, 300])
@pytest.mark.parametrize(("v_dim", "scale"), [(8, None), (5, 0.7)])
def test_blocks_of_queries_equal_the_equation(name, length, v_dim, scale):
    q, k, v = random_qkv(queries=length, keys=length, v_dim=v_dim)
    positions = torch.arange(length)
    explicit = explicit_attention(q, k, v, masks.visibility(SHORT[name], positions, positions), scale)
    ours = blocked_attention(q, k, v, SHORT[name], scale)
    assert_same(ours, explicit, *((q, k, v) if length > 1 else (v,)))


@pytest.mark.parametrize("name", SHORT)
@pytest.mark.parametrize("length", [T, 300])
def test_blocks_of_queries_are_what_training_on_a_cpu_uses_and_gives_the_equation(name, length):
    shape = {"n_heads": 6, "n_kv_heads": 3, "queries": length, "keys": length}
    q, k, v = (x.detach().bfloat16().requires_grad_() for x in random_qkv(**shape))
    assert blocks_serve(q, SHORT[name])
    positions = torch.arange(length)
    ours = attend(q, k, v, whole(length), SHORT[name])
    assert type(ours.grad_fn).__name__ == "QueryBlocksBackward"
    mask = masks.visibility(SHORT[name], positions, positions)
    exact = explicit_attention(q.double(), k.double(), v.double(), mask)
    gradients = [torch.autograd.grad(y.double().square().sum(), (q, k, v)) for y in (ours, exact)]
    for mine, reference in zip((ours, *gradients[0]), (exact, *gradients[1]), strict=True):
        assert (mine.double() - reference.double()).norm() < 0.02 * reference.double().norm()


@pytest.mark.parametrize("name", SHORT)
@pytest.mark.parametrize("batch", [(), (2,)])
def test_blocks_of_queries_take_a_bias_and_give_its_gradient(name, batch):
    q, k, v = random_qkv(queries=300, keys=300)
    bias = torch.randn(*batch, 4, 300, 300, dtype=torch.float64, requires_grad=True)
    mask = masks.visibility(SHORT[name], torch.arange(300), torch.arange(300))
    explicit = explicit_attention(q, k, v, mask, bias=bias)
    assert_same(blocked_attention(q, k, v, SHORT[name], bias=bias), explicit, q, k, v, bias)


@pytest.mark.parametrize("name", SHORT)
@pytest.mark.parametrize("length", [127, 300])
def test_blocks_of_queries_take_sinks_and_give_their_gradient(name, length):
    q, k, v = random_qkv(queries=length, keys=length)
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)
    mask = masks.visibility(SHORT[name], torch.arange(length), torch.arange(length))
    explicit = explicit_attention(q, k, v, mask, sinks=sinks)
    assert_same(blocked_attention(q, k, v, SHORT[name], sinks=sinks), explicit, q, k, v, sinks)


@pytest.mark.parametrize("name", ["alibi", "t5_bias", "relative_position", "attention_sink", "qk_norm", "big_bird"])
def test_training_on_a_cpu_in_bf16_takes_the_blocks(name, monkeypatch):
    used = []
    monkeypatch.setattr(QueryBlocks, "apply", lambda *args: used.append(args[0].dtype) or args[2])
    model = tiny_model(name).float()
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.zeros(1, 8, dtype=torch.long))
    assert used == [torch.bfloat16] * len(model.blocks)


def test_one_query_against_a_cache_sees_all_of_it():
    q, k, v = random_qkv(queries=1, keys=5)
    heads = attend(q, k, v, Places(torch.tensor([[4], [4]]), torch.arange(5).expand(2, 5)))
    assert_same(heads, explicit_attention(q, k, v), q, k, v)


def test_one_key_head_for_each_query_head_is_multi_head_attention():
    grouped, x = mixer(n_heads=3, n_kv_heads=3, head_dim=5)
    plain, _ = mixer(n_heads=3, head_dim=5)
    plain.load_state_dict(grouped.state_dict())
    assert torch.equal(grouped(x, POSITIONS), plain(x, POSITIONS))


@pytest.mark.parametrize(("n_heads", "n_kv_heads"), [(6, 3), (6, 2), (6, 1), (5, 1), (9, 3)])
def test_grouped_query_attention_is_multi_head_attention_with_repeated_keys_and_values(n_heads, n_kv_heads):
    grouped, x = mixer(n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=4, qkv_bias=True)
    plain, _ = mixer(n_heads=n_heads, head_dim=4, qkv_bias=True)
    state = grouped.state_dict()
    for name in ("k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias"):
        heads = state[name].unflatten(0, (n_kv_heads, 4))
        state[name] = torch.stack([heads[h * n_kv_heads // n_heads] for h in range(n_heads)]).flatten(0, 1)
    plain.load_state_dict(state)
    torch.testing.assert_close(grouped(x, POSITIONS), plain(x, POSITIONS), rtol=0, atol=1e-12)


def test_heads_that_cannot_be_shared_evenly_are_refused():
    with pytest.raises(ValueError, match=r"n_kv_heads = 4.*n_heads = 6.*--model.n-kv-heads"):
        MultiHeadAttention(d_model=24, n_heads=6, n_kv_heads=4)
    with pytest.raises(ValueError, match=r"n_kv_heads = 3.*--model.n-kv-heads"):
        GroupedQuery.Config(n_heads=16, n_kv_heads=3)
    with pytest.raises(ValueError, match=r"n_kv_heads = 0 must be positive"):
        GroupedQuery.Config(n_kv_heads=0)


def test_the_cache_shrinks_by_the_number_of_heads_that_share():
    def kv_bytes(name, **sizes):
        return sum(layer[n].nbytes for layer in tiny_model(name, **sizes).make_cache(2, 20).layers for n in "kv")

    full = kv_bytes("baseline", n_heads=8)
    assert kv_bytes("grouped_query", n_heads=8, n_kv_heads=2) * 4 == full
    assert kv_bytes("multi_query", n_heads=8) * 8 == full


@pytest.mark.parametrize("name", PATTERNS)
def test_a_pattern_is_what_a_loop_over_all_pairs_says(name):
    visible, sees = PATTERNS[name]
    dense = masks.visibility(visible, POSITIONS, POSITIONS)
    assert torch.equal(dense, by_loop(sees))
    assert dense.diagonal().all()  # a query sees at least itself, hence its softmax has a value


@pytest.mark.parametrize("name", PATTERNS)
def test_nothing_beyond_its_reach_is_visible_and_nothing_later(name):
    visible = PATTERNS[name][0]
    distance = (POSITIONS[:, None] - POSITIONS)[masks.visibility(visible, POSITIONS, POSITIONS)]
    assert distance.min() == 0
    assert distance.max() < visible.reach
    assert math.isinf(visible.reach) or distance.max() == visible.reach - 1  # and not a slot too many


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("parts", [[1] * T, [T], [11, 1, 1, 20, 1, 6]])
def test_a_pattern_through_a_cache_equals_recomputing(name, parts):
    visible, _ = PATTERNS[name]
    layer, x = mixer(mask=visible, n_kv_heads=2)
    torch.testing.assert_close(step_by_step(layer, x, parts), layer(x, POSITIONS), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", PATTERNS)
def test_masks_are_values_so_that_equal_ones_share_a_compiled_mask(name):
    mask = PATTERNS[name][0]
    again, other = replace(mask), masks.Window(8)
    assert again is not mask
    assert again == mask != other
    assert hash(again) == hash(mask)
    assert block_mask(again, T, torch.device("cpu")) is block_mask(mask, T, torch.device("cpu"))
    assert block_mask(other, T, torch.device("cpu")) is not block_mask(mask, T, torch.device("cpu"))


def test_two_layers_of_a_sparse_transformer_reach_every_token_of_the_finished_blocks():
    local = masks.visibility(masks.OwnBlock(6), POSITIONS, POSITIONS).int()
    summary = masks.visibility(masks.Summaries(6, 1), POSITIONS, POSITIONS).int()
    fixed = (summary @ local).bool()
    assert fixed[T - 1, : T - T % 6].all()
    stride = masks.visibility(masks.Strided(6), POSITIONS, POSITIONS).int()
    recent = masks.visibility(masks.Window(7), POSITIONS, POSITIONS).int()
    assert (stride @ recent).bool()[T - 1].all()


def test_big_bird_draws_other_blocks_for_other_seeds_and_layers_and_the_same_ones_again():
    def dense(**which):
        visible = BigBird(block_size=2, n_global=1, n_window=2, n_random=2, **which)
        return masks.visibility(visible, torch.arange(200), torch.arange(200))

    assert torch.equal(dense(seed=1, layer=3), dense(seed=1, layer=3))
    assert not torch.equal(dense(seed=1, layer=3), dense(seed=2, layer=3))
    assert not torch.equal(dense(seed=1, layer=3), dense(seed=1, layer=4))
    assert dense(seed=10**12).any()
    i = torch.arange(200, dtype=torch.int32)  # FlexAttention's kernels count in int32
    visible = BigBird(block_size=2, n_global=1, n_window=2, n_random=2, seed=1, layer=3)
    assert torch.equal(masks.visibility(visible, i, i), dense(seed=1, layer=3))


def test_big_bird_draws_evenly():
    visible = BigBird(block_size=1, n_global=0, n_window=1, n_random=1)
    i, j = torch.arange(4001, 8001), torch.arange(4000)
    hits = masks.visibility(visible, i, j).sum(0)  # row i draws one of i columns
    expected = (1.0 / i).sum()
    quarters = hits.view(4, 1000).sum(1) / 1000
    assert (quarters / expected - 1).abs().max() < 0.2  # about 690 hits a quarter: five standard deviations


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: masks.Window(0), "window_size = 0"),
        (lambda: masks.Dilated(4, 0), "gap = 0"),
        (lambda: masks.Strided(0), "stride = 0.*--model.stride"),
        (lambda: masks.OwnBlock(-1), "stride = -1.*--model.stride"),
        (lambda: masks.Summaries(4, 5), "n_summary = 5.*--model.n-summary"),
        (lambda: masks.FirstAndWindow(-1, 4), "n_first = -1"),
        (lambda: BigBird(block_size=0, n_global=1, n_window=1, n_random=1), "block_size = 0"),
        (lambda: Sparse.Config(stride=0), "stride = 0.*--model.stride"),
        (lambda: Sparse.Config(stride=4, n_summary=5), "n_summary = 5"),
    ],
)
def test_sizes_without_meaning_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", ["sliding_window", "streaming"])
def test_a_window_as_long_as_the_text_is_full_attention(name, tokens):
    windowed, full = tiny_model(name, window_size=24), tiny_model("baseline")
    full.load_state_dict(windowed.state_dict())
    torch.testing.assert_close(windowed(tokens), full(tokens), rtol=0, atol=1e-10)
    narrow = tiny_model(name, window_size=8)
    assert not torch.allclose(narrow(tokens), full(tokens))


@pytest.mark.parametrize(
    ("name", "sizes", "n_slots"),
    [
        ("sliding_window", {"window_size": 8}, [8, 8]),
        ("streaming", {"window_size": 8, "n_first": 3}, [11, 11]),
        ("sparse", {"stride": 8}, [8, 64]),
    ],
)
def test_generating_far_past_the_window_equals_recomputing_and_the_cache_stays_small(name, sizes, n_slots, tokens):
    model = tiny_model(name, **sizes)
    cache = model.make_cache(3, 64)
    assert [layer["k"].shape[1] for layer in cache.layers] == n_slots
    prompt = tokens[:, :11]
    generated = torch.stack(list(model.generate(prompt, 50, lambda logits: logits.argmax(-1))), 1)
    text = torch.cat([prompt, generated], 1)
    assert torch.equal(model(text).argmax(-1)[:, 10:-1], generated)


@pytest.mark.parametrize("parts", [[1] * T, [T], [2, 1, 17, 1, 1, 18], [6, 30, 1, 3]])
@pytest.mark.parametrize("n_first", [0, 1, 4])
def test_streaming_through_its_cache_equals_recomputing(parts, n_first):
    layer, x = mixer(StreamingAttention, n_first=n_first, window_size=5, n_kv_heads=2)
    assert layer.make_cache(2, 1000)["k"].shape[1] == n_first + 5
    torch.testing.assert_close(step_by_step(layer, x, parts), layer(x, POSITIONS), rtol=0, atol=1e-10)


def test_streaming_fills_its_slots_as_the_docstring_says():
    layer, x = mixer(StreamingAttention, n_first=2, window_size=3)
    cache, written, shown = Cache(torch.zeros(2, dtype=torch.int64), [layer.make_cache(2, 1000)]), [], []
    for token in x[:, :7].split(1, 1):
        *_, places = store_first(cache.layers[0], cache.positions(1), 2, k=token.view(2, 1, 6, 4))
        written.append(cache.layers[0]["pos"][1].tolist())
        shown.append(places.k[1].tolist())
        cache.seen += 1
    rings = [[0, -1, -1], [0, 1, -1], [0, 1, 2], [3, 1, 2], [3, 4, 2], [3, 4, 5], [6, 4, 5]]
    firsts = [[0, -1], *[[0, 1]] * 6]
    assert written == [first + ring for first, ring in zip(firsts, rings, strict=True)]
    hidden = [[-1 if p < 2 else p for p in ring] for ring in rings]
    assert shown == [first + ring for first, ring in zip(firsts, hidden, strict=True)]


@pytest.mark.parametrize("parts", [[1] * T, [T], [2, 1, 17, 1, 1, 18], [6, 30, 1, 3]])
def test_streaming_keeps_the_first_tokens_after_the_padding_of_each_row(parts):
    layer, x = mixer(StreamingAttention, n_first=3, window_size=5)
    together = step_by_step(layer, x, parts, padding=torch.tensor([0, 7]))
    torch.testing.assert_close(together[0], layer(x[:1], POSITIONS)[0], rtol=0, atol=1e-10)
    torch.testing.assert_close(together[1, 7:], layer(x[1:, 7:], POSITIONS[:-7])[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("visible", [masks.causal, masks.Window(5)])
@pytest.mark.parametrize(("n_kv_heads", "v_dim", "scale"), [(6, 8, None), (2, 8, 0.6), (1, 5, None)])
def test_the_fused_sink_equals_the_explicit_one(visible, n_kv_heads, v_dim, scale):
    q, k, v = random_qkv(n_heads=6, n_kv_heads=n_kv_heads, v_dim=v_dim)
    sinks = torch.randn(6, dtype=torch.float64, requires_grad=True)
    mask = masks.visibility(visible, POSITIONS, POSITIONS)
    fused = fused_sink_attention(q, k, v, sinks, mask, scale)
    assert_same(fused, explicit_attention(q, k, v, mask, scale, sinks=sinks), q, k, v, sinks)


def test_a_sink_takes_its_share_of_the_softmax():
    q, k, v = random_qkv(n_heads=1, n_kv_heads=1)
    mask = torch.ones(T, T, dtype=torch.bool)
    scores = (q @ k.mT * 8**-0.5).exp()
    expected = scores @ v / (scores.sum(-1, keepdim=True) + torch.tensor(0.9).double().exp())
    torch.testing.assert_close(fused_sink_attention(q, k, v, torch.tensor([0.9]).double(), mask), expected)


def test_a_sink_at_minus_infinity_is_none():
    q, k, v = random_qkv()
    mask = masks.visibility(masks.Window(5), POSITIONS, POSITIONS)
    plain = explicit_attention(q, k, v, mask)
    explicit = explicit_attention(q, k, v, mask, sinks=torch.full((4,), -torch.inf))
    fused = fused_sink_attention(q, k, v, torch.full((4,), -1e30, dtype=torch.float64), mask)
    torch.testing.assert_close(explicit, plain, rtol=0, atol=1e-12)
    torch.testing.assert_close(fused, plain, rtol=0, atol=1e-12)


def test_sinks_come_through_windows_shared_heads_and_a_ring_cache():
    layer, x = mixer(SinkAttention, n_kv_heads=2, mask=masks.Window(5))
    assert layer.make_cache(2, 1000)["k"].shape[1] == 5
    whole = layer(x, POSITIONS)
    torch.testing.assert_close(step_by_step(layer, x, [9, 1, 1, 20, 9]), whole, rtol=0, atol=1e-10)
    layer.sinks.data += 1
    assert not torch.allclose(layer(x, POSITIONS), whole)


@pytest.mark.parametrize("visible", [masks.causal, masks.Window(5)])
def test_soft_capping_caps_scores_and_not_the_mask(visible):
    layer, x = mixer(SoftCappedAttention, soft_cap=0.8, n_kv_heads=2, mask=visible, scale=1.3)
    torch.testing.assert_close(step_by_step(layer, x, [9, 1, 1, 20, 9]), layer(x, POSITIONS), rtol=0, atol=1e-10)

    q, k, v = random_qkv()
    seen = visible.visible(POSITIONS[:, None], POSITIONS[None])
    heads = explicit_attention(q, k, v, seen, 1.3, soft_cap=0.8)
    for t in (0, 6, T - 1):
        keys = [s for s in range(T) if seen[t, s]]
        scores = torch.stack([0.8 * torch.tanh(1.3 * q[1, 2, t] @ k[1, 2, s] / 0.8) for s in keys])
        torch.testing.assert_close(heads[1, 2, t], scores.softmax(0) @ v[1, 2, keys], rtol=0, atol=1e-12)


def test_a_high_cap_changes_nothing():
    q, k, v = random_qkv()
    mask = torch.ones(T, T, dtype=torch.bool).tril()
    capped = explicit_attention(q, k, v, mask, soft_cap=1e6)
    torch.testing.assert_close(capped, explicit_attention(q, k, v, mask), rtol=0, atol=1e-9)


def test_what_an_overridden_step_would_ignore_is_refused():
    def bias(q_pos, k_pos):
        return torch.zeros(6, len(q_pos), len(k_pos))

    with pytest.raises(ValueError, match="score_bias is not supported beside sinks"):
        mixer(SinkAttention, score_bias=bias)
    with pytest.raises(ValueError, match="score_bias is not supported beside soft_cap"):
        mixer(SoftCappedAttention, soft_cap=1.0, score_bias=bias)
    with pytest.raises(ValueError, match=r"soft_cap = 0 must be positive.*--model.soft-cap"):
        mixer(SoftCappedAttention, soft_cap=0)


def test_an_open_gate_is_attention_without_one_and_a_shut_gate_is_silence():
    gated, x = mixer(GatedAttention, qkv_bias=True)
    plain, _ = mixer(qkv_bias=True)
    plain.load_state_dict(gated.state_dict(), strict=False)
    with torch.no_grad():
        gated.gate_proj.weight.zero_()
        gated.gate_proj.bias.fill_(40)
        torch.testing.assert_close(gated(x, POSITIONS), plain(x, POSITIONS), rtol=0, atol=1e-12)
        gated.gate_proj.bias.fill_(-40)
        torch.testing.assert_close(gated(x, POSITIONS), torch.zeros_like(x), rtol=0, atol=1e-12)


SIZES = {"hidden_size": 24, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 2}
NO_ROTATION = (torch.ones(1, T, 1, dtype=torch.float64), torch.zeros(1, T, 1, dtype=torch.float64))  # cos 0, sin 0


def theirs(family, **config):
    """A re-drawn attention layer of transformers in eager mode, its configuration and the classes of its family."""
    transformers = pytest.importorskip("transformers")
    module = __import__(f"transformers.models.{family}.modeling_{family}", fromlist=["*"])
    prefix = {"mistral": "Mistral", "gpt_oss": "GptOss", "gemma2": "Gemma2", "qwen3_next": "Qwen3Next"}[family]
    config = getattr(transformers, f"{prefix}Config")(**SIZES, **config)
    config._attn_implementation = "eager"
    torch.manual_seed(1)
    layer = getattr(module, f"{prefix}Attention")(config, layer_idx=0).double().eval()
    redraw(layer)
    return layer, config


def run(layer, config, x):
    """Their layer, under their own mask, without rotation."""
    from transformers import masking_utils

    windowed = getattr(layer, "sliding_window", None) or getattr(config, "sliding_window", None)
    make_mask = masking_utils.create_sliding_window_causal_mask if windowed else masking_utils.create_causal_mask
    mask = make_mask(config=config, inputs_embeds=x, attention_mask=None, past_key_values=None)
    return layer(x, position_embeddings=NO_ROTATION, attention_mask=mask)[0]


def ours(Mixer, state, **options):
    layer, x = mixer(Mixer, n_kv_heads=2, head_dim=8, **options)
    layer.load_state_dict(state)
    return layer(x, POSITIONS), x


def test_a_sliding_window_equals_mistral():
    layer, config = theirs("mistral", sliding_window=5)
    y, x = ours(MultiHeadAttention, layer.state_dict(), mask=masks.Window(5))
    torch.testing.assert_close(y, run(layer, config, x), rtol=0, atol=1e-6)  # they take the softmax in fp32


def test_sinks_with_a_window_equal_gpt_oss():
    layer, config = theirs("gpt_oss", sliding_window=5, attention_bias=True)
    y, x = ours(SinkAttention, layer.state_dict(), mask=masks.Window(5), qkv_bias=True, o_bias=True)
    torch.testing.assert_close(y, run(layer, config, x), rtol=0, atol=1e-10)


def test_soft_capping_with_a_window_equals_gemma_2():
    layer, config = theirs("gemma2", sliding_window=5, attn_logit_softcapping=0.8, query_pre_attn_scalar=3)
    y, x = ours(SoftCappedAttention, layer.state_dict(), soft_cap=0.8, scale=3**-0.5, mask=masks.Window(5))
    torch.testing.assert_close(y, run(layer, config, x), rtol=0, atol=1e-6)  # they take the softmax in fp32


def test_a_gate_equals_qwen3_next():
    layer, config = theirs("qwen3_next")
    state = layer.state_dict()
    q_and_gate = state.pop("q_proj.weight").unflatten(0, (6, 2, 8))  # for each head, first its query, then its gate
    state["q_proj.weight"], state["gate_proj.weight"] = q_and_gate[:, 0].flatten(0, 1), q_and_gate[:, 1].flatten(0, 1)
    norm = type(layer.q_norm)
    y, x = ours(GatedAttention, state, qk_norm=lambda width: norm(width, eps=config.rms_norm_eps))
    torch.testing.assert_close(y, run(layer, config, x), rtol=0, atol=1e-5)  # they normalise in fp32


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("name", "soft_cap"), [*((name, None) for name in PATTERNS), ("window", 0.8)])
def test_flex_attention_equals_the_mask(name, soft_cap):
    """Its uncompiled form, which runs on any machine without gradients: the functions handed to it are right."""
    visible, _ = PATTERNS[name]
    mask = masks.visibility(visible, POSITIONS, POSITIONS)
    q, k, v = [x.detach() for x in random_qkv(6, 2, head_dim=16, v_dim=16, dtype=torch.float32)]
    if soft_cap is None:
        heads, expected = flex_attention(q, k, v, visible, 0.5), explicit_attention(q, k, v, mask, 0.5)
    else:
        heads = flex_attention(q, k, v, visible, 0.5, soft_cap)
        expected = explicit_attention(q, k, v, mask, 0.5, soft_cap=soft_cap)
    torch.testing.assert_close(heads, expected, rtol=0, atol=1e-5)


# T = 500 is four blocks of 128: some that a block of queries sees in full, some in part, and some not at all
LONG = {
    "window": (masks.Window(256), {"full", "partial", "skipped"}),
    "big bird": (
        BigBird(block_size=128, n_global=1, n_window=1, n_random=1, layer=1),
        {"full", "partial", "skipped"},
    ),
    "strided": (masks.Strided(6), {"partial", "skipped"}),
}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", LONG)
def test_flex_attention_over_several_blocks_equals_the_mask_in_values_and_gradients(name, monkeypatch):
    """Uncompiled: torch forbids gradients on a CPU, since its CPU kernel has none, but this form can compute them."""
    monkeypatch.setattr(flex.torch_flex, "_validate_device", lambda *_: None)
    visible, _ = LONG[name]
    positions = torch.arange(500)
    q, k, v = random_qkv(6, 2, queries=500, keys=500, head_dim=16, v_dim=16, dtype=torch.float32)
    expected = explicit_attention(q, k, v, masks.visibility(visible, positions, positions), 0.5)
    assert_same(flex.flex_attention(q, k, v, visible, 0.5), expected, q, k, v, atol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("n_axes", [3, 4])
def test_flex_attention_with_a_bias_equals_the_mask_in_values_and_gradients(n_axes, monkeypatch):
    monkeypatch.setattr(flex.torch_flex, "_validate_device", lambda *_: None)
    visible, positions = masks.Window(256), torch.arange(500)
    q, k, v = random_qkv(6, 2, queries=500, keys=500, head_dim=16, v_dim=16, dtype=torch.float32)
    bias = torch.randn((2, 6, 500, 500)[4 - n_axes :], requires_grad=True)
    mask = masks.visibility(visible, positions, positions)
    ours = flex.flex_attention(q, k, v, visible, 0.5, bias=bias)
    assert_same(ours, explicit_attention(q, k, v, mask, 0.5, bias=bias), q, k, v, bias, atol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_with_sinks_equals_the_equation_in_values_and_gradients(monkeypatch):
    monkeypatch.setattr(flex.torch_flex, "_validate_device", lambda *_: None)
    visible, positions = masks.Window(256), torch.arange(500)
    q, k, v = random_qkv(6, 2, queries=500, keys=500, head_dim=16, v_dim=16, dtype=torch.float32)
    sinks = (4 * torch.randn(6)).requires_grad_()
    expected = explicit_attention(q, k, v, masks.visibility(visible, positions, positions), 0.5, sinks=sinks)
    assert_same(flex.flex_attention(q, k, v, visible, 0.5, sinks=sinks), expected, q, k, v, sinks, atol=1e-5)


@pytest.mark.parametrize("name", LONG)
def test_blocks_that_flex_attention_sees_in_full_in_part_or_not_at_all_make_up_the_mask(name):
    visible, kinds = LONG[name]
    positions, blocks = torch.arange(500), [slice(i, i + 128) for i in range(0, 500, 128)]
    lists = block_mask(visible, 500, torch.device("cpu"))
    for side in ("kv", "q"):  # for each block of queries those of keys, and the other way round for the backward pass
        seen, found = torch.zeros(500, 500, dtype=torch.bool), {"full": 0, "partial": 0}
        for kind, prefix in (("full", f"full_{side}"), ("partial", side)):
            numbers, indices = getattr(lists, f"{prefix}_num_blocks")[0, 0], getattr(lists, f"{prefix}_indices")[0, 0]
            for i, (number, others) in enumerate(zip(numbers.tolist(), indices.tolist(), strict=True)):
                for j in others[:number]:
                    q, k = (blocks[i], blocks[j]) if side == "kv" else (blocks[j], blocks[i])
                    part = masks.visibility(visible, positions[q], positions[k])
                    seen[q, k] = torch.ones_like(part) if kind == "full" else part
                    found[kind] += 1
        found["skipped"] = len(blocks) ** 2 - sum(found.values())
        assert torch.equal(seen, masks.visibility(visible, positions, positions))
        assert {kind for kind, number in found.items() if number} == kinds


def test_flex_attention_compiles_a_kernel_for_each_of_many_masks_and_fails_rather_than_stop_compiling(monkeypatch):
    """With a compiler that only counts: the limit is lifted in every thread, as checkpointing needs, and only here."""
    counter = CompileCounter()
    compile = partial(torch.compile, backend=counter)
    monkeypatch.setattr(flex.torch, "compile", compile)
    monkeypatch.setattr(flex.torch_flex, "flex_attention", flex.compiled.__wrapped__())  # what CUDA would be given
    q, k, v = (x.detach() for x in random_qkv(6, 2, head_dim=16, v_dim=16, dtype=torch.float32))
    limit = torch._dynamo.config.recompile_limit
    layers = [
        BigBird(block_size=3, n_global=1, n_window=2, n_random=2, seed=5, layer=layer) for layer in range(limit + 4)
    ]

    def attend_to_all():
        for visible in layers:
            heads = flex.flex_attention(q, k, v, visible, 0.5)
            mask = masks.visibility(visible, POSITIONS, POSITIONS)
            torch.testing.assert_close(heads, explicit_attention(q, k, v, mask, 0.5), rtol=0, atol=1e-5)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(attend_to_all).result()
    assert counter.frame_count == len(layers)
    attend_to_all()
    assert counter.frame_count == len(layers)
    assert torch._dynamo.config.recompile_limit == limit
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        flex.torch_flex.flex_attention(q, k, v, None, flex.block_mask(masks.Window(9), T, q.device), 0.5, True)


def test_flex_attention_is_tried_with_what_it_will_be_given(monkeypatch):
    tried = []

    def fails_when_shared(q, k, v, visible, bias, sinks):
        extras = [x for x in (bias, sinks) if x is not None]
        tried.append(tuple(x.shape for x in (q, k, *extras)))
        if q.shape[1] != k.shape[1]:
            raise RuntimeError("out of shared memory")
        return q + k + v + sum(x.sum() for x in extras)

    monkeypatch.setattr(flex, "flex_attention", fails_when_shared)
    compiles = partial(flex.compiles.__wrapped__, torch.device("cpu"), torch.float32, 16)
    one, two = (1, 1, 128, 16), (1, 2, 128, 16)
    assert compiles(shared=False)
    assert compiles(shared=False, biased=3)
    assert compiles(shared=False, biased=4)
    assert compiles(shared=False, with_sinks=True)
    with pytest.warns(UserWarning, match="masks are used instead: out of shared memory"):
        assert not compiles(shared=True)
    assert tried == [(one, one), (one, one, (1, 128, 128)), (one, one, (1, 1, 128, 128)), (one, one, (1,)), (two, one)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention's kernels need a CUDA device")
@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("name", PATTERNS)
def test_flex_attention_on_cuda_equals_the_mask_in_values_and_gradients(name, head_dim):
    visible, _ = PATTERNS[name]
    q, k, v = [
        x.detach().cuda().requires_grad_()
        for x in random_qkv(6, 2, head_dim=head_dim, v_dim=head_dim, dtype=torch.float32)
    ]
    assert flex_serves(q, k), "this GPU cannot compile FlexAttention: training falls back to masks"
    positions = POSITIONS.cuda()
    expected = explicit_attention(q, k, v, masks.visibility(visible, positions, positions))
    assert_same(attend(q, k, v, whole(device="cuda"), visible), expected, q, k, v, atol=2e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention's kernels need a CUDA device")
@pytest.mark.parametrize("n_axes", [3, 4])
def test_flex_attention_on_cuda_with_a_bias_equals_the_mask_in_values_and_gradients(n_axes):
    q, k, v = [x.detach().cuda().requires_grad_() for x in random_qkv(6, 2, head_dim=32, v_dim=32, dtype=torch.float32)]
    bias = torch.randn((2, 6, T, T)[4 - n_axes :], device="cuda", requires_grad=True)
    assert flex_serves(q, k, bias), "this GPU cannot compile FlexAttention: training falls back to masks"
    positions = POSITIONS.cuda()
    mask = masks.visibility(masks.causal, positions, positions)
    ours = attend(q, k, v, whole(device="cuda"), bias=lambda *_: bias)
    assert_same(ours, explicit_attention(q, k, v, mask, bias=bias), q, k, v, bias, atol=2e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention's kernels need a CUDA device")
def test_flex_attention_on_cuda_with_sinks_equals_the_equation_in_values_and_gradients():
    q, k, v = [x.detach().cuda().requires_grad_() for x in random_qkv(6, 2, head_dim=32, v_dim=32, dtype=torch.float32)]
    sinks = (4 * torch.randn(6, device="cuda")).requires_grad_()
    assert flex_serves(q, k, sinks=sinks), "this GPU cannot compile FlexAttention: training falls back to masks"
    positions, visible = POSITIONS.cuda(), masks.Window(5)
    expected = explicit_attention(q, k, v, masks.visibility(visible, positions, positions), 0.5, sinks=sinks)
    assert_same(flex_attention(q, k, v, visible, 0.5, sinks=sinks), expected, q, k, v, sinks, atol=2e-2)
