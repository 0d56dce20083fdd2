"""Mixtures of experts against a loop over tokens, closed formulas and the layers in transformers."""

import copy
import math

import pytest
import torch
from conftest import redraw, tiny_model
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from llm.modules.ffn.balance import balance_loss, z_loss
from llm.modules.ffn.expert_choice import ExpertChoice
from llm.modules.ffn.glu import SwiGLU
from llm.modules.ffn.mlp import MLP
from llm.modules.ffn.moe import GatedExperts, MoE, PlainExperts, explicit_moe
from llm.modules.ffn.router import SigmoidRouter, SoftmaxRouter, best_of_groups, check_routing
from llm.modules.ffn.switch import SwitchRouter
from llm.modules.kernels.grouped import grouped_linear, lay_out
from llm.modules.kernels.looped import looped_linear

MOE_MODELS = ["switch_transformer", "mixture_of_experts", "loss_free_balancing"]
D, E = 16, 6


def drawn(module: torch.nn.Module) -> torch.nn.Module:
    """In float64, in evaluation mode, with every parameter and every expert bias re-drawn."""
    torch.manual_seed(0)
    module = module.double().eval()
    redraw(module)
    for name, buffer in module.named_buffers():
        if name.endswith("bias"):
            buffer.copy_(0.1 * torch.randn_like(buffer))
    return module


def moe(router=SoftmaxRouter, top_k=2, experts=GatedExperts, shared=None, **settings) -> MoE:
    return drawn(MoE(router(D, E, top_k, **settings), experts(D, 8, E), shared))


def inputs(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*(shape or (3, 7)), D, dtype=torch.float64, generator=generator)


def one_expert(experts: torch.nn.Module, i: int, x: torch.Tensor) -> torch.Tensor:
    """Expert i on one token, written out."""
    if isinstance(experts, PlainExperts):
        return experts.down_proj[i] @ F.gelu(experts.up_proj[i] @ x)
    width = experts.down_proj.shape[-1]
    gate, up = experts.gate_up_proj[i][:width] @ x, experts.gate_up_proj[i][width:] @ x
    return experts.down_proj[i] @ (gate * gate.sigmoid() * up)


def token_by_token(layer: MoE, x: torch.Tensor) -> torch.Tensor:
    """The layer's equation as a loop over tokens and their choices."""
    experts, weights = layer.router(x)
    y = torch.zeros_like(x) if layer.shared is None else layer.shared(x)
    for b, t in torch.cartesian_prod(*map(torch.arange, x.shape[:2])).tolist():
        for i, weight in zip(experts[b, t].tolist(), weights[b, t], strict=True):
            y[b, t] = y[b, t] + weight * one_expert(layer.experts, i, x[b, t])
    return y


# The layer


@pytest.mark.parametrize("block", [1, 4])
def test_each_choice_has_a_row_of_its_own_in_the_run_of_its_expert(block):
    expert = torch.tensor([0, 0, 0, 0, 0, 2, 3, 3, 3, 3])
    row, ends, n_rows = lay_out(expert, 5, block)
    assert row.tolist() == {1: list(range(10)), 4: [0, 1, 2, 3, 4, 8, 12, 13, 14, 15]}[block]
    assert ends.tolist() == {1: [5, 5, 6, 10, 10], 4: [8, 8, 12, 16, 24]}[block]  # the last one takes what is left
    assert ends.dtype is torch.int32
    assert n_rows == ends[-1]
    for crowded in range(5):  # the fullest layouts fit
        row, ends, n_rows = lay_out(torch.full((13,), crowded), 5, block)
        assert row.max() < ends[crowded] <= n_rows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_runs_are_filled_up_where_it_is_faster_and_that_changes_nothing(dtype, monkeypatch):
    layer, x = moe().float().train(), inputs(4, 100).float().requires_grad_()
    sizes = []
    experts = layer.experts.forward
    monkeypatch.setattr(layer.experts, "forward", lambda rows, ends: sizes.append(ends) or experts(rows, ends))

    def outcome(block):
        if block:
            monkeypatch.setattr("llm.modules.kernels.grouped.block_size", lambda *_: block)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            y = layer(x)
        wanted = [x, *(p for p in layer.parameters())]
        return y, *torch.autograd.grad(y.float().square().sum(), wanted)

    default, plain = outcome(None), outcome(1)
    in_blocks = not (sizes[0] % 64).any()
    assert in_blocks == (dtype is torch.bfloat16)
    for one, other in zip(default, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * other.abs().max().item())


