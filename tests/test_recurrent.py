"""Recurrent mixers: loop, chunks and steps agree, the papers' equations hold, and a state never grows."""

import copy
from types import SimpleNamespace

import pytest
import torch
from conftest import redraw, tiny_model
from torch import nn
from torch.nn import functional as F
from training import RUN, command_line, script, write_corpus

from llm.models import MODELS
from llm.modules.cache import Cache
from llm.modules.initialization import SCHEMES, initialize
from llm.modules.kernels import chunks, fla, recurrence, scan
from llm.modules.kernels.convolution import Depthwise
from llm.modules.kernels.recurrence import delta_rule, linear_attention, low_rank
from llm.modules.position_encoding.rope import RoPE
from llm.modules.recurrent import core
from llm.modules.recurrent.delta import DeltaNet, GatedDeltaNet, KimiDeltaAttention
from llm.modules.recurrent.gated_linear_attention import GatedLinearAttention
from llm.modules.recurrent.linear_attention import LinearAttention
from llm.modules.recurrent.mamba import Mamba
from llm.modules.recurrent.mamba2 import Mamba2
from llm.modules.recurrent.parallel import ParallelMixers
from llm.modules.recurrent.retention import LightningAttention, Retention
from llm.modules.recurrent.rg_lru import GriffinRecurrence
from llm.modules.recurrent.rwkv7 import TimeMix
from llm.modules.recurrent.short_convolution import GatedConvolution, ShortConvolution, explicit_convolution
from llm.training.optim import split_by_decay

B, T, H, K, V = 2, 150, 3, 8, 5
"""Two chunks of 64 and a part of a third."""
RANKS = {"decay": 4, "a": 4, "value": 4, "gate": 4}


class FirstTimeMix(TimeMix):
    """That of the first layer, without the values that it hands on."""

    def forward(self, x, positions, cache=None):
        return super().forward(x, positions, cache)[0]


MIXERS = {
    "linear_attention": lambda: LinearAttention(d_model=24, n_heads=3, head_dim=4),
    "retention": lambda: Retention(d_model=24, n_heads=3, v_head_dim=6, rope=RoPE(8)),
    "lightning": lambda: LightningAttention(d_model=24, n_heads=3, depth=0.5),
    "gated_linear_attention": lambda: GatedLinearAttention(d_model=24, n_heads=3, head_dim=4, gate_rank=4),
    "delta_net": lambda: DeltaNet(d_model=24, n_heads=3),
    "negative_eigenvalues": lambda: DeltaNet(d_model=24, n_heads=3, max_beta=2.0),
    "gated_delta_net": lambda: GatedDeltaNet(d_model=24, n_heads=4, n_k_heads=2, head_dim=4, v_head_dim=6),
    "kimi_delta": lambda: KimiDeltaAttention(d_model=24, n_heads=3, gate_rank=4),
    "mamba": lambda: Mamba(d_model=24, d_inner=40, d_state=4),
    "mamba2": lambda: Mamba2(d_model=24, n_heads=4, head_dim=6, d_state=5, n_groups=2),
    "rwkv7": lambda: FirstTimeMix(d_model=24, n_heads=3, ranks=RANKS, value_residual=False),
    "griffin": lambda: GriffinRecurrence(d_model=24, d_rnn=36, n_heads=3),
    "gated_convolution": lambda: GatedConvolution(d_model=24),
}
every_mixer = pytest.mark.parametrize("name", MIXERS)
ROUNDING = dict.fromkeys(MIXERS, 1e-11) | {"retention": 1e-6}  # RoPE's angles are fp32


def make_mixer(name):
    torch.manual_seed(0)
    mixer = MIXERS[name]().double()
    redraw(mixer)
    return mixer


def make_input(batch_size=2, length=T):
    return torch.randn(batch_size, length, 24, generator=torch.Generator().manual_seed(1)).double()


