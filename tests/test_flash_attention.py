"""FlashAttention in tiles: the same numbers and gradients as the equation, whatever the tiles, without T x S scores."""

import pytest
import torch
from conftest import redraw, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from llm.models.flash_attention import FlashAttentionDecoder
from llm.modules.attention import flash
from llm.modules.attention.core import explicit_attention
from llm.modules.attention.flash import FlashAttention, flash_attention
from llm.modules.attention.multi_head import MultiHeadAttention
from llm.modules.cache import Cache, Places
from llm.modules.masks import Mask, Window, causal, everything, visibility


def whole(length):
    """Queries and keys are one text."""
    positions = torch.arange(length)
    return Places(positions, positions, whole_text=True)


TILES = pytest.mark.parametrize(("q_tile", "k_tile"), [(1, 1), (4, 4), (3, 5), (8, 2), (13, 13), (64, 5), (64, 64)])


def draw(n_q=13, n_k=13, n_heads=4, n_kv_heads=2, dtype=torch.float64):
    """Queries, keys and values of unlike widths, scores large enough for the running maximum to matter."""
    generator = torch.Generator().manual_seed(1)
    shapes = (2, n_heads, n_q, 6), (2, n_kv_heads, n_k, 6), (2, n_kv_heads, n_k, 3)
    return [(3 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype) for shape in shapes]


def values_and_gradients(attend, tensors):
    tensors = [tensor.clone().requires_grad_() for tensor in tensors]
    out = attend(*tensors)
    weights = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).view(out.shape)
    return [out.detach(), *torch.autograd.grad((out.double() * weights).sum(), tensors)]


def assert_equal_to_the_equation(tensors, places, mask, q_tile, k_tile, scale=None):
    shown = visibility(mask, places.q, places.k)
    expected = values_and_gradients(lambda q, k, v: explicit_attention(q, k, v, shown, scale), tensors)
    ours = values_and_gradients(lambda q, k, v: flash_attention(q, k, v, places, mask, scale, q_tile, k_tile), tensors)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


@TILES
@pytest.mark.parametrize("mask", [causal, everything, Window(4)])
@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_tiles_of_any_size_give_the_values_and_gradients_of_the_equation(q_tile, k_tile, mask, n_kv_heads):
    assert_equal_to_the_equation(draw(n_kv_heads=n_kv_heads), whole(13), mask, q_tile, k_tile)


@TILES
def test_more_keys_than_queries_as_behind_a_cache(q_tile, k_tile):
    places = Places(torch.arange(8, 13), torch.arange(13))
    assert_equal_to_the_equation(draw(n_q=5), places, causal, q_tile, k_tile, scale=0.3)


@TILES
def test_positions_of_each_row_with_padding_and_empty_slots(q_tile, k_tile):
    q_pos = torch.stack([torch.arange(4, 9), torch.arange(-2, 3)])
    k_pos = torch.stack([torch.arange(13) - 4, (torch.arange(13) - 2).where(torch.arange(13) < 5, -1)])
    assert_equal_to_the_equation(draw(n_q=5), Places(q_pos, k_pos), causal, q_tile, k_tile)


@TILES
def test_rows_without_keys_get_zeros_and_pass_no_gradient(q_tile, k_tile):
    tensors, blind = draw(), torch.tensor([0, 4, 5, 12])
    positions = torch.arange(13)

    class AllButTheBlindSee(Mask):
        def visible(self, q_pos, k_pos):
            return (k_pos <= q_pos) & ~torch.isin(q_pos, blind)

    out, dq, dk, dv = values_and_gradients(
        lambda q, k, v: flash_attention(q, k, v, whole(13), AllButTheBlindSee(), None, q_tile, k_tile),
        tensors,
    )
    assert not out[:, :, blind].any() and not dq[:, :, blind].any()
    mask = AllButTheBlindSee().visible(positions[:, None], positions)

    def with_zeros(q, k, v):
        seeing = mask.any(-1)[:, None]
        return explicit_attention(q, k, v, mask | ~seeing) * seeing

    expected = values_and_gradients(with_zeros, tensors)
    torch.testing.assert_close([out, dq, dk, dv], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mask", [causal, everything])
def test_the_backward_pass_is_the_derivative_of_the_forward_pass(mask):
    tensors = [(tensor[:1] / 3).requires_grad_() for tensor in draw(5, 5, 2, 1)]
    assert torch.autograd.gradcheck(lambda q, k, v: flash_attention(q, k, v, whole(5), mask, None, 2, 3), tensors)


def test_a_second_derivative_is_refused_rather_than_wrong():
    q, k, v = (tensor.requires_grad_() for tensor in draw(5, 5))
    loss = flash_attention(q, k, v, whole(5)).square().sum()
    (gradient,) = torch.autograd.grad(loss, q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_scores_of_a_thousand_do_not_overflow():
    q, k, v = draw(dtype=torch.float32)
    positions = torch.arange(13)
    out, *gradients = values_and_gradients(
        lambda q, k, v: flash_attention(q, k, v, whole(13), causal, 100.0, 4, 4), (q, k, v)
    )
    assert all(tensor.isfinite().all() for tensor in (out, *gradients))
    mask = visibility(causal, positions, positions)
    expected = explicit_attention(q.double(), k.double(), v.double(), mask, 100.0)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-2)


def test_half_precision_keeps_its_dtypes_and_its_accuracy():
    positions = torch.arange(40)
    tensors = [tensor / 3 for tensor in draw(40, 40, dtype=torch.bfloat16)]
    ours = values_and_gradients(lambda q, k, v: flash_attention(q, k, v, whole(40), causal, None, 8, 8), tensors)
    assert all(tensor.dtype is torch.bfloat16 for tensor in ours)
    mask = visibility(causal, positions, positions)
    exact = values_and_gradients(lambda q, k, v: explicit_attention(q, k, v, mask), [t.double() for t in tensors])
    for tensor, reference in zip(ours, exact, strict=True):
        error = (tensor.double() - reference).norm() / reference.norm()
        assert error < 0.01  # bf16 rounds to 1 part in 256


def test_half_precision_still_counts_beyond_256():
    q, k = torch.zeros(1, 1, 1, 2, dtype=torch.bfloat16), torch.zeros(1, 1, 1024, 2, dtype=torch.bfloat16)
    v = (torch.arange(1024) >= 512).to(torch.bfloat16).view(1, 1, 1024, 1)
    out = flash_attention(q, k, v, Places(torch.tensor([1023]), torch.arange(1024)), k_tile=1)
    assert out.item() == 0.5


def test_under_autocast_its_gradients_are_those_of_the_kernel_it_explains():
    torch.manual_seed(0)
    ours = FlashAttention(d_model=24, n_heads=4, tile_size=8)
    fused = MultiHeadAttention(d_model=24, n_heads=4)
    fused.load_state_dict(ours.state_dict())
    x, gradients = torch.randn(2, 30, 24), []
    for layer in (ours, fused):
        with torch.autocast("cpu", torch.bfloat16):
            loss = layer(x, torch.arange(30)).square().sum()
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(layer.parameters()))]))
    assert (gradients[0] - gradients[1]).norm() / gradients[1].norm() < 0.02


