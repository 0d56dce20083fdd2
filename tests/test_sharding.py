"""Ranks that share out the weights train as one process does, and their checkpoints are everyone's."""

import json
import traceback

import pytest
import torch
from conftest import VOCABULARY, tiny_model
from test_distributed import on_ranks
from training import write_corpus

from llm.config import TrainConfig
from llm.generate.sampling import greedy
from llm.models import MODELS
from llm.training.device import Machine
from llm.training.distributed import Ranks, join_ranks, leave_ranks
from llm.training.gradient import compute_gradient, make_objective
from llm.training.optim import make_optimizer
from llm.training.run_directory import RunDirectory
from llm.training.sharding import gathered, place, whole, whole_outside_blocks

WINDOWS, LENGTH, STEPS = 4, 16, 2
TINY = {"d_model": 64, "max_seq_len": LENGTH}
ALONE = Ranks()
pytestmark = pytest.mark.filterwarnings("ignore:Unable to enable fault handler")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True, scope="module")
def no_picture():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunDirectory, "plot", lambda self: None)
        yield


def trained(name: str, config: TrainConfig, ranks: Ranks = ALONE) -> dict:
    """Two steps in float64, in micro-batches of one window: losses, gradient norms, what the model writes, weights."""
    machine = Machine(torch.device("cpu"), bf16=False, compile=False)
    model = place(tiny_model(name, max_seq_len=LENGTH).train(), config, machine, ranks)
    optimizer = make_optimizer(model, config)
    objective = make_objective(model, config, machine, ranks)
    found = []
    for step in range(STEPS):
        tokens = torch.randint(VOCABULARY, (WINDOWS, LENGTH + 1), generator=torch.Generator().manual_seed(step))
        batches = list(enumerate(tokens.split(1)))[ranks.rank :: ranks.world_size]
        parts = compute_gradient(objective, batches, (0, step), machine)
        norm = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1))
        found += [norm, *(ranks.average(part) for part in parts.values())]
        optimizer.step()
        optimizer.zero_grad()
        model.after_step()
    model.eval()
    with whole_outside_blocks(model):
        text = [tokens.tolist() for tokens in model.generate(tokens[:1, :4], 4, greedy)]
    weights = gathered(model.state_dict(), ranks)
    return {"figures": torch.stack(found), "text": text, "weights": weights}


def difference(found: dict, expected: dict) -> float:
    """The largest relative difference of a figure or of a tensor of weights; infinite where the texts differ."""
    pairs = [(found["figures"], expected["figures"])]
    pairs += [(found["weights"][name], tensor) for name, tensor in expected["weights"].items()]
    apart = max(((one - other).norm() / other.norm().clamp(min=1e-9)).item() for one, other in pairs)
    return apart if found["text"] == expected["text"] else float("inf")


@pytest.fixture(scope="module")
def alone():
    """Every model trained by one process."""
    return {name: trained(name, TrainConfig()) for name in MODELS}


@pytest.mark.parametrize("n_ranks", [2, 4])
def test_every_model_trains_sharded_as_it_does_alone(alone, n_ranks, tmp_path):
    config = TrainConfig(shard=True, recompute=n_ranks == 4)

    def act(rank):
        ranks, apart = join_ranks(), {}
        for name in MODELS:
            try:
                found = trained(name, config, ranks)
                apart[name] = difference(found, alone[name]) if ranks.is_first else 0
            except Exception:
                apart[name] = traceback.format_exc()
        (tmp_path / f"{rank}.json").write_text(json.dumps(apart), encoding="utf-8")
        leave_ranks()

    assert on_ranks(n_ranks, act) == [0] * n_ranks
    for rank in range(n_ranks):
        apart = json.loads((tmp_path / f"{rank}.json").read_text(encoding="utf-8"))
        assert apart.keys() == MODELS.keys()
        assert {name: value for name, value in apart.items() if isinstance(value, str) or value > 1e-6} == {}