def run_through_a_cache(mixer, x, parts, padding=0):
    cache = Cache(torch.zeros(len(x), dtype=torch.int64) - padding, [mixer.make_cache(len(x), x.shape[1])])
    outputs = []
    for part in x.split(parts, 1):
        outputs.append(mixer(part, cache.positions(part.shape[1]), cache.layers[0]))
        cache.seen += part.shape[1]
    return torch.cat(outputs, 1)


# The three functions


def arguments(kind, decay_width, strength):
    generator = torch.Generator().manual_seed(2)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).double()

    q, k, v, state = draw(B, T, H, K), draw(B, T, H, K), draw(B, T, H, V), draw(B, H, K, V)
    log_decay = -strength * draw(B, T, H, decay_width).sigmoid()
    unit = F.normalize(draw(B, T, H, K), dim=-1)
    others = {
        "linear_attention": (k, v, log_decay),
        "delta_rule": (unit, v, log_decay, 2 * draw(B, T, H, 1).sigmoid()),
        "low_rank": (k, v, -unit, unit * draw(B, T, H, K).sigmoid(), log_decay),
    }
    return [x.detach().requires_grad_() for x in (q, *others[kind], state)]


EXPLICIT = {
    "linear_attention": (core.explicit_linear_attention, chunks.chunked_linear_attention, linear_attention),
    "delta_rule": (core.explicit_delta_rule, chunks.chunked_delta_rule, delta_rule),
    "low_rank": (core.explicit_low_rank, chunks.chunked_low_rank, low_rank),
}


