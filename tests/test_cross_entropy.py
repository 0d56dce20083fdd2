"""The loss that keeps no logits, held to the one that does."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llm.modules.kernels.cross_entropy import explicit_cross_entropy, linear_cross_entropy


def value_and_gradients(loss, dtype, autocast=False):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(600, 24, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(53, 24, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(53, (len(x),), generator=draw)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        value = loss(x, weight, targets)
    (3 * value).backward()
    return value.detach(), x.grad, weight.grad


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5)])
def test_value_and_gradients_equal_the_explicit_ones(dtype, tolerance):
    for ours, theirs in zip(
        value_and_gradients(linear_cross_entropy, dtype),
        value_and_gradients(explicit_cross_entropy, dtype),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=tolerance, atol=tolerance * 1e-2)


def test_in_double_precision_the_gradient_is_that_of_finite_differences():
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: linear_cross_entropy(x, w, torch.tensor([0, 6, 2, 2, 5])), (x, weight))


def test_under_autocast_gradients_keep_the_parameters_precision_and_direction():
    ours = value_and_gradients(linear_cross_entropy, torch.float32, autocast=True)
    exact = value_and_gradients(explicit_cross_entropy, torch.float32)
    torch.testing.assert_close(ours[0], exact[0], rtol=1e-3, atol=0)
    for mine, reference in zip(ours[1:], exact[1:], strict=True):
        assert mine.dtype is torch.float32
        assert (mine - reference).norm() < 0.01 * reference.norm()


def test_no_tensor_of_the_size_of_the_logits_is_kept():
    kept = []
    x = torch.randn(1024, 8, requires_grad=True)
    weight = torch.randn(300, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        linear_cross_entropy(x, weight, torch.zeros(1024, dtype=torch.int64))
    assert max(kept) <= x.numel()


def test_without_gradients_only_the_value_is_computed():
    weight = torch.nn.Parameter(torch.zeros(5, 4))
    with torch.no_grad(), FlopCounterMode(display=False) as flops:
        value = linear_cross_entropy(torch.zeros(3, 4), weight, torch.zeros(3, dtype=torch.int64))
    assert value == pytest.approx(torch.tensor(5.0).log().item())
    assert flops.get_total_flops() == 2 * 3 * 4 * 5  # the logits, and neither gradient
