"""Cross-entropy of a linear head, with its gradient computed in the forward pass.

    logits = x W^T                      ce = mean(logsumexp(logits) - logits[target])
    d ce / d logits = (softmax(logits) - onehot(target)) / N

With a large vocabulary the logits are by far the largest tensor of a training step, and only this loss reads them. So
the logits of a block of rows are replaced by their gradient, which is multiplied into d/dx and d/dW before the next
block is computed: no logits are kept. Cut Your Losses, arXiv 2411.09009, and Liger Kernel, arXiv 2410.10989, do this
inside GPU kernels. A factor of each row multiplies its cross-entropy where some tokens count more than others, as in
diffusion. Blog: Overview.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 8192  # rows of logits in memory at once: products of many rows are faster
SOFTMAX_ROWS = {"cpu": 32}  # rows whose gradient is computed at once: few float32 rows fit into a CPU's cache


def explicit_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, factors: Tensor | None = None) -> Tensor:
    """x (N, D), weight (V, D), targets (N,) -> the mean in nats, of each row times its factor where `factors` (N,) are
    given; all N x V logits are kept for the gradient."""
    ce = F.cross_entropy(F.linear(x, weight).float(), targets, reduction="none")
    return (ce if factors is None else ce * factors).mean()


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, factors: Tensor | None = None) -> Tensor:
    """The same value and gradients without keeping the logits. Under autocast the products are made in its dtype."""
    if not torch.is_grad_enabled():  # inside the Function, parameters would still seem to need a gradient
        x, weight = x.detach(), weight.detach()
    autocast = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    factors = x.new_ones(1).expand(len(x)) if factors is None else factors
    return LinearCrossEntropy.apply(x.to(dtype), weight, targets, factors)


class LinearCrossEntropy(torch.autograd.Function):
    """The forward pass computes the loss and both gradients, the backward pass scales them. Products are made in x's
    dtype; the gradient of the weight is summed in float32."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, factors: Tensor) -> Tensor:
        weight = weight.to(x.dtype)
        wide = torch.promote_types(x.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=x.device)
        needs_gradient = any(ctx.needs_input_grad)
        grad_x, grad_weight = torch.empty_like(x), 0
        for start in range(0, len(x), BLOCK):
            rows, wanted, factor = (t[start : start + BLOCK] for t in (x, targets[:, None], factors[:, None]))
            logits = rows @ weight.T  # (R, V); wanted and factor (R, 1)
            n_rows = SOFTMAX_ROWS.get(x.device.type, BLOCK)
            few = (t.split(n_rows) for t in (logits, wanted, factor))
            for some_logits, some_wanted, some_factor in zip(*few, strict=True):
                log_p = F.log_softmax(some_logits, -1, dtype=wide)
                total -= (log_p.gather(1, some_wanted) * some_factor).sum()
                if needs_gradient:
                    one = torch.ones_like(some_wanted, dtype=wide)
                    some_logits.copy_(log_p.exp_().scatter_add_(1, some_wanted, -one))
            if needs_gradient:
                factor = factor.to(x.dtype)
                grad_x[start : start + BLOCK] = (logits @ weight) * factor
                grad_weight = grad_weight + (logits.T @ (rows * factor)).to(wide)
        ctx.save_for_backward(grad_x, grad_weight if needs_gradient else None)
        ctx.n = len(x)
        return total / len(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad_x, grad_weight = ctx.saved_tensors
        scale = grad / ctx.n
        return (grad_x * scale).to(grad_x.dtype), grad_weight * scale, None, None
