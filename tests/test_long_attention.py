"""Long texts: blocks of queries whose keys are gathered, scores computed twice, biases that are channels. All of
them equal the equation, in values and gradients, at lengths that no block divides."""

import pytest
import torch
from test_attention import PATTERNS, assert_same, random_qkv, whole
from torch.utils.flop_counter import FlopCounterMode

from llm.modules import masks
from llm.modules.attention.big_bird import BigBird
from llm.modules.attention.core import explicit_attention
from llm.modules.kernels import attention, query_blocks, recomputed
from llm.modules.kernels.attention import attend, attend_by_remainder, causal_sink_attention, channel_attention
from llm.modules.kernels.gathered import gathered_attention, gathering_serves
from llm.modules.kernels.query_blocks import blocked_attention
from llm.modules.kernels.recomputed import Recomputed, recomputed_attention
from llm.modules.kernels.seen_blocks import blocks, mean_scored, places
from llm.modules.position_encoding.alibi import ALiBi
from llm.modules.position_encoding.relative import DistanceScores
from llm.modules.position_encoding.t5_bias import T5Bias

LENGTH = 601
LONG = PATTERNS | {
    "wide window": (masks.Window(300), None),
    "wide blocks": (masks.OwnBlock(200), None),
    "wide strides": (masks.Strided(150), None),
    "first and wide window": (masks.FirstAndWindow(130, 140), None),
    "far summaries": (masks.Summaries(100, 3), None),
    "wide big bird": (BigBird(block_size=40, n_global=1, n_window=2, n_random=1, layer=3), None),
}
every_mask = pytest.mark.parametrize("mask", [mask for mask, _ in LONG.values()], ids=list(LONG))


def shown(mask, length=LENGTH):
    positions = torch.arange(length)
    return masks.visibility(mask, positions, positions)


def text(dtype=torch.float64, n_kv_heads=4, v_dim=8, length=LENGTH):
    return random_qkv(n_kv_heads=n_kv_heads, queries=length, keys=length, v_dim=v_dim, dtype=dtype)


def t5(heads=4):
    torch.manual_seed(5)
    return T5Bias(heads, 16, 200).double()


def distance_scores(length=LENGTH):
    generator = torch.Generator().manual_seed(6)
    queries = torch.randn(2, 4, length, 8, dtype=torch.float64, generator=generator, requires_grad=True)
    r = torch.randn(4, 8, length, dtype=torch.float64, generator=generator, requires_grad=True)
    return DistanceScores(queries, r, 0.3)


@every_mask
@pytest.mark.parametrize("length", [1, 128, 129, LENGTH])
def test_blocks_hold_every_key_that_is_seen_and_each_query_once(mask, length):
    dense, found = shown(mask, length), torch.zeros(length, length, dtype=torch.bool)
    covered = []
    for rows, keys, n_open in blocks(length, mask):
        keys = places(keys, torch.device("cpu"))
        covered += range(rows.start, rows.stop)
        needed = torch.arange(length)[keys]
        assert len(needed.unique()) == len(needed)
        found[rows, keys] = dense[rows, keys]
        assert dense[rows, keys][:, :n_open].all()
    assert covered == list(range(length))
    assert torch.equal(found, dense)


def test_blocks_hold_little_more_than_what_is_seen():
    length = 4096
    for mask, most in [
        (masks.Window(128), 256),
        (masks.FirstAndWindow(4, 128), 260),
        (masks.Summaries(128, 4), 70 + 128),
        (BigBird(block_size=128, n_global=1, n_window=1, n_random=1), 3 * 128),
    ]:
        assert masks.mean_keys(mask, length) < mean_scored(length, mask) <= most


FEW_IN_VAIN = {
    "BigBird, blocks of 64": BigBird(block_size=64, n_global=2, n_window=3, n_random=3),
    "BigBird, blocks of 32": BigBird(block_size=32, n_global=1, n_window=2, n_random=2, layer=1),
    "BigBird, blocks of 200": BigBird(block_size=200, n_global=1, n_window=1, n_random=1),
    "strided": masks.Strided(64),
    "dilated": masks.Dilated(128, 4),
}


