"""Learned sparse attention: NSA and MoBA as loops over queries, closed cases, caches, and what has no gradient."""

import math
import re

import pytest
import torch
from conftest import tiny_model
from test_attention import mixer, step_by_step
from torch.utils.flop_counter import FlopCounterMode

from llm.modules.attention.multi_head import MultiHeadAttention
from llm.modules.masks import Window
from llm.modules.position_encoding.rope import RoPE
from llm.modules.sparse import chosen, native
from llm.modules.sparse.block_mixture import BlockMixtureAttention
from llm.modules.sparse.chosen import attend_to_chosen, mean_chosen
from llm.modules.sparse.native import NativeSparseAttention
from llm.modules.sparse.summaries import finished

T = 40
POSITIONS = torch.arange(T)
NATIVE = dict(n_kv_heads=3, compress_size=6, compress_stride=3, select_size=6, n_selected=4, window_size=7)
PARTS = [[1] * T, [T], [11, 1, 1, 20, 1, 6], [3, 30, 7]]


def softmax_mean(q, keys, values, scale):
    """One query over lists of keys and values; no key: zeros."""
    if not len(keys):
        return torch.zeros_like(q)
    weights = torch.stack([scale * q @ k for k in keys]).softmax(0)
    return sum(w * v for w, v in zip(weights, values, strict=True))


@torch.no_grad()
def block_mixture_by_loops(layer, x):
    """MoBA as its docstring says it: for each text, head and query the list of tokens that it attends to."""
    q, k, v = layer.project(x, torch.arange(x.shape[1]))
    size, heads = layer.block_size, torch.zeros_like(q)
    for b in range(len(x)):
        for h in range(q.shape[2]):
            g = h * k.shape[2] // q.shape[2]
            for i in range(x.shape[1]):
                own = i // size
                affinity = {j: q[b, i, h] @ k[b, j * size : (j + 1) * size, g].mean(0) for j in range(own)}
                best = sorted(affinity, key=affinity.get, reverse=True)[: layer.top_k - 1]
                seen = [t for j in [*best, own] for t in range(j * size, min((j + 1) * size, i + 1))]
                heads[b, i, h] = softmax_mean(
                    q[b, i, h], k[b, seen, g].unbind(), v[b, seen, g].unbind(), q.shape[-1] ** -0.5
                )
    return layer.output(heads.transpose(1, 2), x)


@pytest.mark.parametrize(("block_size", "top_k"), [(5, 3), (8, 2), (1, 4), (16, 2), (7, 1)])
def test_moba_is_the_papers_rule_written_as_loops(block_size, top_k):
    layer, x = mixer(BlockMixtureAttention, n_kv_heads=2, block_size=block_size, top_k=top_k)
    torch.testing.assert_close(layer(x, POSITIONS), block_mixture_by_loops(layer, x), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("block_size", "top_k"), [(5, 8), (5, 50), (40, 1), (64, 1), (1, 40)])
def test_moba_with_blocks_for_everything_is_full_attention(block_size, top_k):
    layer, x = mixer(BlockMixtureAttention, n_kv_heads=2, block_size=block_size, top_k=top_k)
    full, _ = mixer(MultiHeadAttention, n_kv_heads=2)
    full.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x, POSITIONS), full(x, POSITIONS), rtol=0, atol=1e-10)


def test_moba_scores_blocks_in_fp32_also_in_bf16_training():
    layer = BlockMixtureAttention(d_model=64, n_heads=1, block_size=4, top_k=6)
    q, means = (torch.randn(1, 1, n, 64).bfloat16() for n in (400, 100))
    positions = torch.arange(400)[None]
    expected, _ = layer.choose(q.float(), means.float(), positions)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = layer.choose(q, means, positions)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("padding", [0, 7])
