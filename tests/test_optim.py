"""What each optimiser does to which parameter, and that a run with Muon goes on exactly."""

import re

import pytest
import torch
from conftest import tiny_model
from training import evaluations, losses, same_weights, train_baseline, train_model, write_corpus

from llm.config import TrainConfig
from llm.models import MODELS
from llm.training import optim
from llm.training.checkpoint import find_checkpoints
from llm.training.optim import fit_groups, make_optimizer, split_by_decay


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("name", MODELS)
def test_muon_takes_the_matrices_of_the_blocks_and_every_parameter_has_one_optimiser(name):
    model = tiny_model(name)
    optimizer = make_optimizer(model, TrainConfig(optimizer="muon"))
    muon = [p for group in optimizer.parts["muon"].param_groups for p in group["params"]]
    adamw = [p for group in optimizer.parts["adamw"].param_groups for p in group["params"]]
    assert sorted(map(id, muon + adamw)) == sorted(map(id, model.parameters()))
    owner = dict.fromkeys(map(id, muon), "muon") | dict.fromkeys(map(id, adamw), "adamw")
    assert owner[id(model.tok_embed.weight)] == "adamw"
    projections = [p for n, p in model.blocks.named_parameters() if n.endswith("o_proj.weight")]
    assert projections
    assert {owner[id(p)] for p in projections} == {"muon"}


MATRIX = r".*(_proj|shared\.gate|\.proj|router|tok_embed|table|lm_head|\.conv)\.weight|.*experts\.\w+_proj|"
MATRIX += r".*\.(recurrent|input)_weight"
VECTOR = r".*norm\.(weight|bias)|.*\.bias|.*_bias|.*\.sinks|.*mixer\.[uv]|"
VECTOR += r".*\.(A_log|Lambda|D|mu|k_a|k_k|r_k|place|hidden_token)"


@pytest.mark.parametrize("name", MODELS)
def test_the_role_of_every_parameter_decides_whether_it_decays_not_its_number_of_axes(name):
    """Matrices of a product, convolutions and embeddings decay. Gains, biases, sinks, rates, places in a block, and the
    vectors of Transformer-XL (u, v) and RWKV-7 (mu, k_a, k_k, r_k) do not."""
    model = tiny_model(name)
    decaying = set(map(id, split_by_decay(model)[0]))
    for parameter_name, parameter in model.named_parameters():
        is_matrix, is_vector = (re.fullmatch(role, parameter_name) is not None for role in (MATRIX, VECTOR))
        assert is_matrix != is_vector, f"{parameter_name} has no role here: say which in MATRIX or VECTOR"
        assert (id(parameter) in decaying) == is_matrix, parameter_name


@pytest.mark.parametrize("shape", [(48, 48), (16, 64), (64, 16)])
def test_a_step_of_muon_is_the_orthogonal_factor_of_the_gradient(shape):
    """Against the singular value decomposition: Newton-Schulz brings each singular value near 1, not onto it."""
    model = torch.nn.Module()
    model.blocks = torch.nn.Linear(shape[1], shape[0], bias=False)
    before = model.blocks.weight.detach().clone()
    optimizer = make_optimizer(model, TrainConfig(optimizer="muon", weight_decay=0.0, max_lr=0.1))
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    model.blocks.weight.grad = gradient.clone()
    optimizer.step()
    step = (before - model.blocks.weight.detach()) / (0.1 * 0.2 * max(shape) ** 0.5)
    u, _, vt = torch.linalg.svd(gradient, full_matrices=False)
    mixed = u.T @ step @ vt.T
    assert mixed.diagonal().min() > 0.5
    assert mixed.diagonal().max() < 1.3
    assert (mixed - mixed.diagonal().diag()).abs().max() < 0.03