@pytest.mark.parametrize("mask", FEW_IN_VAIN.values(), ids=FEW_IN_VAIN)
def test_masks_with_holes_compute_at_most_a_third_more_scores_than_they_show(mask):
    """Counted in the products: two of each score forward, and backward four, or five where it is computed again."""
    length, heads, width = 4096, 2, 8
    q, k, v = random_qkv(n_heads=heads, n_kv_heads=1, queries=length, keys=length, v_dim=width, dtype=torch.bfloat16)
    with FlopCounterMode(display=False) as forward:
        out = attend(q, k, v, whole(length), mask)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    computed = forward.get_total_flops() / (2 * 2 * width * len(q) * heads * length)
    shown = masks.mean_keys(mask, length)
    assert shown < computed <= 4 / 3 * shown
    assert backward.get_total_flops() / forward.get_total_flops() in (2, 2.5)


def test_keys_are_gathered_where_blocks_of_them_are_seen_whole():
    """Where four of 128 keys are seen, a block would hold them in vain."""
    q = torch.empty(1, 1, 4096, 8)
    assert gathering_serves(q, masks.Window(128), None)
    assert not gathering_serves(q, masks.Summaries(128, 4), None)
    assert not gathering_serves(q, masks.Window(128), torch.zeros(1))


def test_blocks_of_queries_that_see_other_keys_are_joined_only_where_they_are_tiny_or_the_text_is_short():
    def sizes(block_size, length):
        mask = BigBird(block_size=block_size, n_global=1, n_window=1, n_random=1)
        return [rows.stop - rows.start for rows, *_ in blocks(length, mask)]

    assert sizes(64, 640) == [64] * 10
    assert sizes(64, 512) == [128] * 4
    assert sizes(200, 700) == [128, 72] * 3 + [100]
    assert sizes(5, 600) == [35] * 17 + [5]


@every_mask
@pytest.mark.parametrize("way", [blocked_attention, gathered_attention, recomputed_attention])
def test_blocks_of_a_long_text_equal_the_equation(mask, way):
    q, k, v = text(v_dim=5)
    assert_same(way(q, k, v, mask, 0.7), explicit_attention(q, k, v, shown(mask), 0.7), q, k, v)


@every_mask
def test_attention_to_a_long_text_equals_the_equation_and_never_writes_the_mask(mask, monkeypatch):
    monkeypatch.setattr(attention, "visibility", only_of_short_texts)
    q, k, v = text(n_kv_heads=2)
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)
    expected = explicit_attention(q, k, v, shown(mask), 0.7)
    assert_same(attend(q, k, v, whole(LENGTH), mask, scale=0.7), expected, q, k, v)
    expected = explicit_attention(q, k, v, shown(mask), sinks=sinks)
    assert_same(attend(q, k, v, whole(LENGTH), mask, sinks=sinks), expected, q, k, v, sinks)
    expected = explicit_attention(q, k, v, shown(mask), soft_cap=0.8)
    assert_same(attend(q, k, v, whole(LENGTH), mask, soft_cap=0.8), expected, q, k, v)
    assert_same(attend(q, k, v, whole(LENGTH), mask, bias=ALiBi(4)), with_bias(q, k, v, mask, ALiBi(4)), q, k, v)


def only_of_short_texts(mask, q_pos, k_pos):
    assert len(k_pos) <= 512, "a mask was written out for a long text"
    return masks.visibility(mask, q_pos, k_pos)


def with_bias(q, k, v, mask, bias, **options):
    positions = torch.arange(q.shape[2])
    return explicit_attention(q, k, v, shown(mask, q.shape[2]), bias=bias(positions, positions), **options)