@pytest.mark.parametrize("make", ["moba", "nsa", "nsa with rope"])
def test_a_cache_in_any_parts_with_or_without_padding_equals_recomputing(make, padding, parts):
    if make == "moba":
        layer, x = mixer(BlockMixtureAttention, n_kv_heads=2, block_size=5, top_k=3)
    else:
        rope = RoPE(4, 100.0) if "rope" in make else None
        layer, x = mixer(NativeSparseAttention, **NATIVE, rope=rope)
    ours = step_by_step(layer, x, parts, padding=torch.tensor([0, padding]))
    torch.testing.assert_close(ours[0], layer(x[:1], POSITIONS)[0], rtol=0, atol=1e-10)
    torch.testing.assert_close(
        ours[1, padding:], layer(x[1:, padding:], POSITIONS[: T - padding])[0], rtol=0, atol=1e-10
    )


@torch.no_grad()
def native_by_loops(layer, x):
    """NSA as its docstring says it, for each text, group of heads and query."""
    length, width, shared = x.shape[1], layer.head_dim, layer.n_heads // layer.n_kv_heads
    q = layer.q_proj(x).unflatten(-1, (-1, width))
    k, v = (project(x).unflatten(-1, (3, -1, width)) for project in (layer.k_proj, layer.v_proj))
    gates = torch.sigmoid(layer.gate_proj(x)).unflatten(-1, (3, -1))
    size, stride, select = layer.size, layer.stride, layer.select_size
    heads = torch.zeros_like(q)

    def compress(module, tokens):
        return module.block_proj.weight @ torch.cat(
            [token + place for token, place in zip(tokens, module.place, strict=True)]
        )

    for b in range(len(x)):
        for g in range(layer.n_kv_heads):
            starts = range(0, length - size + 1, stride)
            summaries = [
                (
                    compress(layer.compress_k, k[b, s : s + size, 0, g]),
                    compress(layer.compress_v, v[b, s : s + size, 0, g]),
                )
                for s in starts
            ]
            for i in range(length):
                seen = [c for c, s in enumerate(starts) if s + size - 1 <= i]
                importance = dict.fromkeys(range(i // select + 1), 0.0)
                for h in range(g * shared, (g + 1) * shared):
                    keys, values = [summaries[c][0] for c in seen], [summaries[c][1] for c in seen]
                    heads[b, i, h] += gates[b, i, 0, h] * softmax_mean(q[b, i, h], keys, values, width**-0.5)
                    if seen:
                        p = torch.stack([q[b, i, h] @ key * width**-0.5 for key in keys]).softmax(0)
                        for c in seen:
                            for token in range(c * stride, c * stride + size, stride):
                                if token // select in importance:
                                    importance[token // select] += p[c].item()
                for j in importance:
                    if j in (0, i // select, i // select - 1):
                        importance[j] = math.inf
                best = sorted(importance, key=importance.get, reverse=True)[: layer.n_selected]
                tokens = [t for j in best for t in range(j * select, (j + 1) * select) if t <= i]
                near = list(range(max(0, i - layer.mask.size + 1), i + 1))
                for h in range(g * shared, (g + 1) * shared):
                    for branch, which in ((1, tokens), (2, near)):
                        mean = softmax_mean(q[b, i, h], k[b, which, branch, g], v[b, which, branch, g], width**-0.5)
                        heads[b, i, h] += gates[b, i, branch, h] * mean
    return layer.o_proj(heads.flatten(2))


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"compress_stride": 6},
        {"compress_stride": 2, "select_size": 4, "n_selected": 5},
        {"compress_size": 9, "select_size": 3, "n_selected": 3, "n_kv_heads": 6},
        {"compress_size": 3, "select_size": 9, "n_kv_heads": 1},
    ],
)
def test_nsa_is_the_papers_rule_written_as_loops(sizes):
    layer, x = mixer(NativeSparseAttention, **{**NATIVE, **sizes})
    torch.testing.assert_close(layer(x, POSITIONS), native_by_loops(layer, x), rtol=0, atol=1e-10)


def test_nsa_in_parts_is_the_whole_and_keeps_no_scores(monkeypatch):
    layer, x = mixer(NativeSparseAttention, **{**NATIVE, "compress_stride": 1, "window_size": 1})
    x.requires_grad_()
    whole = layer(x, POSITIONS)
    expected = torch.autograd.grad(whole.square().sum(), (x, *layer.parameters()))
    monkeypatch.setattr(native, "QUERIES", 3)  # the first part comes before the first block is finished
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda y: kept.append(y.numel()) or y, lambda y: y):
        parts = layer(x, POSITIONS)
    n_scores = 2 * layer.n_heads * T * (T - NATIVE["compress_size"] + 1)
    assert max(kept) < n_scores
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-10)
    found = torch.autograd.grad(parts.square().sum(), (x, *layer.parameters()))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize("stride", [1, 2, 4])
