"""One step of 16 windows has one gradient, in however many micro-batches and on however many ranks it is computed."""

import torch
from conftest import VOCABULARY, tiny_model
from test_distributed import on_two_ranks

from llm.config import TrainConfig
from llm.models import MODELS
from llm.training.device import Machine
from llm.training.distributed import Ranks, join_ranks, leave_ranks
from llm.training.gradient import compute_gradient, make_objective, with_noise

WINDOWS, LENGTH = 16, 16
MACHINE = Machine(torch.device("cpu"), bf16=False, compile=False)


ALONE = Ranks()


def gradient(name: str, micro_batch_size: int, ranks: Ranks = ALONE) -> dict[str, torch.Tensor]:
    """The gradient of one step in float64, and the counts of routers, by name."""
    model = tiny_model(name, max_seq_len=LENGTH).train()
    tokens = torch.randint(VOCABULARY, (WINDOWS, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    batches = list(enumerate(tokens.split(micro_batch_size)))[ranks.rank :: ranks.world_size]
    objective = make_objective(model, TrainConfig(), MACHINE, ranks)
    compute_gradient(objective, with_noise(model, batches, WINDOWS, (0, 1)), (0, 1), MACHINE)
    model.after_step()
    loads = {key: torch.tensor(value) for key, value in model.metrics().items() if key.startswith("expert_load")}
    return loads | {key: parameter.grad for key, parameter in model.named_parameters()}


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest relative difference of two gradients of the same parameters; some are 0 up to rounding."""
    assert one.keys() == other.keys()
    return max(((one[name] - other[name]).norm() / one[name].norm().clamp(min=1e-9)).item() for name in one)


def test_the_gradient_does_not_depend_on_the_micro_batch_size():
    apart = {name: difference(gradient(name, WINDOWS), gradient(name, 1)) for name in MODELS}
    assert {name: value for name, value in apart.items() if value > 1e-6} == {}


def test_two_ranks_have_the_gradient_of_one(tmp_path):
    def act(rank):
        ranks = join_ranks()
        for name in MODELS:
            torch.save(gradient(name, 2, ranks), tmp_path / f"{name}-{rank}.pt")
        leave_ranks()

    assert on_two_ranks(act) == [0, 0]
    apart = {}
    for name in MODELS:
        first, second = (torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True) for rank in (0, 1))
        apart[name] = max(difference(gradient(name, WINDOWS), first), difference(first, second))
    assert {name: value for name, value in apart.items() if value > 1e-6} == {}