@every_mask
@pytest.mark.parametrize("make", [t5, distance_scores])
def test_a_learned_bias_is_computed_by_blocks_and_gets_its_gradient(mask, make, monkeypatch):
    monkeypatch.setattr(attention, "visibility", only_of_short_texts)
    q, k, v = text(n_kv_heads=2)
    bias = make()
    expected = with_bias(q, k, v, mask, bias)
    assert_same(attend(q, k, v, whole(LENGTH), mask, bias=bias), expected, q, k, v, *bias.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("what", ["plain", "alibi", "t5", "distances", "cap", "sinks"])
@pytest.mark.parametrize(
    "mask", [masks.causal, masks.Window(70), LONG["wide big bird"][0]], ids=["causal", "window", "bird"]
)
def test_rounding_is_that_of_the_dtype(mask, what, dtype):
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in text())
    distances = distance_scores()
    sinks = torch.randn(4, requires_grad=True)
    options = {
        "plain": {},
        "alibi": {"bias": ALiBi(4)},
        "t5": {"bias": t5().float()},
        "distances": {"bias": DistanceScores(distances.queries.to(dtype), distances.r.to(dtype), 0.3)},
        "cap": {"soft_cap": 2.0},
        "sinks": {"sinks": sinks},
    }[what]
    ours = attend(q, k, v, whole(LENGTH), mask, **options)
    assert ours.dtype is dtype
    exact = dict(options)
    if "bias" in exact:
        bias, positions = exact.pop("bias"), torch.arange(LENGTH)
        wide = bias._replace(queries=bias.queries.double(), r=bias.r.double()) if what == "distances" else bias
        exact["bias"] = wide(positions, positions).double()
    expected = explicit_attention(q.double(), k.double(), v.double(), shown(mask), **exact)
    gradients = [torch.autograd.grad(y.double().square().sum(), (q, k, v)) for y in (ours, expected)]
    limit = 3e-5 if dtype is torch.float32 else 0.02
    for mine, reference in zip((ours, *gradients[0]), (expected, *gradients[1]), strict=True):
        assert (mine.double() - reference.double()).norm() < limit * reference.double().norm()


OTHERS = [
    masks.FirstAndWindow(3, 70),
    masks.OwnBlock(40),
    masks.Strided(7),
    masks.Dilated(5, 7),
    masks.Summaries(100, 3),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", [attend, blocked_attention, recomputed_attention])
@pytest.mark.parametrize("mask", [masks.Window(70), *OTHERS], ids=str)
def test_rounding_of_every_way_is_that_of_the_dtype(mask, way, dtype):
    """Called directly, the blocks compute in bf16 also on a CPU that emulates it."""
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in text())
    ours = way(q, k, v, whole(LENGTH), mask) if way is attend else way(q, k, v, mask)
    expected = explicit_attention(q.double(), k.double(), v.double(), shown(mask))
    gradients = [torch.autograd.grad(y.double().square().sum(), (q, k, v)) for y in (ours, expected)]
    limit = 3e-5 if dtype is torch.float32 else 0.02
    for mine, reference in zip((ours, *gradients[0]), (expected, *gradients[1]), strict=True):
        assert mine.dtype is dtype and (mine.double() - reference.double()).norm() < limit * reference.double().norm()


@pytest.mark.parametrize("length", [1, 5, LENGTH])
def test_slopes_as_channels_and_a_first_sink_equal_the_equation(length):
    q, k, v = text(n_kv_heads=2, v_dim=5, length=length)
    positions, leaves = torch.arange(length), (q, k, v) if length > 1 else (v,)
    ours = channel_attention(q, k, v, *ALiBi(4).channels(positions), 0.3)
    assert_same(ours, with_bias(q, k, v, masks.causal, ALiBi(4), scale=0.3), *leaves)
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)
    ours, leaves = causal_sink_attention(q, k, v, sinks, 0.3), (q, k, v, sinks)
    assert_same(ours, explicit_attention(q, k, v, shown(masks.causal, length), 0.3, sinks=sinks), *leaves)


def test_slopes_in_bf16_are_exact_to_sixteen_bits_at_65536_tokens():
    by_head, by_key = ALiBi(12).channels(torch.arange(2**16))
    assert torch.equal(by_key.bfloat16().long(), by_key)
    assert torch.equal((by_key.double() @ torch.tensor([256.0, 1.0]).double()).long(), torch.arange(2**16))
    coarse = (by_head / 32**-0.5).bfloat16()
    fine = (by_head / 32**-0.5 - coarse).bfloat16()
    torch.testing.assert_close(coarse.float() + fine.float(), by_head / 32**-0.5, rtol=2**-16, atol=0)