@pytest.mark.parametrize("select_size", [4, 8])
def test_nsa_is_the_same_loops_on_texts_of_no_and_of_few_compressed_blocks(stride, select_size):
    sizes = dict(compress_size=4, compress_stride=stride, select_size=select_size, n_selected=3)
    layer, x = mixer(NativeSparseAttention, **{**NATIVE, **sizes})
    for length in range(1, 10):
        text = x[:, :length]
        ours = layer(text, POSITIONS[:length])
        torch.testing.assert_close(ours, native_by_loops(layer, text), rtol=0, atol=1e-10)


@torch.no_grad()
def test_nsa_with_one_branch_open_is_full_attention_or_a_window():
    """The selection of everything is full attention; the window alone is a window."""
    layer, x = mixer(NativeSparseAttention, **{**NATIVE, "n_selected": 7, "n_kv_heads": 6})
    k, v = (p.weight.unflatten(0, (3, -1)) for p in (layer.k_proj, layer.v_proj))
    for branch, mask in ((1, None), (2, Window(7))):
        other, _ = mixer(MultiHeadAttention, **({"mask": mask} if mask else {}))
        state = {"q_proj.weight": layer.q_proj.weight, "o_proj.weight": layer.o_proj.weight}
        other.load_state_dict(state | {"k_proj.weight": k[branch], "v_proj.weight": v[branch]})
        x[..., -1] = 1  # a channel for the gates
        layer.gate_proj.weight.zero_().unflatten(0, (3, -1))[:, :, -1] = -1e3
        layer.gate_proj.weight.unflatten(0, (3, -1))[branch, :, -1] = 1e3
        torch.testing.assert_close(layer(x, POSITIONS), other(x, POSITIONS), rtol=0, atol=1e-10)


def test_the_choice_has_no_gradient_and_everything_that_is_chosen_has_one():
    layer, x = mixer(NativeSparseAttention, **NATIVE)
    seen = []
    choose = layer.select
    layer.select = lambda importance, *rest: seen.append(importance) or choose(importance, *rest)
    layer(x, POSITIONS).sum().backward()
    assert not seen[0].requires_grad
    assert all(p.grad.any() for p in layer.parameters())
    layer, x = mixer(BlockMixtureAttention, block_size=5, top_k=3)
    layer(x, POSITIONS).sum().backward()
    assert all(p.grad.any() for p in layer.parameters())
    means = torch.randn(2, 6, 8, 4, dtype=torch.float64, requires_grad=True)
    index, shown = layer.choose(torch.randn(2, 6, T, 4, dtype=torch.float64), means, POSITIONS.expand(2, T))
    assert not index.requires_grad and not shown.requires_grad


def test_nsa_without_summaries_to_teach_it_gets_no_gradient_for_them():
    """A text shorter than a compressed block has none."""
    layer, x = mixer(NativeSparseAttention, **NATIVE)
    layer(x[:, :5], POSITIONS[:5]).sum().backward()
    without = {name for name, p in layer.named_parameters() if p.grad is None or not p.grad.any()}
    assert without == {f"compress_{kind}.{name}" for kind in "kv" for name in ("place", "block_proj.weight")}