@pytest.mark.parametrize("strength", [0.0, 1.0, 200.0])
@pytest.mark.parametrize("decay_width", [1, K])
@pytest.mark.parametrize("kind", EXPLICIT)
def test_chunks_equal_the_loop_in_values_and_gradients(kind, decay_width, strength):
    inputs, results = arguments(kind, decay_width, strength), []
    for form in EXPLICIT[kind]:
        o, state = form(*inputs)
        weights = torch.randn(o.shape, generator=torch.Generator().manual_seed(3)).double()
        gradients = torch.autograd.grad((o * weights).sum() + state.square().sum(), inputs)
        results.append([o, state, *gradients])
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(results[2], results[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("strength", [0.01, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("decay_width", [1, K])
@pytest.mark.parametrize("kind", EXPLICIT)
def test_gradients_are_right_under_autocast_also_those_of_strong_decays(kind, decay_width, strength):
    """With strong decays a token's product with itself, which does not decay, is larger than all others."""
    inputs = [x.detach().bfloat16().double() for x in arguments(kind, decay_width, strength)]
    explicit, chunked, _ = EXPLICIT[kind]
    exact, rough = ([x.to(dtype).requires_grad_() for x in inputs] for dtype in (torch.float64, torch.float32))
    expected = explicit(*exact)[0]
    with torch.autocast("cpu", torch.bfloat16):
        found = chunked(*rough)[0]
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(3)).bfloat16()
    right, gradients = (torch.autograd.grad((o * weights).sum(), x) for o, x in ((expected, exact), (found, rough)))
    for i, (gradient, exactly) in enumerate(zip(gradients, right, strict=True)):
        assert (gradient - exactly).norm() < 0.03 * exactly.norm(), f"argument {i}"


@pytest.mark.parametrize("kind", ["linear_attention", "delta_rule"])
def test_one_token_is_the_step_and_value_heads_may_share_a_key(kind):
    q, k, *others = arguments(kind, 1, 1.0)
    state, others = others[-1], others[:-1]
    explicit, _, form = EXPLICIT[kind]
    shared = [x[:, :, :1] for x in (q, k)]
    repeated = [x.expand(-1, -1, H, -1) for x in shared]
    expected = explicit(*repeated, *others, state)
    torch.testing.assert_close(form(*shared, *others, state), expected, rtol=1e-10, atol=1e-10)
    first = [x[:, :1] for x in (*shared, *others)]
    o, _ = form(*first, state)
    torch.testing.assert_close(o, expected[0][:, :1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", EXPLICIT)
def test_strong_decays_neither_overflow_nor_vanish_in_fp32(kind):
    """exp(-total) would overflow: 64 tokens of a log decay of -200 each."""
    inputs = [x.detach().float() for x in arguments(kind, K, 400.0)]
    expected, _ = EXPLICIT[kind][0](*(x.double() for x in inputs))
    o, state = EXPLICIT[kind][1](*inputs)
    assert o.isfinite().all() and state.isfinite().all()
    torch.testing.assert_close(o.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", EXPLICIT)
def test_the_state_is_fp32_under_autocast(kind):
    inputs = [x.detach().float() for x in arguments(kind, K, 1.0)]
    expected, _ = EXPLICIT[kind][0](*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        o, state = EXPLICIT[kind][2](*inputs)
    assert state.dtype is torch.float32
    assert (o.float() - expected).norm() < 0.02 * expected.norm()


def test_each_rule_is_what_its_paper_says():
    """One head, one token after the other, as matrices."""
    S = torch.randn(K, V).double()
    q, k, v, d = (torch.randn(n).double() for n in (K, K, V, K))
    a, b, log_d, beta = torch.randn(K).double(), torch.randn(K).double(), -d.exp(), 0.7
    eye, D = torch.eye(K).double(), torch.diag(log_d.exp())

    def batched(*vectors):
        return [vector[None, None] for vector in vectors]

    steps = {
        core.linear_attention_step: ([k, v, log_d], D @ S + torch.outer(k, v)),
        core.delta_rule_step: (
            [k, v, log_d, torch.tensor([beta]).double()],
            (eye - beta * torch.outer(k, k)) @ D @ S + beta * torch.outer(k, v),
        ),
        core.low_rank_step: ([k, v, a, b, log_d], (D + torch.outer(b, a)) @ S + torch.outer(k, v)),
    }
    for step, (inputs, expected) in steps.items():
        o, state = step(*batched(q, *inputs), S[None, None])
        torch.testing.assert_close(state[0, 0], expected)
        torch.testing.assert_close(o[0, 0], expected.T @ q)


# Scans


def scan_arguments(length, width=6, n_states=4):
    generator = torch.Generator().manual_seed(4)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).double()

    u, dt = draw(B, length, width), F.softplus(draw(B, length, width))
    rates, b, c, state = (
        -draw(width, n_states).exp(),
        draw(B, length, n_states),
        draw(B, length, n_states),
        draw(B, width, n_states),
    )
    return [x.detach().requires_grad_() for x in (u, dt, rates, b, c, state)]


def explicit_selective_scan(u, dt, rates, b, c, state):
    outputs = []
    for t in range(u.shape[1]):
        state = torch.exp(dt[:, t, :, None] * rates) * state + dt[:, t, :, None] * u[:, t, :, None] * b[:, t, None]
        outputs.append((state * c[:, t, None]).sum(-1))
    return torch.stack(outputs, 1), state


@pytest.mark.parametrize("length", [1, 2, 64, 150])
def test_mambas_scan_equals_the_papers_loop_in_values_and_gradients(length):
    inputs, results = scan_arguments(length), []
    for form in (explicit_selective_scan, scan.selective_scan):
        y, state = form(*inputs)
        weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).double()
        results.append([y, state, *torch.autograd.grad((y * weights).sum() + state.square().sum(), inputs)])
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


def test_the_linear_scan_equals_its_loop_in_values_and_gradients():
    gates, inputs, state = (torch.randn(*shape).double().requires_grad_() for shape in ((B, 9, 4), (B, 9, 4), (B, 4)))
    h, states = state, []
    for t in range(9):
        h = gates[:, t] * h + inputs[:, t]
        states.append(h)
    expected = torch.stack(states, 1)
    weights = torch.randn_like(expected)
    found = scan.linear_scan(gates, inputs, state)
    results = [[x, *torch.autograd.grad((x * weights).sum(), (gates, inputs, state))] for x in (expected, found)]
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("width", [1, 2, 4])
def test_a_short_convolution_is_torchs_conv1d(width):
    torch.manual_seed(0)
    ours, theirs = ShortConvolution(6, width, bias=True), nn.Conv1d(6, 6, width, groups=6, padding=width - 1)
    redraw(ours)
    theirs.load_state_dict(ours.state_dict())
    x, positions = torch.randn(2, 9, 6), torch.arange(9)
    expected = F.silu(theirs(x.mT)[..., :9].mT)
    torch.testing.assert_close(ours(x, positions), expected)
    cache = ours.make_cache(2)
    steps = [ours(x[:, t], positions[t].expand(2, -1), cache) for t in map(slice, (0, 3, 4), (3, 4, 9))]
    torch.testing.assert_close(torch.cat(steps, 1), expected)


def test_a_short_convolution_has_the_gradients_of_its_definition_in_bf16_too():
    """Sums over 4,096 tokens, each product of which is rounded to bf16."""
    torch.manual_seed(0)
    inputs = [torch.randn(8, 515, 6), torch.randn(6, 4), torch.randn(6)]
    exact = [x.bfloat16().double().requires_grad_() for x in inputs]
    rough = [x.bfloat16().requires_grad_() for x in inputs]
    weights = torch.randn(8, 512, 6).bfloat16()
    expected = torch.autograd.grad((explicit_convolution(*exact) * weights).sum(), exact)
    found = torch.autograd.grad((Depthwise.apply(*rough) * weights).sum(), rough)
    for right, gradient in zip(expected, found, strict=True):
        assert (gradient - right).norm() < 0.005 * right.norm()


# Mixers


@every_mixer
@pytest.mark.parametrize("parts", [[T], [1] * T, [70, 1, 79], [1, 148, 1]])
def test_through_the_cache_in_any_parts_it_equals_the_whole_at_once(name, parts):
    mixer, x = make_mixer(name), make_input()
    expected = mixer(x, torch.arange(T))
    assert expected.abs().mean() > 0.01
    torch.testing.assert_close(run_through_a_cache(mixer, x, parts), expected, rtol=0, atol=ROUNDING[name])


@every_mixer
@pytest.mark.parametrize("parts", [[T], [90, 1, 59], [3, 1, 1, 1, 144]])
def test_padded_prompts_of_unlike_length_give_what_each_gives_alone(name, parts):
    mixer, x, padding = make_mixer(name), make_input(3), torch.tensor([0, 4, 81])
    together = run_through_a_cache(mixer, x, parts, padding)
    for row, n in enumerate(padding):
        alone = mixer(x[row : row + 1, n:], torch.arange(T - n))
        torch.testing.assert_close(together[row, n:], alone[0], rtol=0, atol=ROUNDING[name])


@every_mixer
def test_the_cache_is_as_large_for_a_long_text_as_for_a_short_one(name):
    mixer = MIXERS[name]()
    short, long = mixer.make_cache(2, 16), mixer.make_cache(2, 16_384)
    assert {n: t.shape for n, t in short.items()} == {n: t.shape for n, t in long.items()}
    narrow = MIXERS[name]().bfloat16().make_cache(2, 16)
    assert "state" not in narrow or narrow["state"].dtype is torch.float32


@every_mixer
def test_a_longer_cache_takes_the_whole_state_over(name):
    mixer, x = make_mixer(name), make_input(length=20)
    caches = [Cache(torch.zeros(2, dtype=torch.int64), [mixer.make_cache(2, n)]) for n in (16, 32)]
    mixer(x[:, :16], caches[0].positions(16), caches[0].layers[0])
    caches[0].seen += 16
    caches[1].copy_from(caches[0])
    rest = mixer(x[:, 16:], caches[1].positions(4), caches[1].layers[0])
    torch.testing.assert_close(rest, mixer(x, torch.arange(20))[:, 16:], rtol=0, atol=ROUNDING[name])


@every_mixer
def test_gradients_are_finite_for_a_long_text_in_fp32(name):
    mixer, x = MIXERS[name](), make_input(length=300).float().requires_grad_()
    initialize(mixer, "normal", 4)
    mixer(x, torch.arange(300)).square().mean().backward()
    assert x.grad.isfinite().all() and x.grad[:, 0].any()
    assert all(p.grad is None or p.grad.isfinite().all() for p in mixer.parameters())


@every_mixer
def test_bf16_autocast_is_near_fp32(name):
    torch.manual_seed(0)
    mixer, x = MIXERS[name](), make_input().float().requires_grad_()
    initialize(mixer, "truncated_normal", 4)
    expected = mixer(x, torch.arange(T))
    with torch.autocast("cpu", torch.bfloat16):
        found = mixer(x, torch.arange(T))
    assert found.dtype is torch.bfloat16
    assert (found.float() - expected).norm() < 0.05 * expected.norm()
    gradients = [torch.autograd.grad(y.float().square().mean(), x)[0] for y in (expected, found)]
    assert (gradients[1] - gradients[0]).norm() < 0.1 * gradients[0].norm()


@every_mixer
def test_the_state_of_a_cache_is_fp32_under_autocast(name):
    torch.manual_seed(0)
    mixer, x = MIXERS[name](), make_input().float()
    initialize(mixer, "truncated_normal", 4)
    states = []
    for rounded in (False, True):
        cache = mixer.make_cache(2, T)
        with torch.autocast("cpu", torch.bfloat16, enabled=rounded):
            mixer(x, torch.arange(T).expand(2, -1), cache)
        states.append(cache.get("state"))
    if name != "gated_convolution":  # which has none
        assert states[1].dtype is torch.float32 and states[1].bfloat16().float().ne(states[1]).any()
        assert (states[1] - states[0]).norm() < 0.05 * states[0].norm()


@every_mixer
@pytest.mark.parametrize("scheme", SCHEMES)
def test_decays_are_drawn_by_their_module_in_every_scheme_and_do_not_decay(name, scheme):
    mixer = MIXERS[name]()
    initialize(mixer, scheme, 4)
    named = dict(mixer.named_parameters())
    if "decay.A_log" in named:
        assert (named["decay.A_log"] >= 0).all() and (named["decay.A_log"] <= 2.8).all()
        steps = F.softplus(named["decay.dt_bias"])
        assert (steps > 0.0009).all() and (steps < 0.11).all() and steps.std() > 0
    if "rates.A_log" in named:
        torch.testing.assert_close(named["rates.A_log"][3].exp(), torch.arange(1.0, 5.0))
        steps = F.softplus(named["dt_proj.bias"])
        assert (steps > 0.0009).all() and (steps < 0.11).all() and (named["D"] == 1).all()
    if "lru.Lambda" in named:
        slowest = (-8 * F.softplus(named["lru.Lambda"])).exp()
        assert (slowest >= 0.899).all() and (slowest <= 0.9991).all() and slowest.std() > 0
    if "decay_lora.b_proj.bias" in named:
        assert named["decay_lora.b_proj.bias"].aminmax() == (-6.5, -1.5)
        assert (named["k_k"] == 0.85).all() and (named["k_a"] == 1).all()
        torch.testing.assert_close(named["shift.mu"][2], torch.linspace(1, 0, 24))
    if "conv.weight" in named:
        assert named["conv.weight"].std() > 0.1
    decaying = {id(p) for p in split_by_decay(mixer)[0]}
    kept = ("A_log", "dt_bias", "D", "mu", "r_k", "Lambda", "_bias", ".bias", "norm.weight")
    assert not [n for n, p in named.items() if n.endswith(kept) and id(p) in decaying]


def test_mixers_side_by_side_do_not_share_a_cache_in_silence():
    mixers = ParallelMixers(a=make_mixer("negative_eigenvalues"), b=make_mixer("negative_eigenvalues"))
    with pytest.raises(ValueError, match=r"two parallel mixers would share a cache: both call a tensor .*state"):
        mixers.make_cache(1, 8)


def test_with_negative_eigenvalues_a_state_can_alternate():
    """beta = 2 reflects the state along k: writing 0 twice gives the state back. beta <= 1 cannot change its sign."""
    k, nothing = torch.tensor([[[1.0, 0.0]]]), torch.zeros(1, 1, 1)
    state = torch.tensor([[[[3.0], [5.0]]]])
    signs = []
    for _ in range(3):
        _, state = core.delta_rule_step(k, k, nothing, nothing, torch.full((1, 1, 1), 2.0), state)
        signs.append(state[0, 0, :, 0].tolist())
    assert signs == [[-3.0, 5.0], [3.0, 5.0], [-3.0, 5.0]]


def test_linear_attention_is_attention_with_another_weight():
    layer, x = make_mixer("linear_attention"), make_input(length=30)
    q, k, v = (layer.heads(proj(x)).transpose(1, 2) for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
    weights = ((F.elu(q) + 1) @ (F.elu(k) + 1).mT).tril()
    expected = layer.o_proj((weights / weights.sum(-1, keepdim=True) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x, torch.arange(30)), expected)


def test_retention_is_attention_with_decaying_weights():
    layer, x = make_mixer("retention"), make_input(length=30)
    q, k, v = (layer.heads(proj(x)) for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
    q, k, v = (part.transpose(1, 2) for part in (layer.rope(q, torch.arange(30)), layer.rope(k, torch.arange(30)), v))
    distance = torch.arange(30)[:, None] - torch.arange(30)
    decay = torch.stack([(1 - 2.0 ** (-5 - h)) ** distance.double() for h in range(3)]).tril()
    o = F.rms_norm((q @ k.mT / 8**0.5 * decay @ v).transpose(1, 2), (6,), layer.o_norm.weight, 1e-5)
    expected = layer.o_proj(F.silu(layer.gate_proj(x)) * o.flatten(2))
    torch.testing.assert_close(layer(x, torch.arange(30)), expected, rtol=0, atol=1e-6)


def test_gated_linear_attention_is_its_loop():
    layer, x = make_mixer("gated_linear_attention"), make_input(1, 30)
    state, outputs = torch.zeros(3, 4, 8).double(), []
    for token in x[0]:
        q, k, v, gate = (proj(token) for proj in (layer.q_proj, layer.k_proj, layer.v_proj, layer.gate_proj))
        d = layer.decay_b_proj(layer.decay_a_proj(token)).sigmoid() ** (1 / 16)
        state = d.view(3, 4, 1) * state + k.view(3, 4, 1) * v.view(3, 1, 8)
        o = torch.einsum("hkv,hk->hv", state, q.view(3, 4) / 2)
        outputs.append(layer.o_proj((layer.o_norm(o) * F.silu(gate).view(3, 8)).flatten()))
    torch.testing.assert_close(layer(x, torch.arange(30))[0], torch.stack(outputs))


def test_delta_net_is_its_loop():
    layer, x = make_mixer("negative_eigenvalues"), make_input(1, 30)
    qkv = torch.cat([layer.q_proj(x), layer.k_proj(x), layer.v_proj(x)], -1)
    padded = F.pad(qkv[0], (0, 0, 3, 0))
    state, outputs = torch.zeros(3, 8, 8).double(), []
    for t in range(30):
        mixed = F.silu((padded[t : t + 4] * layer.conv.weight[:, 0].T).sum(0))
        q, k, v = mixed.view(3, 3, 8)
        q, k = (part / (part.square().sum(-1, keepdim=True) + 1e-6).sqrt() for part in (q, k))
        beta = 2 * layer.beta_proj(x[0, t]).sigmoid()
        found = torch.einsum("hkv,hk->hv", state, k)
        state = state + torch.einsum("h,hk,hv->hkv", beta, k, v - found)
        o = torch.einsum("hkv,hk->hv", state, q / 8**0.5)
        outputs.append(layer.o_proj(layer.o_norm(o).flatten()))
    torch.testing.assert_close(layer(x, torch.arange(30))[0], torch.stack(outputs))


@every_mixer
def test_a_copy_is_independent(name):
    mixer = make_mixer(name)
    twin = copy.deepcopy(mixer)
    redraw(twin)
    x = make_input(length=9)
    assert not torch.equal(twin(x, torch.arange(9)), mixer(x, torch.arange(9)))


@pytest.mark.parametrize(("kind", "per_channel"), fla.KERNELS)
def test_a_kernel_is_believed_where_it_agrees_and_the_report_says_why_not(kind, per_channel, monkeypatch):
    """With the chunked form in the place of fla-core, which has no CPU kernels, and then with a wrong one."""
    cpu, forms = torch.device("cpu"), fla.CHUNKED

    def stand_in(q, k, v, g, *beta, scale, initial_state, output_final_state):
        g = g if per_channel else g[..., None]
        return forms[kind](q, k, v, g, *(b[..., None] for b in beta), initial_state)

    _, name = fla.KERNELS[kind, per_channel]
    monkeypatch.setattr(fla.importlib, "import_module", lambda path: SimpleNamespace(**{name: stand_in}))
    assert fla.disbelief(kind, per_channel, cpu, torch.float32, (64, 32)) is None
    forms = dict(forms)

    def wrong_state(*inputs):
        o, state = chunked(*inputs)
        return o, state.mT

    def wrong_gradient(q, k, *inputs):
        return chunked(q, k.detach() + 0 * k, *inputs)

    def broken(*inputs):
        raise RuntimeError("no such instruction")

    chunked = forms[kind]
    for form, reason in ((wrong_state, "wrong by"), (wrong_gradient, "wrong by"), (broken, "no such instruction")):
        forms[kind] = form
        with pytest.warns(UserWarning, match=f"{kind}.*64, 64.*{reason}.*computed in chunks"):
            assert reason in fla.disbelief(kind, per_channel, cpu, torch.float32, (64, 64))


@pytest.mark.parametrize(
    "name, kinds",
    [
        ("baseline", ""),
        ("lfm2", ""),
        ("mamba2", "linear_attention (decay by head): chunks, no CUDA device"),
        ("kimi_linear", "delta_rule (decay by channel): chunks, no CUDA device"),
        ("rwkv7", "low_rank (decay by channel): chunks, no kernel for it here"),
        ("jamba", "selective_scan (decay by channel): a loop over tokens, no kernel for it here"),
    ],
)
def test_a_run_says_which_of_its_recurrences_have_a_kernel_and_why_not(name, kinds):
    assert fla.kernel_report(tiny_model(name), torch.device("cpu")) == kinds


@pytest.mark.filterwarnings("ignore:Unable to enable fault handler")
def test_a_run_prints_the_report(tmp_path, capsys):
    flags = {
        **RUN,
        "--data": write_corpus(tmp_path),
        "--out": tmp_path / "run",
        "--steps": 1,
        "--model.max-seq-len": 32,
    }
    script("train_gated_delta_net").main(command_line(flags))
    assert "kernels     delta_rule (decay by head): chunks, no CUDA device\n" in capsys.readouterr().out


@pytest.mark.parametrize("name", [name for name in MODELS if fla.kernel_report(tiny_model(name), torch.device("cpu"))])
def test_the_report_names_the_recurrences_that_are_computed(name, monkeypatch):
    computed = set()

    def noted(kind, inputs, log_decay):
        computed.add((kind, log_decay.shape[-1] > 1))

    monkeypatch.setattr(recurrence, "fla_kernel", noted)
    model = tiny_model(name)
    model(torch.zeros(1, 3, dtype=torch.int64))
    report = fla.kernel_report(model, torch.device("cpu"))
    named = {(part.split()[0], "channel" in part.split(":")[0]) for part in report.split("; ")}
    assert computed == {(kind, per_channel) for kind, per_channel in named if not kind.endswith("scan")}
