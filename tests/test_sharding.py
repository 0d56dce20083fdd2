"""Ranks that share out the weights train as one process does, and their checkpoints are everyone's."""

import json
import os
import signal
import traceback

import pytest
import torch
from conftest import VOCABULARY, tiny_model
from test_distributed import TEN_STEPS, equal, flags, on_ranks
from torch.distributed.fsdp import fully_shard  # noqa: F401  imported once, before the ranks are forked
from training import at_step, config_of, evaluations, losses, same_weights, train_baseline, weights, write_corpus

from llm.analysis.accounting import sharded_memory
from llm.config import TrainConfig
from llm.generate.sampling import greedy
from llm.models import MODELS
from llm.training.checkpoint import find_checkpoints, load_training_state
from llm.training.device import Machine
from llm.training.distributed import Ranks, join_ranks, leave_ranks
from llm.training.gradient import compute_gradient, make_objective, with_noise
from llm.training.optim import make_optimizer
from llm.training.run_directory import RunDirectory
from llm.training.sharding import gathered, is_part, place, whole, whole_outside_blocks

WINDOWS, LENGTH, STEPS = 4, 16, 2
FEW = ("baseline", "deepseek_v3", "rwkv7", "block_diffusion", "loss_free_balancing", "learned_position")
UNEVEN = TEN_STEPS | {"--eval-windows": 5}  # three batches, of which one of two ranks computes one
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
        inputs = with_noise(model, batches, WINDOWS, (0, step))
        parts = compute_gradient(objective, inputs, (0, step), machine)
        norm = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1))
        found += [norm, *(ranks.average(part) for part in parts.values())]
        optimizer.step()
        optimizer.zero_grad()
        model.after_step()
    model.eval()
    with whole_outside_blocks(model):
        text = [tokens.tolist() for tokens in model.generate(tokens[:1, :4], 4, greedy)]
    return {"figures": torch.stack(found), "text": text, "weights": gathered(model.state_dict(), ranks)}


def difference(found: dict, expected: dict) -> float:
    """The largest relative difference of a figure or of a tensor of weights; infinite where the texts differ."""
    pairs = [(found["figures"], expected["figures"])]
    pairs += [(found["weights"][name], tensor) for name, tensor in expected["weights"].items()]
    apart = max(((one - other).norm() / other.norm().clamp(min=1e-9)).item() for one, other in pairs)
    return apart if found["text"] == expected["text"] else float("inf")


@pytest.fixture(scope="module")
def one(data, tmp_path_factory):
    """Ten steps of the baseline on one rank."""
    return train_baseline(data, tmp_path_factory.mktemp("one") / "run", *flags(UNEVEN))


@pytest.fixture(scope="module")
def two(data, tmp_path_factory):
    """The same, sharded over two ranks."""
    out = tmp_path_factory.mktemp("two") / "run"
    assert on_ranks(2, lambda rank: train_baseline(data, out, "--shard", *flags(UNEVEN))) == [0, 0]
    return out


@pytest.mark.parametrize(
    ("n_ranks", "names"),
    [
        pytest.param(2, tuple(MODELS), id="all-on-2"),
        pytest.param(4, FEW, id="few-on-4"),
        pytest.param(4, tuple(MODELS), id="all-on-4", marks=pytest.mark.slow),
    ],
)
def test_every_model_trains_sharded_as_it_does_alone(n_ranks, names, tmp_path):
    config = TrainConfig(shard=True, recompute=n_ranks == 4)
    alone = {name: trained(name, TrainConfig()) for name in names}

    def act(rank):
        ranks, apart = join_ranks(), {}
        for name in names:
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
        assert apart.keys() == set(names)
        assert {name: value for name, value in apart.items() if isinstance(value, str) or value > 1e-6} == {}


def stop_at_step_4(monkeypatch) -> None:
    at_step(monkeypatch, 4, lambda model: os.kill(os.getpid(), signal.SIGTERM))


def contents(run) -> dict:
    """Shapes and dtypes of all that the newest checkpoint holds, and the names of its files."""
    folder = find_checkpoints(run / "checkpoints")[-1]
    state = load_training_state(folder)["optimizer_state"]["state"]
    tensors = weights(run) | {f"{i} {name}": tensor for i, values in state.items() for name, tensor in values.items()}
    kinds = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    return kinds | {"files": sorted(path.name for path in folder.iterdir())}


def test_a_sharded_run_equals_one_of_one_rank_and_leaves_the_same_folder(one, two):
    assert equal(two, one)
    assert contents(two) == contents(one)
    for name, tensor in weights(two).items():
        torch.testing.assert_close(tensor, weights(one)[name], rtol=1e-5, atol=1e-6)
    assert config_of(two)["costs"] == config_of(one)["costs"]
    assert (two / "samples.txt").read_text() == (one / "samples.txt").read_text()