@pytest.mark.parametrize("experts", [GatedExperts, PlainExperts])
@pytest.mark.parametrize("router, top_k", [(SoftmaxRouter, 1), (SoftmaxRouter, 2), (SigmoidRouter, 3)])
def test_sorting_by_expert_equals_a_loop_over_tokens(experts, router, top_k):
    layer = moe(router, top_k, experts, shared=MLP(D, 8), normalize=top_k > 1, scale=1.7)
    x = inputs().requires_grad_()
    ours, naive = layer(x), token_by_token(layer, x)
    torch.testing.assert_close(ours, naive)
    torch.testing.assert_close(explicit_moe(x, *layer.router(x), layer.experts) + layer.shared(x), naive)
    upstream = torch.randn_like(ours)
    parameters = [x, *layer.parameters()]
    for one, other in zip(
        torch.autograd.grad(ours, parameters, upstream), torch.autograd.grad(naive, parameters, upstream), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_top_k_of_all_experts_is_the_dense_mixture():
    layer, x = moe(top_k=E), inputs()
    p = (x @ layer.router.weight.T).softmax(-1)
    outputs = []
    for gate_up, down in zip(layer.experts.gate_up_proj, layer.experts.down_proj, strict=True):
        gate, up = (x @ gate_up.T).split(8, -1)
        outputs.append((F.silu(gate) * up) @ down.T)
    dense = torch.einsum("bte,ebtd->btd", p, torch.stack(outputs))
    torch.testing.assert_close(layer(x), dense)


def test_identical_experts_are_one_layer():
    layer, x = moe(top_k=3), inputs()
    with torch.no_grad():
        for parameter in layer.experts.parameters():
            parameter.copy_(parameter[:1].expand_as(parameter))
    expected = torch.stack([one_expert(layer.experts, 0, token) for token in x.flatten(0, 1)]).view_as(x)
    torch.testing.assert_close(layer(x), expected)


def test_an_expert_without_tokens_computes_nothing_and_gets_a_zero_gradient():
    layer, x = moe(bias=True), inputs()
    with torch.no_grad():
        layer.router.bias[[0, 4]] = -1e6
    y = layer(x)
    torch.testing.assert_close(y, token_by_token(layer, x))
    y.square().sum().backward()
    used = layer.experts.down_proj.grad.flatten(1).any(1)
    assert used.tolist() == [False, True, True, True, False, True]
    layer(x[:1, :1])  # one token: most experts are empty


def test_every_token_of_one_expert_works():
    layer, x = moe(top_k=1, bias=True, normalize=False), inputs()
    with torch.no_grad():
        layer.router.bias[E - 1] = 1e6
    torch.testing.assert_close(layer(x), token_by_token(layer, x))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_the_grouped_kernel_equals_the_loop_with_its_gradients(dtype, tolerance):
    torch.manual_seed(0)
    x, w = torch.randn(20, D).to(dtype), torch.randn(E, 8, D).to(dtype)
    upstream = torch.randn(20, 8).to(dtype)
    ends = torch.tensor([3, 3, 8, 9, 20, 20], dtype=torch.int32)
    results = []
    for compute in (grouped_linear, looped_linear):
        inputs_ = [x.clone().requires_grad_(), w.clone().requires_grad_()]
        y = compute(*inputs_, ends)
        results.append([y, *torch.autograd.grad(y, inputs_, upstream)])
    for grouped, looped in zip(*results, strict=True):
        torch.testing.assert_close(grouped, looped, rtol=tolerance, atol=tolerance)


def test_double_precision_takes_the_loop_and_all_others_the_kernel(monkeypatch):
    calls = []
    kernel = F.grouped_mm
    monkeypatch.setattr(F, "grouped_mm", lambda *a, **k: calls.append(a[0].dtype) or kernel(*a, **k))
    layer, x = moe(), inputs()
    in_double = layer(x)
    assert calls == []
    in_float = layer.float()(x.float())
    assert calls == [torch.float32] * 2
    torch.testing.assert_close(in_float.double(), in_double, rtol=0, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        in_half = layer(x.float())
    assert calls[2:] == [torch.bfloat16] * 2 and in_half.dtype is torch.float32
    torch.testing.assert_close(in_half.double(), in_double, rtol=0.1, atol=0.1)


def test_widths_that_the_kernel_refuses_take_the_loop():
    layer = MoE(SoftmaxRouter(10, E, 2), GatedExperts(10, 6, E)).eval()
    redraw(layer)
    x = torch.randn(2, 5, 10)
    torch.testing.assert_close(layer(x), copy.deepcopy(layer).double()(x.double()).float(), rtol=0, atol=1e-5)


def test_work_for_a_token_does_not_grow_with_the_number_of_experts():
    def flops(n_experts):
        layer = MoE(SoftmaxRouter(D, n_experts, 2), GatedExperts(D, 8, n_experts)).double()
        with FlopCounterMode(display=False) as counter:
            layer(inputs())
        return counter.get_total_flops() - 2 * 21 * D * n_experts  # the router scores every expert

    assert flops(4) == flops(8) == flops(64) == 21 * 2 * (2 * 3 * D * 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_expert_is_handed_its_own_rows_only(dtype):
    layer, x = moe().to(dtype), inputs().to(dtype)
    handed = []
    layer.experts.register_forward_hook(lambda module, arguments, result: handed.append(arguments))
    layer(x)
    rows, ends = handed[0]
    counts = torch.bincount(layer.router(x)[0].flatten(), minlength=E)
    assert len(rows) == x.shape[0] * x.shape[1] * 2
    assert ends.diff(prepend=torch.zeros(1)).tolist() == counts.tolist()


# The routers


def test_the_router_learns_from_the_loss_of_the_model_alone():
    for router, settings in [(SoftmaxRouter, {"top_k": 2}), (SigmoidRouter, {"top_k": 2}), (SwitchRouter, {})]:
        layer = drawn(MoE(router(D, E, **settings), GatedExperts(D, 8, E))).train()
        layer(inputs()).square().sum().backward()
        assert layer.router.weight.grad.any(), router


def test_the_router_is_never_computed_in_half_precision():
    router, x = moe().router.float(), inputs().float()
    with torch.autocast("cpu", torch.bfloat16):
        logits = router.logits(x)
    torch.testing.assert_close(logits, F.linear(x, router.weight), rtol=0, atol=1e-6)
    assert router.bfloat16().logits(x.bfloat16()).dtype is torch.float32


def test_the_bias_moves_the_choice_but_no_weight():
    router, x = moe(SigmoidRouter, top_k=2, normalize=False).router, inputs()
    router.expert_bias[3] = 10.0
    experts, weights = router(x)
    scores = router.logits(x).sigmoid()
    assert (experts == 3).any(-1).all()
    torch.testing.assert_close(weights, scores.gather(-1, experts))


@pytest.mark.parametrize("best", [1, 2])
@pytest.mark.parametrize("n_groups", [4, 12])  # of three experts and of one
def test_only_the_best_groups_are_left(n_groups, best):
    scores, size = inputs()[..., :12].abs(), 12 // n_groups
    left = best_of_groups(scores, n_groups, n_kept=2, best=best)
    for row, kept in zip(scores.flatten(0, 1).tolist(), left.flatten(0, 1).tolist(), strict=True):
        groups = [row[i : i + size] for i in range(0, 12, size)]
        ranked = sorted(range(n_groups), key=lambda g: -sum(sorted(groups[g])[-best:]))
        expected = [s if i // size in ranked[:2] else -math.inf for i, s in enumerate(row)]
        assert kept == expected


@pytest.mark.parametrize(
    "settings, flag",
    [
        ({"n_experts": 4, "top_k": 5}, "--model.top-k"),
        ({"n_experts": 4, "top_k": 0}, "--model.top-k"),
        ({"n_experts": 9, "top_k": 2, "n_groups": 2}, "--model.n-groups"),
        ({"n_experts": 8, "top_k": 2, "n_groups": 2, "top_k_groups": 3}, "top_k_groups = 3"),
        ({"n_experts": 8, "top_k": 3, "n_groups": 4, "top_k_groups": 1}, "--model.top-k-groups"),
    ],
)
def test_impossible_routing_is_refused_with_the_flag_that_mends_it(settings, flag):
    with pytest.raises(ValueError, match=flag):
        check_routing(**settings)


# Balance


def test_the_balance_loss_is_smallest_at_an_even_load():
    even, skewed = torch.full((1, 12, E), 1 / E), torch.tensor([0.5, 0.3, 0.1, 0.05, 0.03, 0.02]).expand(1, 12, E)
    assert balance_loss(even, torch.full((1, E), 2.0)).item() == pytest.approx(1)
    assert balance_loss(skewed, torch.tensor([[12.0, 0, 0, 0, 0, 0]])) > 1
    one = F.one_hot(torch.zeros(1, 12, dtype=torch.int64), E).float()
    assert balance_loss(one, one.sum(1)).item() == pytest.approx(E)
    for _ in range(50):  # where the load follows the probabilities, it is E sum P^2, at least 1
        p = torch.randn(1, E).mul(3).softmax(-1)
        assert balance_loss(p[None], p) >= 1 - 1e-6


def test_the_balance_loss_is_the_mean_over_sequences_of_their_own_losses():
    p, counts = torch.randn(4, 12, E).softmax(-1), torch.randint(1, 9, (4, E)).float()
    alone = [balance_loss(p[i : i + 1], counts[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(balance_loss(p, counts), torch.stack(alone).mean())
    by_loop = [
        E * sum(counts[b, i] / counts[b].sum() * sum(p[b, t, i] for t in range(12)) / 12 for i in range(E))
        for b in range(4)
    ]
    torch.testing.assert_close(balance_loss(p, counts), sum(by_loop) / 4)


def test_following_the_balance_loss_evens_the_load():
    router, x = moe(top_k=1, normalize=False, aux_loss_coef=1.0, bias=True).router.train(), inputs(4, 100)
    before = torch.bincount(router(x)[0].flatten(), minlength=E)
    for _ in range(300):
        router(x)
        gradients = torch.autograd.grad(router.aux_loss, list(router.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(router.parameters(), gradients, strict=True):
                parameter -= 0.5 * gradient
    after = torch.bincount(router(x)[0].flatten(), minlength=E)
    assert before.max() > 1.6 * 400 / E and after.max() < 1.25 * 400 / E
    assert router.aux_loss < 1.05


def test_the_z_loss_is_the_mean_square_of_log_z():
    logits = inputs()[..., :E]
    rows = logits.flatten(0, 1).tolist()
    expected = sum(math.log(sum(map(math.exp, row))) ** 2 for row in rows) / len(rows)
    assert z_loss(logits).item() == pytest.approx(expected)


def test_the_coefficients_weigh_the_two_losses():
    router, x = moe(aux_loss_coef=0.25, z_loss_coef=0.5).router.train(), inputs()
    experts, _ = router(x)
    logits = router.logits(x)
    p, chosen = logits.softmax(-1), torch.stack([torch.bincount(row.flatten(), minlength=E) for row in experts])
    torch.testing.assert_close(router.aux_loss, 0.25 * balance_loss(p, chosen) + 0.5 * z_loss(logits))


def test_the_bias_moves_towards_the_mean_load_by_its_speed():
    router = SigmoidRouter(D, 4, 1, bias_update_speed=0.01)
    router.rebalance(torch.tensor([5.0, 1.0, 3.0, 3.0]))
    assert router.expert_bias.tolist() == pytest.approx([-0.01, 0.01, 0, 0])
    assert not router.expert_bias.requires_grad and "expert_bias" in router.state_dict()


@pytest.mark.parametrize("name", ["switch_transformer", "mixture_of_experts"])
def test_the_balance_loss_counts_in_training_only(name, tokens):
    model = tiny_model(name)
    loss, parts = model.train().loss(tokens)
    assert parts["aux"] > 0
    assert loss > parts["ce"]
    assert model.eval().loss(tokens)[1]["aux"] == 0


def test_the_bias_balances_without_any_loss(tokens):
    model = tiny_model("loss_free_balancing", bias_update_speed=0.02).train()
    assert model.loss(tokens)[1]["aux"] == 0
    first = None
    for _ in range(60):
        model.loss(tokens)
        model.after_step()
        first = first or model.metrics()
    spread = [max(m["expert_load/0"]) - min(m["expert_load/0"]) for m in (first, model.metrics())]
    assert spread[1] < 0.4 * spread[0]


def test_choices_are_summed_over_micro_batches_and_counted_once_where_forward_is_recomputed(tokens):
    plain = tiny_model("loss_free_balancing").train()
    recomputing = copy.deepcopy(plain)
    for block in recomputing.blocks:
        block.forward = lambda *arguments, inner=block.forward: checkpoint(inner, *arguments, use_reentrant=False)
    for model in (plain, recomputing):
        for micro_batch in (tokens[:2], tokens[2:]):
            model.loss(micro_batch)[0].backward()
        chosen = model.blocks[0].ffn.router.total[: model.config.n_experts].sum()
        assert chosen == tokens[:, :-1].numel() * model.config.top_k
        model.after_step()
        for router in (block.ffn.router for block in model.blocks):
            assert router.total is router.aux_loss is router.seen is None
    assert plain.metrics() == recomputing.metrics()
    torch.testing.assert_close(recomputing.state_dict(), plain.state_dict())
    for one, other in zip(plain.parameters(), recomputing.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_evaluation_and_a_step_without_tokens_change_no_bias(tokens):
    model = tiny_model("loss_free_balancing")
    before = copy.deepcopy(model.state_dict())
    model.loss(tokens)
    model.after_step()
    assert model.metrics() == {}
    torch.testing.assert_close(model.state_dict(), before)


def test_the_total_of_each_layer_is_reduced_once_over_the_ranks(tokens, monkeypatch):
    model = tiny_model("loss_free_balancing").train()
    model.loss(tokens)
    own = [block.ffn.router.total.clone() for block in model.blocks]
    reduced = []

    def other_rank_sent_all_to_expert_0_of_the_first_layer(total):
        total[0] += 0 if reduced else 10_000
        reduced.append(total.shape)

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", other_rank_sent_all_to_expert_0_of_the_first_layer)
    model.after_step()
    assert len(reduced) == len(model.blocks)
    first, second = (block.ffn.router for block in model.blocks)
    assert first.last_step[0] == own[0][0] + 10_000 and torch.equal(second.last_step, own[1])
    speed = model.config.bias_update_speed
    changes = first.expert_bias.new_full((16,), speed)
    changes[0] = -speed
    torch.testing.assert_close(first.expert_bias, changes)


@pytest.mark.parametrize("name", MOE_MODELS)
def test_metrics_say_how_busy_the_experts_were(name, tokens):
    model = tiny_model(name, **({"capacity_factor": 0.5} if name == "switch_transformer" else {})).train()
    model.loss(tokens)
    model.after_step()
    metrics = model.metrics()
    n_experts = model.config.n_experts
    for layer in range(2):
        load = metrics[f"expert_load/{layer}"]
        assert len(load) == n_experts and sum(load) == pytest.approx(1)
    assert all(0 < nats < math.log(n_experts) for nats in metrics["router_entropy"])
    assert all((share > 0) == (name == "switch_transformer") for share in metrics["dropped_share"])


def test_metrics_are_those_of_the_choices():
    model = tiny_model("mixture_of_experts", n_layers=1).train()
    tokens = torch.randint(97, (2, 9), generator=torch.Generator().manual_seed(3))
    routed = []
    router = model.blocks[0].ffn.router
    router.register_forward_hook(lambda module, arguments, result: routed.append((arguments[0], result[0])))
    model.loss(tokens)
    model.after_step()
    x, experts = routed[0]
    p = (x @ router.weight.T).softmax(-1)
    counts = torch.bincount(experts.flatten(), minlength=16)
    assert model.metrics()["expert_load/0"] == pytest.approx((counts / counts.sum()).tolist())
    assert model.metrics()["router_entropy"] == pytest.approx([-(p * p.log()).sum(-1).mean().item()])


def test_a_compiled_loss_is_one_graph_and_equal(tokens):
    model = tiny_model("loss_free_balancing", n_layers=1).bfloat16().train()
    compiled = torch.compile(model.loss, backend="eager", fullgraph=True)
    losses = []
    for loss in (model.loss, compiled):
        for _ in range(2):
            losses.append(loss(tokens)[0])
        model.after_step()
        losses.append(torch.tensor(model.metrics()["router_entropy"]).sum())
        for block in model.blocks:
            block.ffn.router.last_step = None
    torch.testing.assert_close(losses[:3], losses[3:], rtol=1e-2, atol=1e-2)


def test_a_new_load_compiles_nothing_anew():
    layer, counter = moe().float(), CompileCounter()
    compiled = torch.compile(layer, backend=counter)
    frames = []
    for x in inputs(6, 7).float().split(2):
        torch.testing.assert_close(compiled(x), layer(x))
        frames.append(counter.frame_count)
    assert frames[0] == frames[-1] > 0


# Switch


def switch(**settings) -> MoE:
    return drawn(MoE(SwitchRouter(D, E, **settings), PlainExperts(D, 8, E)))


def test_a_switch_scales_its_expert_by_the_probability():
    layer, x = switch(), inputs()
    p, i = (x @ layer.router.weight.T).softmax(-1).max(-1)
    expected = torch.stack([one_expert(layer.experts, i[b, t], x[b, t]) for b in range(3) for t in range(7)])
    torch.testing.assert_close(layer(x), p[..., None] * expected.view_as(x))


def test_tokens_past_the_capacity_of_their_sequence_are_dropped_in_training_only():
    layer, x = switch(capacity_factor=1.0), inputs(3, 12)
    kept_all = layer(x)
    assert kept_all.any(-1).all()
    y = layer.train()(x)
    experts = layer.router(x)[0]
    n_dropped = 0
    for b in range(3):
        taken = [0] * E
        for t in range(12):
            i = int(experts[b, t])
            taken[i] += 1
            expected = kept_all[b, t] if taken[i] <= 2 else torch.zeros(D, dtype=x.dtype)  # 12 tokens / 6 experts
            n_dropped += taken[i] > 2
            torch.testing.assert_close(y[b, t], expected)
    assert n_dropped > 5
    torch.testing.assert_close(layer(x[:1]), y[:1])  # the other sequences take no room
    assert layer.router.seen[E] == sum((layer.router(x[:1])[1] == 0).flatten())


def test_a_large_capacity_drops_nothing():
    layer, x = switch(capacity_factor=float(E)), inputs()
    torch.testing.assert_close(layer.train()(x), layer.eval()(x))


def test_a_capacity_of_nothing_is_refused():
    with pytest.raises(ValueError, match=r"--model\.capacity-factor"):
        SwitchRouter(D, E, capacity_factor=0)


# Expert choice


def test_expert_choice_is_a_loop_over_experts_that_take_their_best_tokens():
    layer, x = drawn(ExpertChoice(D, E, GatedExperts(D, 8, E), capacity_factor=2.0)), inputs(3, 9)
    expected = torch.zeros_like(x)
    for b in range(3):
        scores = (x[b] @ layer.weight.T).softmax(-1)
        for i in range(E):
            for t in sorted(range(9), key=lambda t: -scores[t, i].item())[:3]:  # 2 * 9 / 6
                expected[b, t] += scores[t, i] * one_expert(layer.experts, i, x[b, t])
    torch.testing.assert_close(layer(x), expected)
    layer(x).square().sum().backward()
    assert all(parameter.grad.any() for parameter in layer.parameters())


def test_expert_choice_lets_the_future_change_the_past():
    layer, x = drawn(ExpertChoice(D, E, GatedExperts(D, 8, E), capacity_factor=1.0)), inputs(1, 12)
    changed = x.clone()
    changed[:, -1] = 5 * x[:, 0]  # the expert that likes token 0 best likes this one better
    assert not torch.allclose(layer(x)[:, :-1], layer(changed)[:, :-1])


# Against transformers


@pytest.fixture
def transformers(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return pytest.importorskip("transformers")


def assert_equal_layers(theirs, ours, renamed, x):
    """Copy re-drawn parameters and buffers over by name, then compare outputs and gradients of the input."""
    torch.manual_seed(0)
    redraw(theirs)
    for buffer in theirs.buffers():
        buffer.copy_(torch.rand_like(buffer))
    state = {}
    for name, tensor in theirs.state_dict().items():
        for old, new in renamed.items():
            name = name.replace(old, new)
        state[name] = tensor
    ours.load_state_dict(state)
    results = []
    for layer in (theirs.eval(), ours.eval()):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y = y[0] if isinstance(y, tuple) else y
        results.append((y, *torch.autograd.grad(y.square().sum(), leaf)))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=0, atol=2e-5)
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-4, atol=1e-4)


NAMES = {"gate.": "router.", "e_score_correction_bias": "expert_bias", "shared_experts": "shared"}


def test_mixtral(transformers):
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = transformers.MixtralConfig(
        hidden_size=D, intermediate_size=8, num_local_experts=E, num_experts_per_tok=2, num_attention_heads=2
    )
    config._experts_implementation = "eager"
    ours = MoE(SoftmaxRouter(D, E, 2), GatedExperts(D, 8, E))
    assert_equal_layers(MixtralSparseMoeBlock(config), ours, NAMES, inputs().float())


@pytest.mark.parametrize("normalize", [True, False])
def test_qwen3_moe(transformers, normalize):
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = transformers.Qwen3MoeConfig(
        hidden_size=D, moe_intermediate_size=8, num_experts=E, num_experts_per_tok=3, norm_topk_prob=normalize
    )
    config._experts_implementation = "eager"
    ours = MoE(SoftmaxRouter(D, E, 3, normalize=normalize), GatedExperts(D, 8, E))
    assert_equal_layers(Qwen3MoeSparseMoeBlock(config), ours, NAMES, inputs().float())


@pytest.mark.parametrize("normalize", [True, False])
def test_deepseek_v3(transformers, normalize):
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    config = transformers.DeepseekV3Config(
        hidden_size=D, moe_intermediate_size=8, n_routed_experts=12, num_experts_per_tok=3, n_shared_experts=2,
        n_group=4, topk_group=2, norm_topk_prob=normalize, routed_scaling_factor=2.5,
    )  # fmt: skip
    config._experts_implementation = "eager"
    router = SigmoidRouter(D, 12, 3, normalize=normalize, scale=2.5, n_groups=4, top_k_groups=2)
    ours = MoE(router, GatedExperts(D, 8, 12), SwiGLU(D, 16))
    assert_equal_layers(DeepseekV3MoE(config), ours, NAMES, inputs().float())


@pytest.mark.parametrize("method, groups", [("greedy", 1), ("group_limited_greedy", 4)])
def test_deepseek_v2(transformers, method, groups):
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe

    config = transformers.DeepseekV2Config(
        hidden_size=D, moe_intermediate_size=8, n_routed_experts=12, num_experts_per_tok=3, n_shared_experts=1,
        n_group=4, topk_group=2, topk_method=method, routed_scaling_factor=3.0, num_attention_heads=2,
    )  # fmt: skip
    config._experts_implementation = "eager"
    router = SoftmaxRouter(D, 12, 3, normalize=False, scale=3.0, n_groups=groups, top_k_groups=min(groups, 2))
    ours = MoE(router, GatedExperts(D, 8, 12), SwiGLU(D, 8))
    assert_equal_layers(DeepseekV2Moe(config), ours, NAMES, inputs().float())


def test_the_router_of_gpt_oss(transformers):
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter

    config = transformers.GptOssConfig(hidden_size=D, num_local_experts=E, num_experts_per_tok=3)
    theirs, ours = GptOssTopKRouter(config), SoftmaxRouter(D, E, 3, bias=True)
    redraw(theirs)
    ours.load_state_dict(theirs.state_dict())
    x = inputs().float().flatten(0, 1)
    _, weights, experts = theirs(x)
    assert torch.equal(ours(x)[0], experts)
    torch.testing.assert_close(ours(x)[1], weights, rtol=0, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_switch_transformers(transformers, training):
    """Theirs drops in evaluation, too: compared there with room for all."""
    from transformers.models.switch_transformers import modeling_switch_transformers as modeling

    capacity = 2 if training else 12  # of 12 tokens, 6 experts
    config = transformers.SwitchTransformersConfig(
        d_model=D, d_ff=8, num_experts=E, expert_capacity=capacity, dense_act_fn="gelu", router_jitter_noise=0.0,
        dropout_rate=0.0,
    )  # fmt: skip
    theirs = modeling.SwitchTransformersSparseMLP(config).train(training)
    redraw(theirs)
    router = SwitchRouter(D, E, capacity_factor=1.0, aux_loss_coef=1.0)
    ours = MoE(router, PlainExperts(D, 8, E)).train(training)
    with torch.no_grad():
        router.weight.copy_(theirs.router.classifier.weight)
        for name, weight in (("wi", ours.experts.up_proj), ("wo", ours.experts.down_proj)):
            weight.copy_(torch.stack([getattr(expert, name).weight for expert in theirs.experts.values()]))
    x = inputs(3, 12).float()
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=2e-5)
    if training:
        _, _, logits = theirs.router(x)
        torch.testing.assert_close(z_loss(logits), modeling.router_z_loss_func(logits))
        expected = modeling.load_balancing_loss_func(logits.softmax(-1), logits.argmax(-1))  # a group is a sequence
        torch.testing.assert_close(router.aux_loss, expected)
