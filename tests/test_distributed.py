"""Two ranks act as one: the same losses from the same windows, one checkpoint, and both stop at the same step.

torchrun takes long to start, so it does so once, with this file as the script; other pairs of ranks are forked.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training import (
    MODEL,
    RUN,
    at_step,
    command_line,
    config_of,
    evaluations,
    exit_status,
    in_child,
    losses,
    saved_steps,
    script,
    train_baseline,
    weights,
    write_corpus,
)

from llm.training import flags as flags_module
from llm.training import loop
from llm.training.run_directory import RunDirectory

pytestmark = pytest.mark.filterwarnings("ignore:Unable to enable fault handler")
TEN_STEPS = {"--steps": 10, "--eval-every": 5, "--micro-batch-size": 2}
MIXTURE = RUN | MODEL | {"--steps": 5, "--micro-batch-size": 2}
FOREVER = {"--steps": 100_000, "--eval-every": 100_000, "--save-every": 100_000}


def flags(settings):
    return command_line(settings)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True, scope="module")
def no_picture():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunDirectory, "plot", lambda self: None)
        yield


def on_ranks(n_ranks: int, act) -> list[int]:
    """Call `act(rank)` in processes that know each other, as torchrun's do; returns their exit statuses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    sizes = {"WORLD_SIZE": str(n_ranks), "LOCAL_WORLD_SIZE": str(n_ranks)}
    place = sizes | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}

    def be(rank):
        os.environ.update(place, RANK=str(rank), LOCAL_RANK=str(rank), CUDA_VISIBLE_DEVICES="")
        act(rank)

    return [exit_status(child) for child in [in_child(lambda rank=rank: be(rank)) for rank in range(n_ranks)]]


def on_two_ranks(act) -> list[int]:
    return on_ranks(2, act)


@pytest.fixture(scope="module")
def one(data, tmp_path_factory):
    """Ten steps on one rank, which write down their windows."""
    folder = tmp_path_factory.mktemp("one")
    with pytest.MonkeyPatch.context() as patch:
        write_down_windows(patch, folder / "windows")
        return train_baseline(data, folder / "run", *flags(TEN_STEPS))


def write_down_windows(patch, file: Path) -> None:
    """Append a line of JSON for each step: [[place in the global batch, tokens], ..]."""
    real = loop.with_noise

    def noted(model, micro_batches, n_windows, place):
        with open(file, "a", encoding="utf-8") as lines:
            lines.write(json.dumps([[index, tokens.tolist()] for index, tokens in micro_batches]) + "\n")
        return real(model, micro_batches, n_windows, place)

    patch.setattr(loop, "with_noise", noted)


def steps_of(file: Path) -> list[list]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def equal(run: Path, other: Path) -> bool:
    """Losses and eval losses of two runs are equal up to the order of sums."""
    assert losses(run) == pytest.approx(losses(other), rel=1e-6)
    for step, figures in evaluations(other).items():
        assert evaluations(run)[step] == pytest.approx(figures, rel=1e-6)
    return evaluations(run).keys() == evaluations(other).keys()


def test_two_ranks_equal_one_and_share_its_windows(data, one, tmp_path):
    def act(rank):
        write_down_windows(pytest.MonkeyPatch(), tmp_path / f"windows of {rank}")
        train_baseline(data, tmp_path / "two", *flags(TEN_STEPS))

    assert on_two_ranks(act) == [0, 0]
    assert equal(tmp_path / "two", one)
    assert list(losses(one)) == list(range(1, 11))
    assert (config_of(one)["world_size"], config_of(tmp_path / "two")["world_size"]) == (1, 2)
    first, second = (steps_of(tmp_path / f"windows of {rank}") for rank in (0, 1))
    for mine, other, both in zip(first, second, steps_of(one.parent / "windows"), strict=True):
        assert len(mine) == len(other) == len(both) / 2
        assert sorted(mine + other) == both


def test_a_signal_to_one_rank_stops_both_and_one_rank_goes_on(data, one, tmp_path, monkeypatch):
    def act(rank):
        if rank == 1:
            at_step(monkeypatch, 4, lambda model: os.kill(os.getpid(), signal.SIGTERM))
        train_baseline(data, tmp_path / "run", *flags(TEN_STEPS))

    assert on_two_ranks(act) == [143, 143]
    assert saved_steps(tmp_path / "run") == [4]
    train_baseline(data, tmp_path / "run", *flags(TEN_STEPS))
    assert equal(tmp_path / "run", one)


def test_two_ranks_go_on_where_one_was_stopped(data, one, tmp_path, monkeypatch):
    with monkeypatch.context() as stopping, pytest.raises(SystemExit):
        at_step(stopping, 4, lambda model: os.kill(os.getpid(), signal.SIGTERM))
        train_baseline(data, tmp_path / "run", *flags(TEN_STEPS))
    assert on_two_ranks(lambda rank: train_baseline(data, tmp_path / "run", *flags(TEN_STEPS))) == [0, 0]
    assert equal(tmp_path / "run", one)


