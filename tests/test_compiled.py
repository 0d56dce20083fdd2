"""Every model compiled, on the GPU where there is one: logits, loss and gradients are those of the eager CPU."""

import copy

import pytest
import torch
from conftest import VOCABULARY, tiny_model

from llm.models import MODELS
from llm.training.gradient import Objective

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
QUICK = ("baseline", "mixtral", "deepseek_v3", "hybrid")  # no auxiliary loss, two kinds of it, and a recurrent state
every_model = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in MODELS]
)


@pytest.fixture(autouse=True)
def forget_what_was_compiled():
    torch.compiler.reset()


def windows(length):
    return torch.randint(VOCABULARY, (3, length), generator=torch.Generator().manual_seed(1))


@every_model
@torch.inference_mode()
def test_logits_in_bf16_are_as_near_to_float64_as_uncompiled_ones(name):
    model, tokens = tiny_model(name), windows(24)
    exact = model(tokens)
    rounding = (copy.deepcopy(model).bfloat16()(tokens) - exact).abs().mean()
    logits = torch.compile(model.to(DEVICE, torch.bfloat16))(tokens.to(DEVICE))
    assert (logits.cpu() - exact).abs().mean() < 1.5 * rounding


@every_model
def test_a_training_step_has_the_loss_and_the_gradients_of_an_uncompiled_one(name):
    losses, gradients = [], []
    for device, compiles in (("cpu", False), (DEVICE, True)):
        model = tiny_model(name).float().to(device).train()
        objective = Objective(model, compiles, insist=True)
        with torch.autocast(device, torch.bfloat16):
            loss, _ = objective(windows(25).to(device))
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None]))
    assert abs(losses[1] / losses[0] - 1) < 0.02
    assert torch.cosine_similarity(*gradients, dim=0) > 0.95