@pytest.mark.parametrize(("q_tile", "k_tile"), [(4, 4), (4, 3), (2, 8)])
def test_causal_tiles_above_the_diagonal_are_never_computed(monkeypatch, q_tile, k_tile):
    computed = []
    original = flash.Tiling.scores

    def spy(self, q_i, k_j, rows, columns):
        computed.append((rows.stop - 1, columns.start))
        return original(self, q_i, k_j, rows, columns)

    monkeypatch.setattr(flash.Tiling, "scores", spy)
    q, k, v = (tensor.requires_grad_() for tensor in draw(16, 16))
    flash_attention(q, k, v, whole(16), causal, None, q_tile, k_tile).sum().backward()
    assert all(first_key <= last_query for last_query, first_key in computed)
    at_or_below = sum(c <= r + q_tile - 1 for r in range(0, 16, q_tile) for c in range(0, 16, k_tile))
    assert len(computed) == 2 * at_or_below < 2 * (16 // q_tile) * -(-16 // k_tile)


class LargestTensor(TorchDispatchMode):
    """Notes how many numbers the largest tensor that any operation returns has."""

    largest = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


def saved_and_largest(attend):
    length, saved = 96, []
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, length, 4, generator=generator).requires_grad_() for _ in range(3))
    with LargestTensor() as mode:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.numel()), t)[1], lambda t: t):
            out = attend(q, k, v, torch.arange(length))
        out.sum().backward()
    return saved, mode.largest, length


def test_no_tensor_saved_or_made_on_the_way_holds_the_scores():
    saved, largest, length = saved_and_largest(
        lambda q, k, v, positions: flash_attention(q, k, v, whole(len(positions)), causal, None, 16, 16)
    )
    per_row = 4 * 4 + 1  # q, k, v and the output, four channels each, and the log of the sum
    assert sum(saved) == 2 * length * per_row
    assert largest <= 2 * max(length * 4, 16 * 16)

    def equation(q, k, v, positions):
        return explicit_attention(q, k, v, visibility(causal, positions, positions))

    saved, largest, length = saved_and_largest(equation)
    assert max(saved) == largest == 2 * length**2


def test_in_the_mixer_it_equals_the_fused_path_with_and_without_a_cache():
    arguments = dict(d_model=24, n_heads=4, n_kv_heads=2, mask=Window(6), scale=0.4)
    ours, fused = FlashAttention(tile_size=4, **arguments).double(), MultiHeadAttention(**arguments).double()
    redraw(ours)
    fused.load_state_dict(ours.state_dict())
    x = torch.randn(3, 15, 24, dtype=torch.float64)
    torch.testing.assert_close(ours(x, torch.arange(15)), fused(x, torch.arange(15)), rtol=0, atol=1e-10)
    for layer in (ours, fused):
        layer.outputs = []
        cache = Cache(-torch.tensor([0, 3, 7]), [layer.make_cache(3, 15)])
        for part in x.split([9, 1, 5], 1):
            layer.outputs.append(layer(part, cache.positions(part.shape[1]), cache.layers[0]))
            cache.seen += part.shape[1]
    torch.testing.assert_close(ours.outputs, fused.outputs, rtol=0, atol=1e-10)


def test_the_ladder_model_computes_what_the_baseline_computes():
    ours, baseline = tiny_model("flash_attention", tile_size=7), tiny_model("baseline")
    ours.load_state_dict(baseline.state_dict())
    tokens = torch.randint(97, (2, 30), generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(ours(tokens), baseline(tokens), rtol=0, atol=1e-9)


def test_wrong_tiles_and_score_biases_are_refused():
    with pytest.raises(ValueError, match=r"tile_size = 0 must be positive.*--model.tile-size"):
        FlashAttentionDecoder.Config(tile_size=0)
    with pytest.raises(ValueError, match="64 queries x 0 keys"):
        flash_attention(*draw(), whole(13), k_tile=0)
    with pytest.raises(ValueError, match="score_bias"):
        FlashAttention(d_model=8, n_heads=2, score_bias=lambda q_pos, k_pos: None)