@pytest.mark.parametrize("length", [3, 600, LENGTH])
@pytest.mark.parametrize("mask", [masks.Strided(7), masks.Dilated(5, 7)], ids=["strided", "dilated"])
def test_every_nth_token_is_a_text_of_its_own(mask, length):
    q, k, v = text(n_kv_heads=2, length=length)
    ours = attend_by_remainder(q, k, v, *mask.by_remainder(), 0.3, None)
    expected = explicit_attention(q, k, v, shown(mask, length), 0.3)
    assert_same(ours, expected, *((q, k, v) if length > 7 else (v,)))


def test_gradients_of_sinks_are_made_where_the_queries_are():
    q, k, v = (torch.randn(1, 2, 600, 8, device="meta", requires_grad=True) for _ in range(3))
    sinks = torch.zeros(2, device="meta", requires_grad=True)
    blocked_attention(q, k, v, masks.Window(16), sinks=sinks).sum().backward()
    assert sinks.grad.device.type == "meta"


def test_a_long_text_keeps_nothing_that_grows_with_its_square():
    """Of the shapes that autograd keeps, none has a length beside a length; those of a window have 127 + its width."""
    length = 1500
    for options, widest in [
        ({"mask": masks.Window(70)}, 70 + 127),
        ({"mask": masks.FirstAndWindow(3, 70)}, 73 + 127),
        ({"mask": masks.OwnBlock(70)}, 70 + 127),
        ({"mask": masks.Strided(50)}, 1500 // 50 + 50),
        ({"mask": masks.Dilated(9, 7)}, 9 * 7 + 127),
        ({"mask": LONG["wide big bird"][0]}, 5 * 40 + 127),
        ({"bias": DistanceScores(*(x.detach().float().requires_grad_() for x in distance_scores(length)[:2]), 0.3)}, 8),
        ({"soft_cap": 2.0}, 8),
        ({"bias": t5().float()}, 32),
        ({"bias": ALiBi(4)}, 24),
        ({"sinks": torch.zeros(4, requires_grad=True)}, 24),
    ]:
        q, k, v = text(torch.float32, length=length)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x.numel()) or x, lambda x: x):
            attend(q, k, v, whole(length), **options).sum().backward()
        assert max(kept) <= 2 * 4 * (length + 1) * widest


def test_masks_that_show_much_are_computed_twice_rather_than_kept(monkeypatch):
    used = []
    monkeypatch.setattr(Recomputed, "apply", lambda *args: used.append("twice") or args[2])
    monkeypatch.setattr(query_blocks.QueryBlocks, "apply", lambda *args: used.append("kept") or args[2])
    monkeypatch.setattr(attention, "gathered_attention", lambda *args: used.append("gathered") or args[2])
    q, k, v = text(torch.float32, length=3000)
    for mask in (masks.Window(128), masks.Summaries(100, 3), masks.Window(2000), masks.FirstAndWindow(4, 2000)):
        attend(q, k, v, whole(3000), mask)
    assert used == ["gathered", "kept", "twice", "twice"]
    assert recomputed.Recomputed is Recomputed


@pytest.mark.parametrize(
    "options",
    [
        {"mask": masks.Window(50)},
        {"soft_cap": 5.0},
        {"bias": t5(2)},
        {"mask": masks.Window(50), "sinks": torch.zeros(2, dtype=torch.float64, requires_grad=True)},
    ],
    ids=["window", "cap", "t5", "sinks"],
)
def test_a_compiled_long_text_holds_no_square_either_and_has_the_same_gradient(options):
    """In the pieces that torch.compile is given, no tensor has T x T numbers."""
    squares = []

    def backend(graph, inputs):
        values = [node.meta.get("example_value") for node in graph.graph.nodes]
        squares.extend(x for x in values if isinstance(x, torch.Tensor) and x.shape[-2:] == (LENGTH, LENGTH))
        return graph

    mask = options.get("mask", masks.causal)
    options = {name: value for name, value in options.items() if name != "mask"}

    def heads(q, k, v):
        return attend(2 * q, k, v, whole(LENGTH), mask, **options).sum()

    torch.compiler.reset()
    found = []
    for function in (heads, torch.compile(heads, backend=backend)):
        q, k, v = random_qkv(n_heads=2, n_kv_heads=2, queries=LENGTH, keys=LENGTH)
        found.append([total := function(q, k, v), *torch.autograd.grad(total, (q, k, v))])
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-10)
    assert not squares
