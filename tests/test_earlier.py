"""What earlier code wrote is opened, and training goes on from it to the weights that the earlier code reached."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training import config_of

from llm.config import TrainConfig
from llm.data.files import open_tokens
from llm.generate.load import load_run
from llm.models import MODELS
from llm.training.checkpoint import find_checkpoints
from llm.training.loop import train
from llm.training.run_directory import RunDirectory

EARLIER = Path(__file__).parent / "earlier"  # README.md there says how it was written
every_run = pytest.mark.parametrize("name", ["baseline", "deepseek_v3", "loss_free_balancing"])


def test_the_token_arrays_open():
    data = open_tokens(EARLIER / "data")
    assert (len(data.train), len(data.eval), data.vocab_size, data.eot) == (4641, 1617, 300, 0)


@every_run
def test_the_checkpoint_opens(name):
    model, tokenizer = load_run(EARLIER / name, torch.device("cpu"))
    assert type(model) is MODELS[name] and tokenizer.get_vocab_size() == 300
    saved = load_file(EARLIER / name / "checkpoints" / "step-000002" / "model.safetensors")
    assert model.state_dict().keys() == saved.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())


@every_run
def test_training_goes_on_to_the_same_weights(name, tmp_path, monkeypatch):
    monkeypatch.setattr(RunDirectory, "plot", lambda self: None)
    run = shutil.copytree(EARLIER / name, tmp_path / name)
    settings = config_of(run)
    Model, data = MODELS[name], open_tokens(EARLIER / "data")
    config = TrainConfig(**settings["train"] | {"data": EARLIER / "data", "out": run, "wandb": "off"})
    train(Model, Model.Config(**settings["model"]), config, data)
    newest = find_checkpoints(run / "checkpoints")[-1]
    assert newest.name == "step-000004"
    found, expected = load_file(newest / "model.safetensors"), load_file(run / "expected.safetensors")
    assert found.keys() == expected.keys()
    for tensor in found:
        torch.testing.assert_close(found[tensor], expected[tensor], rtol=0, atol=1e-6)