@pytest.mark.parametrize(("has_bf16", "tolerance"), [(True, 0), (False, 2e-3)])
def test_muon_is_torchs_up_to_the_dtype_of_its_iteration(has_bf16, tolerance, monkeypatch):
    monkeypatch.setattr(optim, "multiplies_bf16", lambda device: has_bf16)
    draw = torch.Generator().manual_seed(0)
    for shape in ((12, 20), (20, 12)):
        ours = torch.nn.Parameter(torch.randn(shape, generator=draw))
        theirs = torch.nn.Parameter(ours.detach().clone())
        both = [optim.Muon([ours], 0.1, 0.3)]
        both += [torch.optim.Muon([theirs], lr=0.1, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")]
        for _ in range(3):
            ours.grad = torch.randn(shape, generator=draw)
            theirs.grad = ours.grad.clone()
            for optimizer in both:
                optimizer.step()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)
        assert not has_bf16 or both[0].state_dict()["state"][0].keys() == both[1].state_dict()["state"][0].keys()


def test_both_optimisers_decay_and_take_the_rate_of_the_schedule():
    model = tiny_model("baseline")
    optimizer = make_optimizer(model, TrainConfig(optimizer="muon", weight_decay=0.5))
    for parameter in model.parameters():
        parameter.data.fill_(1.0)
        parameter.grad = torch.zeros_like(parameter)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    optimizer.step()
    for parameter in model.parameters():
        torch.testing.assert_close(parameter.mean().item(), 0.95 if parameter.dim() == 2 else 1.0)


def test_a_run_with_muon_learns_and_goes_on_to_the_last_bit(data, tmp_path):
    straight = train_baseline(data, tmp_path / "straight", "--optimizer", "muon")
    curve = evaluations(straight)
    assert curve[20]["eval_loss"] < curve[0]["eval_loss"] - 0.1
    half = find_checkpoints(straight / "checkpoints")[0]
    resumed = train_baseline(data, tmp_path / "resumed", "--optimizer", "muon", "--resume", half)
    assert same_weights(straight, resumed)
    assert losses(resumed)[20] == losses(straight)[20]


@pytest.mark.parametrize("name", ["hybrid", "rwkv7"])
def test_a_run_of_a_recurrent_model_goes_on_to_the_last_bit(data, tmp_path, name):
    straight = train_model(name, data, tmp_path / "straight")
    half = find_checkpoints(straight / "checkpoints")[0]
    resumed = train_model(name, data, tmp_path / "resumed", "--resume", half)
    assert same_weights(straight, resumed)
    assert losses(resumed)[20] == losses(straight)[20]


@pytest.mark.parametrize(("saved", "given"), [("adamw", "muon"), ("muon", "adamw")])
def test_the_state_of_another_optimiser_is_refused(data, tmp_path, capsys, saved, given):
    first = train_baseline(data, tmp_path / "first", "--optimizer", saved, "--steps", 5)
    for flags in (("--out", first), ("--resume", find_checkpoints(first / "checkpoints")[-1])):
        with pytest.raises(SystemExit):
            train_baseline(data, tmp_path / "other", "--optimizer", given, "--steps", 5, *flags)
        assert "optimizer" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["gpt_oss", "relative_position", "baseline"])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_state_saved_when_axes_alone_decided_on_decay_fits_the_groups_of_today(name, kind):
    model = tiny_model(name).float().train()
    optimizer = make_optimizer(model, TrainConfig(optimizer=kind))
    adamw = optimizer if kind == "adamw" else optimizer.parts["adamw"]
    held = [p for group in adamw.param_groups for p in group["params"]]
    mine = [p for p in model.parameters() if any(p is other for other in held)]
    groups = [{"params": [p for p in mine if p.dim() >= 2]}, {"params": [p for p in mine if p.dim() < 2]}]
    earlier = torch.optim.AdamW(groups, fused=True)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    earlier.step()
    saved = earlier.state_dict() if kind == "adamw" else optimizer.state_dict() | {"adamw": earlier.state_dict()}
    optimizer.load_state_dict(fit_groups(saved, model, optimizer))
    for p in mine:
        assert torch.equal(adamw.state[p]["exp_avg"], earlier.state[p]["exp_avg"])
    assert fit_groups(optimizer.state_dict(), model, optimizer) == optimizer.state_dict()