def test_a_sharded_run_that_was_stopped_goes_on_bitwise(data, two, tmp_path, monkeypatch):
    command = "--shard", *flags(UNEVEN)
    with monkeypatch.context() as stopping:
        stop_at_step_4(stopping)
        assert on_ranks(2, lambda rank: train_baseline(data, tmp_path / "run", *command)) == [143, 143]
    assert on_ranks(2, lambda rank: train_baseline(data, tmp_path / "run", *command)) == [0, 0]
    assert losses(tmp_path / "run") == losses(two) and evaluations(tmp_path / "run") == evaluations(two)
    assert same_weights(tmp_path / "run", two)


def test_a_sharded_run_goes_on_on_one_rank(data, one, tmp_path, monkeypatch):
    with monkeypatch.context() as stopping:
        stop_at_step_4(stopping)
        assert on_ranks(2, lambda r: train_baseline(data, tmp_path / "run", "--shard", *flags(UNEVEN))) == [143, 143]
    train_baseline(data, tmp_path / "run", *flags(UNEVEN))
    assert equal(tmp_path / "run", one)


def test_a_run_of_one_rank_goes_on_sharded_over_four(data, one, tmp_path, monkeypatch):
    with monkeypatch.context() as stopping, pytest.raises(SystemExit):
        stop_at_step_4(stopping)
        train_baseline(data, tmp_path / "run", *flags(UNEVEN))
    assert on_ranks(4, lambda r: train_baseline(data, tmp_path / "run", "--shard", *flags(UNEVEN))) == [0] * 4
    assert equal(tmp_path / "run", one)


def test_sharded_runs_compute_in_bf16_what_one_process_does(data, one, tmp_path):
    """On one rank bit for bit. On two, gradients are added in another order: in fp32, so the losses stay far closer to
    each other than to those of a run in fp32."""
    settings = flags(UNEVEN | {"--precision": "bf16"})
    train_baseline(data, tmp_path / "plain", *settings)
    for n in (1, 2):
        command = (data, tmp_path / f"on {n}", "--shard", *settings)
        assert on_ranks(n, lambda rank, command=command: train_baseline(*command)) == [0] * n
    plain = losses(tmp_path / "plain")
    assert losses(tmp_path / "on 1") == plain
    two, fp32 = losses(tmp_path / "on 2"), losses(one)
    apart, in_fp32 = (max(abs(other[step] - loss) for step, loss in plain.items()) for other in (two, fp32))
    assert apart < in_fp32 / 10, (apart, in_fp32)


@pytest.mark.slow
def test_a_sharded_run_can_be_compiled(data, one, tmp_path):
    command = "--shard", "--compile", "on", *flags(UNEVEN)
    assert on_ranks(2, lambda rank: train_baseline(data, tmp_path / "run", *command)) == [0, 0]
    assert losses(tmp_path / "run") == pytest.approx(losses(one), rel=1e-5)


@pytest.mark.parametrize(
    ("given", "named"),
    [((), "torchrun --nproc-per-node 8 train_scripts/train_llama.py"), (("--optimizer", "muon"), "choose adamw")],
)
def test_what_cannot_be_sharded_is_refused_before_any_work(data, tmp_path, capsys, given, named):
    with pytest.raises(SystemExit):
        train_baseline(data, tmp_path / "run", "--shard", *given)
    assert named in " ".join(capsys.readouterr().err.replace("│", "").split())
    assert not (tmp_path / "run").exists()


def test_a_rank_holds_its_share_of_the_weights_and_no_more(tmp_path):
    def act(rank):
        ranks = join_ranks()
        machine = Machine(torch.device("cpu"), bf16=False, compile=False)
        model = place(tiny_model("llama", n_layers=4), TrainConfig(shard=True), machine, ranks)
        held, whole_blocks = sum(p.to_local().numel() for p in model.parameters()), []

        def count(*_):
            whole_blocks.append(sum(not is_part(next(block.parameters())) for block in model.blocks))

        for block in model.blocks:
            block.mixer.register_forward_hook(count)
        model.loss(torch.randint(VOCABULARY, (1, LENGTH + 1)))[0].backward()
        assert len(whole_blocks) == 4 and 1 <= max(whole_blocks) <= 2, whole_blocks
        (tmp_path / f"{rank}").write_text(str(held), encoding="utf-8")
        leave_ranks()

    assert on_ranks(2, act) == [0, 0]
    model = tiny_model("llama", n_layers=4)
    held = [int((tmp_path / f"{rank}").read_text()) for rank in (0, 1)]
    assert sum(held) == sum(p.numel() for p in model.parameters())
    assert held[0] * 4 == pytest.approx(sharded_memory(model, n_ranks=2, windows=1, context=16)["weights"], rel=0.01)
