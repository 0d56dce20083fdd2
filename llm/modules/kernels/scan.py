"""Element-wise recurrences, for which there is no matrix product: one multiply-add for each token.

    h_t = gate_t * h_{t-1} + input_t
    dh_{t-1} += gate_t * dh_t        dgate_t = dh_t * h_{t-1}        dinput_t = dh_t

`linear_scan` is this equation. Mamba's gates and inputs are d_state times as large as what they are made of, so
`selective_scan` makes them for 64 tokens at a time, keeps only the state before each such chunk, and makes them again
in the backward pass. Tests hold both equal to loops.

A closed form with cumulative sums of log gates overflows where a chunk decays below exp(-88) in fp32.
Mamba, arXiv 2312.00752, section 3.3.2. Blog: State-space models.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from llm.modules.kernels.precision import is_remote, without_autocast

CHUNK = 64


def selective_scan(
    u: Tensor, dt: Tensor, rates: Tensor, b: Tensor, c: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t and y_t = h_t . C_t, for each channel.

    u, dt (B, T, D), rates A (D, N), b, c (B, T, N), state (B, D, N) -> y (B, T, D) in u's dtype, the last state.
    The state has dt's dtype.
    """
    dtype, (u, b, c) = u.dtype, (x.to(dt.dtype) for x in (u, b, c))
    if state is None:
        state = dt.new_zeros(len(u), *rates.shape)
    if u.shape[1] == 1:
        y, state = selective_scan_step(u[:, 0], dt[:, 0], rates, b[:, 0], c[:, 0], state)
        return y[:, None].to(dtype), state
    at_once = len(u) if is_remote(u) else 1  # the gates and states of one text stay in a CPU's cache
    texts = zip(*(x.split(at_once) for x in (dt * u, dt, b, c, state)), strict=True)
    with without_autocast(u):
        ys, states = zip(*(scan_in_chunks(*text, rates) for text in texts), strict=True)
    return torch.cat(ys).to(dtype), torch.cat(states)


def scan_in_chunks(x: Tensor, dt: Tensor, b: Tensor, c: Tensor, state: Tensor, rates: Tensor) -> tuple[Tensor, Tensor]:
    """`selective_scan` of x = dt u, in fp32 or wider."""
    outputs = []
    for chunk in zip(*(part.split(CHUNK, 1) for part in (x, dt, b, c)), strict=True):
        y, state = SelectiveChunk.apply(*chunk, rates, state)
        outputs.append(y)
    return torch.cat(outputs, 1), state


def selective_scan_step(
    u: Tensor, dt: Tensor, rates: Tensor, b: Tensor, c: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The same for one token: u, dt (B, D), b, c (B, N), state (B, D, N) -> y (B, D) and the next state."""
    state = (dt[..., None] * rates).exp() * state + (dt * u)[..., None] * b[:, None]
    return (state * c[:, None]).sum(-1), state


class SelectiveChunk(torch.autograd.Function):
    """One chunk: x = dt u and dt (B, T, D), b, c (B, T, N), rates (D, N), state (B, D, N) -> y (B, T, D), state."""

    @staticmethod
    def forward(ctx, x: Tensor, dt: Tensor, b: Tensor, c: Tensor, rates: Tensor, state: Tensor):
        ctx.save_for_backward(x, dt, b, c, rates, state)
        _, states = chunk_states(x, dt, b, rates, state)
        return torch.einsum("tbdn,btn->btd", states, c), states[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y: Tensor, grad_state: Tensor):
        x, dt, b, c, rates, state = ctx.saved_tensors
        gates, states = chunk_states(x, dt, b, rates, state)
        grad = grad_y.transpose(0, 1)[..., None] * c.transpose(0, 1)[:, :, None]  # (T, B, D, N)
        grad[-1] += grad_state
        for t in range(len(grad) - 1, 0, -1):
            grad[t - 1].addcmul_(gates[t], grad[t])
        grad_c = torch.einsum("tbdn,btd->btn", states, grad_y)
        grad_x = torch.einsum("tbdn,btn->btd", grad, b)
        grad_b = torch.einsum("tbdn,btd->btn", grad, x)
        grad_first = gates[0] * grad[0]
        gates[1:].mul_(states[:-1])  # from here on: the gradient of dt A
        gates[0].mul_(state)
        gates.mul_(grad)
        grad_dt = torch.einsum("tbdn,dn->btd", gates, rates)
        grad_rates = gates.mul_(dt.transpose(0, 1)[..., None]).sum((0, 1))
        return grad_x, grad_dt, grad_b, grad_c, grad_rates, grad_first


def chunk_states(x: Tensor, dt: Tensor, b: Tensor, rates: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The gates exp(dt A) and the states after each token, both (T, B, D, N), so that tokens are adjacent."""
    gates = (dt.transpose(0, 1)[..., None] * rates).exp_()
    states = x.transpose(0, 1)[..., None] * b.transpose(0, 1)[:, :, None]
    for gate, here in zip(gates, states, strict=True):
        state = here.addcmul_(gate, state)
    return gates, states


def linear_scan(gates: Tensor, inputs: Tensor, state: Tensor) -> Tensor:
    """h_t = gate_t * h_{t-1} + input_t: gates and inputs (B, T, D), state h_0 (B, D) -> all h_t (B, T, D)."""
    return LinearScan.apply(gates, inputs, state)


class LinearScan(torch.autograd.Function):
    """The equation at the top of the file, and its gradient, which is the same from the last token to the first."""

    @staticmethod
    def forward(ctx, gates: Tensor, inputs: Tensor, state: Tensor):
        states = scan_by_chunks(gates, inputs, state)
        ctx.save_for_backward(gates, states, state)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_states: Tensor):
        gates, states, state = ctx.saved_tensors
        to_earlier = F.pad(gates[:, 1:], (0, 0, 0, 1)).flip(1)  # dh_t reaches dh_{t-1} through gate_t
        grad = scan_by_chunks(to_earlier, grad_states.flip(1), torch.zeros_like(state)).flip(1)
        before = torch.cat([state[:, None], states[:, :-1]], 1)
        return grad * before, grad, gates[:, 0] * grad[:, 0]


def scan_by_chunks(gates: Tensor, inputs: Tensor, state: Tensor) -> Tensor:
    """All h_t (B, T, D). The chunks are computed side by side, each from h = 0. Then the state before each chunk, times
    the product of the gates since, is added. This takes 64 + T / 64 steps instead of T."""
    length = gates.shape[1]
    size = min(CHUNK, length)
    products, states = (  # (size, B, N, D), so that tokens are adjacent
        F.pad(x, (0, 0, 0, -length % size))
        .unflatten(1, (-1, size))
        .movedim(2, 0)
        .clone(memory_format=torch.contiguous_format)
        for x in (gates, inputs)
    )
    for t in range(1, size):
        states[t].addcmul_(products[t], states[t - 1])
        products[t].mul_(products[t - 1])
    before = torch.empty_like(states[0])
    for n in range(before.shape[1]):
        before[:, n] = state
        state = torch.addcmul(states[-1, :, n], products[-1, :, n], state)
    return states.addcmul_(products, before).movedim(0, 2).flatten(1, 2)[:, :length]