def test_a_block_is_finished_once_by_whatever_parts():
    for size, stride in ((6, 3), (5, 5), (4, 2), (1, 1)):
        for parts in PARTS:
            start, found = -3, []
            for part in parts:
                positions = torch.arange(start, start + part)[None]
                numbers, done = finished(positions, size, stride)
                assert numbers.shape[1] == part // stride + 1
                found += numbers[done].tolist()
                start += part
            assert found == list(range((T - 3 - size) // stride + 1))


@pytest.mark.parametrize(("n_queries", "length", "way"), [(600, 600, "copies"), (281, 281, "all"), (3, 281, "all")])
def test_chosen_keys_are_looked_up_or_hidden_in_parts_and_computed_again_for_the_gradient(
    n_queries, length, way, monkeypatch
):
    monkeypatch.setattr(chosen, {"copies": "attend_to_all", "all": "attend_to_copies"}[way], None)
    torch.manual_seed(0)
    q = torch.randn(2, 4, n_queries, 8, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, length, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    index = torch.rand(2, 2, n_queries, length).argsort(-1)[..., :9]
    shown = torch.rand(index.shape) < 0.8
    if n_queries == length:
        shown &= index <= torch.arange(length)[:, None]
    shown[:, 1, 2] = False
    seen = torch.zeros(2, 2, n_queries, length, dtype=torch.bool).scatter(-1, index, shown).repeat_interleave(2, 1)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        ours = attend_to_chosen(q, k, v, index, shown, 0.3)
    assert n_queries <= chosen.QUERIES or max(kept) <= max(q.numel(), index.numel())
    scores = (q @ k.transpose(1, 2).repeat_interleave(2, 1).mT * 0.3).masked_fill(~seen, -torch.inf)
    expected = scores.softmax(-1).nan_to_num() @ v.transpose(1, 2).repeat_interleave(2, 1)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    weights = torch.randn_like(ours)
    for mine, other in zip(
        *(torch.autograd.grad((y * weights).sum(), (q, k, v)) for y in (ours, expected)), strict=True
    ):
        torch.testing.assert_close(mine, other.nan_to_num(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("context", [1, 7, 24, 40, 41])
@pytest.mark.parametrize(("size", "n_blocks"), [(8, 1), (8, 3), (5, 4), (1, 6), (64, 2)])
def test_chosen_keys_are_counted_as_the_layer_chooses_them(context, size, n_blocks):
    layer, _ = mixer(BlockMixtureAttention, block_size=size, top_k=n_blocks)
    n_means = context // size
    q, means = torch.randn(1, 8, context, 4).double(), torch.randn(1, 8, n_means, 4).double()
    _, shown = layer.choose(q, means, torch.arange(context)[None])
    assert mean_chosen(context, size, n_blocks) == pytest.approx(shown.sum().item() / 8 / context)


def test_attention_to_n_chosen_keys_computes_n_scores_a_query_whatever_the_length():
    """Two products forward, the same two again and four more backward."""
    for length in (300, 900):
        q = torch.randn(1, 4, length, 8, requires_grad=True)
        k, v = (torch.randn(1, length, 2, 8, requires_grad=True) for _ in range(2))
        index = torch.randint(length, (1, 2, length, 9))
        with FlopCounterMode(display=False) as counter:
            attend_to_chosen(q, k, v, index, index >= 0, 0.3).sum().backward()
        assert counter.get_total_flops() == 8 * 2 * 4 * length * 9 * 8


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mixer(NativeSparseAttention, **{**NATIVE, "compress_stride": 4}), "compress_stride = 4"),
        (lambda: mixer(NativeSparseAttention, **{**NATIVE, "n_selected": 2}), "n_selected = 2"),
        (lambda: mixer(BlockMixtureAttention, block_size=0, top_k=1), "block_size = 0"),
        (lambda: tiny_model("native_sparse", compress_stride=3), "compress_stride = 3"),
    ],
)
def test_impossible_sizes_are_refused(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_a_summary_is_written_when_the_last_token_of_its_block_arrives_and_not_before():
    layer, x = mixer(BlockMixtureAttention, block_size=5, top_k=3)
    cache = layer.make_cache(2, T)
    for start, stop in ((0, 3), (3, 4), (4, 5), (5, 14), (14, 15), (15, T)):
        layer(x[:, start:stop], torch.arange(start, stop).expand(2, -1), cache)
        written = cache["means"][:, :-1].flatten(2).any(-1)
        assert torch.equal(written, (torch.arange(T // 5) < stop // 5).expand(2, -1))