def test_experts_and_their_balance_are_those_of_one_rank(data, tmp_path):
    def mixture(out):
        script("train_loss_free_balancing").main(flags(MIXTURE | {"--data": data, "--out": out}))
        return out

    assert on_two_ranks(lambda rank: mixture(tmp_path / "two")) == [0, 0]
    assert equal(tmp_path / "two", mixture(tmp_path / "one"))
    biases = [
        {name: tensor for name, tensor in weights(tmp_path / run).items() if "expert_bias" in name}
        for run in ("one", "two")
    ]
    assert biases[0] and all(biases[0][name].equal(biases[1][name]) and biases[0][name].any() for name in biases[0])


def test_a_diffusion_model_hides_the_same_on_two_ranks_and_after_a_stop(data, tmp_path, monkeypatch):
    """What a bound draws depends on the seed, the step and the window's place in it: not on ranks, and not on a
    resumed run."""

    def run(out):
        script("train_block_diffusion").main(flags(MIXTURE | {"--eval-every": 5, "--data": data, "--out": out}))
        return out

    one = run(tmp_path / "one")
    assert on_two_ranks(lambda rank: run(tmp_path / "two")) == [0, 0]
    assert equal(tmp_path / "two", one)
    with monkeypatch.context() as stopping, pytest.raises(SystemExit):
        at_step(stopping, 3, lambda model: os.kill(os.getpid(), signal.SIGTERM))
        run(tmp_path / "stopped")
    assert saved_steps(tmp_path / "stopped") == [3]
    run(tmp_path / "stopped")
    assert losses(tmp_path / "stopped") == losses(one) and evaluations(tmp_path / "stopped") == evaluations(one)
    after, straight = weights(tmp_path / "stopped"), weights(one)
    assert all(after[name].equal(straight[name]) for name in straight)


def test_ranks_that_see_different_run_directories_are_refused(data, one, tmp_path):
    def act(rank):
        train_baseline(data, one if rank == 0 else tmp_path / "elsewhere", *flags(TEN_STEPS))

    assert on_two_ranks(act) == [2, 2]
    assert not (tmp_path / "elsewhere").exists()


def test_a_step_that_two_ranks_cannot_share_is_refused(data, tmp_path):
    assert on_two_ranks(lambda rank: train_baseline(data, tmp_path / "run", "--tokens-per-step", 96)) == [2, 2]
    assert not (tmp_path / "run").exists()


def test_what_is_not_finite_on_one_rank_stops_both(data, tmp_path, monkeypatch):
    def act(rank):
        if rank == 1:
            at_step(monkeypatch, 7, lambda model: model.norm.weight.data.fill_(float("nan")))
        train_baseline(data, tmp_path / "run", *flags(TEN_STEPS))

    assert on_two_ranks(act) == [2, 2]
    assert saved_steps(tmp_path / "run") == [5]


def torchrun(scenario: str, data: Path, folder: Path) -> subprocess.Popen:
    """Start this file on two ranks; what they say goes to `folder`/said."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with open(folder / "said", "wb") as output:
        return subprocess.Popen([*words, scenario, data, folder], stdout=output, stderr=output, env=environment)


def said(folder: Path) -> str:
    return (folder / "said").read_text(encoding="utf-8", errors="replace")


def play_endless(data: Path, folder: Path, rank: int) -> None:
    """Ten steps, then a run that only a signal ends; writes down its last step."""
    training = []
    real = loop.Training.run
    loop.Training.run = lambda self, stop: (training.append(self), real(self, stop))
    flags_module.leave_ranks = lambda: None  # a process can join them once
    train_baseline(data, folder / "two", *flags(TEN_STEPS))
    try:
        train_baseline(data, folder / "run", *flags(FOREVER))
    finally:
        (folder / f"last step of {rank}").write_text(str(training[-1].progress.step), encoding="utf-8")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_under_torchrun_two_ranks_equal_one_and_a_signal_stops_both_at_the_same_step(data, one, tmp_path, number):
    job, run = torchrun("endless", data, tmp_path), tmp_path / "run"
    try:
        while not (run / "metrics.jsonl").exists() or len(losses(run)) < 5:
            assert job.poll() is None, said(tmp_path)
            time.sleep(0.1)
        job.send_signal(number)
        assert job.wait() == 1  # torchrun's own status
    finally:
        job.terminate()
    assert equal(tmp_path / "two", one)
    last = max(losses(run))
    assert [(tmp_path / f"last step of {rank}").read_text() for rank in (0, 1)] == [str(last)] * 2
    assert saved_steps(run) == [last]
    assert said(tmp_path).count(f"stopped after step {last} of 100000, saved in ") == 1


def play_dying(data: Path, folder: Path, rank: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            at_step(patch, 7, lambda model: os.kill(os.getpid(), signal.SIGKILL))
        train_baseline(data, folder / "run", *flags(TEN_STEPS))


@pytest.mark.slow
def test_the_death_of_a_rank_ends_the_job_and_costs_no_checkpoint(data, one, tmp_path):
    assert torchrun("dying", data, tmp_path).wait() == 1
    assert "SIGKILL" in said(tmp_path) and saved_steps(tmp_path / "run") == [5]
    train_baseline(data, tmp_path / "run", *flags(TEN_STEPS))
    assert equal(tmp_path / "run", one)


if __name__ == "__main__":
    RunDirectory.plot = lambda self: None
    scenario, where_data_are, where_to_write = sys.argv[1], *map(Path, sys.argv[2:])
    play = {"endless": play_endless, "dying": play_dying}[scenario]
    play(where_data_are, where_to_write, int(os.environ["RANK"]))
