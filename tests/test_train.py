"""The training loop: it learns, it tells the truth, and a fault costs only the steps since the last checkpoint."""

import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from training import (
    MODEL,
    ROOT,
    RUN,
    WINDOWS_PER_STEP,
    at_step,
    command_line,
    config_of,
    contents,
    evaluations,
    exit_status,
    flip_a_byte,
    in_child,
    losses,
    same_weights,
    saved_steps,
    script,
    train_baseline,
    weights,
    write_corpus,
)

from llm.analysis.accounting import summary
from llm.config import TrainConfig
from llm.data.files import open_tokens
from llm.data.tokenize import pre_tokenize
from llm.data.windows import windows
from llm.generate.load import load_run
from llm.models.baseline import Baseline
from llm.modules.blocks import Block
from llm.training import gradient, optim, run_directory
from llm.training.checkpoint import best_checkpoint, find_checkpoints
from llm.training.device import Machine
from llm.training.journal import Journal
from llm.training.run_directory import RunDirectory, read_metrics

pytestmark = pytest.mark.filterwarnings("ignore:Unable to enable fault handler")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    """Drawing takes longer than these runs; test_the_run_directory_holds_all_that_came_of_it draws."""
    monkeypatch.setattr(RunDirectory, "plot", lambda self: None)


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory):
    """Twenty steps without a fault; every other run is held against it. Read only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunDirectory, "plot", lambda self: None)
        return train_baseline(data, tmp_path_factory.mktemp("runs") / "straight")


def signal_at(monkeypatch, step, number, times=1):
    """Send this process signal `number` when step `step` begins."""
    at_step(monkeypatch, step, lambda model: [os.kill(os.getpid(), number) for _ in range(times)])


def stopped(monkeypatch, data, out, step, number=signal.SIGTERM, *flags):
    """A run that a signal stopped after `step`; returns its exit status."""
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        signal_at(patch, step, number)
        train_baseline(data, out, *flags)
    return end.value.code


def refusal(capsys, *arguments) -> str:
    """What the script says when it refuses to run: in a line, with exit status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        train_baseline(*arguments)
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


# What a run does


def test_it_learns(data, tmp_path):
    run = train_baseline(data, tmp_path / "run", "--steps", 60, "--max-lr", 2e-2, "--eval-every", 60)
    first, last = evaluations(run)[0]["eval_loss"], evaluations(run)[60]["eval_loss"]
    vocab_size = open_tokens(data).vocab_size
    assert first > math.log(vocab_size) - 0.1  # it knows nothing yet
    frequency = np.bincount(open_tokens(data).eval, minlength=vocab_size) / len(open_tokens(data).eval)
    unigram = -(frequency[frequency > 0] * np.log(frequency[frequency > 0])).sum()
    assert last < unigram + 0.15 < first - 1  # now it knows at least how often each token comes


def test_the_run_directory_holds_all_that_came_of_it(data, tmp_path, monkeypatch, capsys):
    monkeypatch.undo()
    run = train_baseline(data, tmp_path / "run", "--steps", 4, "--eval-every", 2, "--save-every", 3, "--log-every", 2)
    assert {path.name for path in run.iterdir()} >= {"config.json", "metrics.jsonl", "samples.txt", "loss.png"}
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list(losses(run)) == [2, 4] and list(evaluations(run)) == [0, 2, 4]
    stories = (run / "samples.txt").read_text(encoding="utf-8")
    assert stories.count("Once upon a time") == 3 and "--- step 2 ---" in stories
    config = config_of(run)
    assert config["model_name"] == "baseline" and config["model"]["d_model"] == 32 and config["train"]["steps"] == 4
    assert config["model"]["vocab_size"] == 300 and config["data"]["folder"] == str(data)
    assert {"commit", "versions", "device", "precision", "compiled", "world_size"} <= config.keys()
    assert config["train"]["out"] == str(run) and config["train"]["micro_batch_size"] == 4
    line = next(line for line in read_metrics(run / "metrics.jsonl") if "loss" in line)
    assert line["tokens"] == 2 * 256 and {"lr", "grad_norm", "tokens_per_second"} <= line.keys()
    said = capsys.readouterr().out
    first, last = (evaluations(run)[step]["eval_loss"] for step in (0, 4))
    assert f"{first:.3f} at step 0, {last:.3f} at step 4" in said
    assert f'python -m llm.generate {run} --prompt "Once upon a time"' in said
    assert "repeatable  bitwise" in said and summary(Baseline(Baseline.Config(**config["model"]))) in said


def test_the_next_command_is_one_that_runs(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("UV_RUN_RECURSION_DEPTH", "1")
    train_baseline(data, tmp_path / "my run", "--steps", 1)
    assert f"uv run python -m llm.generate '{tmp_path / 'my run'}' --prompt" in capsys.readouterr().out


def test_a_context_shorter_than_the_prompt_of_the_sample_stories_is_no_obstacle(data, tmp_path):
    run = train_baseline(data, tmp_path / "run", "--model.max-seq-len", 4, "--steps", 1)
    assert (run / "samples.txt").read_text(encoding="utf-8").startswith("--- step 0 ---\n")


def test_what_a_model_tells_about_its_experts_goes_into_the_metrics(data, tmp_path):
    flags = {**RUN, "--steps": 1, "--data": data, "--out": tmp_path / "run"}
    sizes = {"--model.n-layers": 1, "--model.d-model": 32, "--model.n-heads": 4, "--model.max-seq-len": 32}
    script("train_switch_transformer").main(command_line(flags | sizes))
    (line,) = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    assert {"expert_load/0", "dropped_share", "router_entropy"} <= line.keys()


def test_the_share_of_peak_counts_every_device():
    alone, eight = (object.__new__(Journal) for _ in range(2))
    for journal, world_size in ((alone, 1), (eight, 8)):
        journal.flops_per_token, journal.machine = 1e6, SimpleNamespace(peak_flops=1e12)
        journal.world_size = world_size
    assert alone.share_of_peak(4e5) == pytest.approx(0.4) == eight.share_of_peak(3.2e6)


def test_the_default_run_directory_is_named_after_the_model_and_the_data(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train_baseline.py"])
    train_baseline(data, "x", "--steps", 1, "--out", "None")
    assert saved_steps(tmp_path / "runs" / f"baseline-{data.name}") == [1]


def test_the_steps_are_those_of_a_plain_loop_over_whole_batches(data, straight):
    """Without micro-batches and without the loop's helpers: loss, norm over all parameters, clip, AdamW, four times."""
    torch.manual_seed(0)
    model = Baseline(load_run(straight, torch.device("cpu"))[0].config)
    decays = [{"params": [p], "weight_decay": 0.1 if p.dim() > 1 else 0.0} for p in model.parameters()]
    optimizer = torch.optim.AdamW(decays, betas=(0.9, 0.95), foreach=False)
    lines = [line for line in read_metrics(straight / "metrics.jsonl") if "loss" in line]
    for step, line in enumerate(lines[:4]):
        tokens = windows(open_tokens(data).train, 32, 0, step * WINDOWS_PER_STEP, WINDOWS_PER_STEP)
        tokens = torch.from_numpy(tokens)
        loss = torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert line["grad_norm"] == pytest.approx(norm, rel=1e-4)
        assert line["lr"] == pytest.approx(1e-3 * (step + 1) / 4)
        for parameter, slope, group in zip(model.parameters(), gradients, optimizer.param_groups, strict=True):
            parameter.grad = slope * min(1, 1 / norm)
            group["lr"] = line["lr"]
        optimizer.step()


def test_the_evaluation_is_what_a_loop_over_the_windows_gives(data, straight):
    model, tokenizer = load_run(straight, torch.device("cpu"))
    tokens = np.array(open_tokens(data).eval)
    n_windows = (len(tokens) - 1) // 32
    nats, n_targets, text = 0.0, 0, b""
    for i in range(7):  # the last batch is smaller
        start = i * n_windows // 7 * 32
        window = torch.tensor(tokens[start : start + 33].astype(np.int64))
        log_p = model(window[None, :-1])[0].double().log_softmax(-1)
        nats -= sum(float(log_p[t, window[t + 1]].detach()) for t in range(32))
        n_targets += 32
        text += tokenizer.decode(window[1:].tolist()).encode()  # ASCII; <|endoftext|> is left out
    line = evaluations(straight)[20]
    assert line["eval_loss"] == pytest.approx(nats / n_targets, rel=1e-6)
    assert line["eval_perplexity"] == pytest.approx(math.exp(nats / n_targets), rel=1e-6)
    assert line["eval_bits_per_byte"] == pytest.approx(nats / math.log(2) / len(text), rel=1e-6)


@pytest.mark.parametrize("micro_batch_size", [1, 2, 8, 64])
def test_the_micro_batch_size_changes_nothing_but_memory(data, straight, tmp_path, micro_batch_size):
    run = train_baseline(data, tmp_path / "run", "--micro-batch-size", micro_batch_size)
    assert list(losses(run).values()) == pytest.approx(list(losses(straight).values()), rel=1e-6)
    assert evaluations(run)[20]["eval_loss"] == pytest.approx(evaluations(straight)[20]["eval_loss"], rel=1e-6)


def test_the_seed_and_nothing_else_decides_the_curve(data, straight, tmp_path):
    torch.manual_seed(123)
    np.random.seed(5)
    again = train_baseline(data, tmp_path / "again")
    assert losses(again) == losses(straight) and same_weights(again, straight)
    other = train_baseline(data, tmp_path / "other", "--seed", 1)
    assert not set(losses(other).values()) & set(losses(straight).values())


def test_a_process_with_another_hash_seed_trains_the_same_weights(data, straight, tmp_path):
    flags = command_line(RUN | MODEL | {"--model.d-ff": 64, "--data": data, "--out": tmp_path / "run"})
    environment = os.environ | {"PYTHONHASHSEED": "12345", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "train_scripts" / "train_baseline.py"), *flags]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert losses(tmp_path / "run") == losses(straight) and same_weights(tmp_path / "run", straight)


@pytest.mark.parametrize("name", ["baseline", "switch_transformer"])
def test_recomputing_blocks_changes_memory_and_nothing_else(data, tmp_path, name, monkeypatch):
    """Each block runs once for a micro-batch, and once more on the way back; experts are counted once."""
    calls, real = [], Block.forward
    monkeypatch.setattr(
        Block, "forward", lambda self, *inputs: calls.append(torch.is_grad_enabled()) or real(self, *inputs)
    )
    runs, trained = [], []
    for flags in ([], ["--recompute"]):
        calls.clear()
        sizes = {**MODEL, "--steps": 3, "--data": data, "--out": tmp_path / f"run{len(runs)}"}
        script(f"train_{name}").main(command_line(RUN | sizes, *flags))
        runs.append([line for line in read_metrics(sizes["--out"] / "metrics.jsonl") if "loss" in line])
        trained.append(sum(calls))
    drop = {"tokens_per_second"}
    plain, again = ([{k: v for k, v in line.items() if k not in drop} for line in lines] for lines in runs)
    assert plain == again
    assert trained == [3 * 2 * 2, 2 * 3 * 2 * 2]
    assert same_weights(tmp_path / "run0", tmp_path / "run1")


def test_bf16_trains_to_nearly_the_same_losses(data, straight, tmp_path):
    run = train_baseline(data, tmp_path / "run", "--precision", "bf16")
    assert losses(run) != losses(straight)
    assert list(losses(run).values()) == pytest.approx(list(losses(straight).values()), rel=2e-3)
    assert all(tensor.dtype is torch.float32 for tensor in weights(run).values())
    assert config_of(run)["precision"] == "bf16 autocast"


def test_the_learning_rate_of_a_step_is_the_one_that_is_used(data, tmp_path):
    """AdamW's first update moves each weight by the learning rate, whatever the gradient."""
    flags = ("--steps", 1, "--warmup-steps", 0, "--max-lr", 0.5, "--min-lr", 0.125, "--weight-decay", 0)
    run = train_baseline(data, tmp_path / "run", *flags)
    model, _ = load_run(run, torch.device("cpu"))
    torch.manual_seed(0)
    moved = (model.norm.weight - Baseline(model.config).norm.weight).abs()
    assert moved.tolist() == pytest.approx([0.125] * 32, rel=1e-3)  # the only step is the last: the cosine is down
    assert read_metrics(run / "metrics.jsonl")[1]["lr"] == pytest.approx(0.125)


def test_gradients_are_clipped_before_the_update(data, straight, tmp_path, monkeypatch):
    seen = []

    class Recorder(torch.optim.SGD):
        def step(self):
            seen.append(math.sqrt(sum(float(p.grad.square().sum()) for g in self.param_groups for p in g["params"])))
            return super().step()

    monkeypatch.setattr("llm.training.loop.make_optimizer", lambda model, config: Recorder(model.parameters(), lr=0.1))
    run = train_baseline(data, tmp_path / "run", "--steps", 3, "--grad-clip", 0.01)
    assert seen == pytest.approx([0.01] * 3, rel=1e-3)
    assert all(line["grad_norm"] > 0.1 for line in read_metrics(run / "metrics.jsonl") if "loss" in line)


def test_the_device_is_read_once_a_step(data, tmp_path, monkeypatch):
    """Each read waits for the GPU. Here every way a tensor becomes a Python number is counted, in the steps alone."""
    reads, inside = [], []
    for name in ("tolist", "item", "__float__", "__bool__", "__int__", "numpy", "cpu"):
        real = getattr(torch.Tensor, name)

        def counted(self, *arguments, real=real, name=name):
            if inside:
                reads.append(name)
            return real(self, *arguments)

        monkeypatch.setattr(torch.Tensor, name, counted)
    update = sys.modules["llm.training.loop"].Training.update

    def watched(*arguments):
        inside.append(True)
        report = update(*arguments)
        inside.clear()
        return report

    monkeypatch.setattr(sys.modules["llm.training.loop"].Training, "update", watched)
    train_baseline(data, tmp_path / "run", "--steps", 5, "--micro-batch-size", 2)
    assert reads == ["tolist"] * 5


def test_the_best_checkpoint_is_kept(data, tmp_path, monkeypatch):
    """The eval loss rises again after step 10: that one stays, beside the newest two."""
    curve = {0: 5.0, 5: 4.0, 10: 3.0, 15: 3.5, 20: 4.5}
    steps = iter(curve)
    monkeypatch.setattr(
        "llm.training.loop.evaluate",
        lambda *_, **__: {"eval_loss": curve[next(steps)], "eval_perplexity": 1.0, "eval_bits_per_byte": 1.0},
    )
    run = train_baseline(data, tmp_path / "run", "--eval-every", 5, "--save-every", 1)
    assert saved_steps(run) == [10, 19, 20]
    assert best_checkpoint(run / "checkpoints").name == "step-000010"


def test_a_best_evaluation_is_saved_even_between_saves(data, tmp_path):
    run = train_baseline(data, tmp_path / "run", "--steps", 7, "--eval-every", 3, "--save-every", 100)
    assert saved_steps(run) == [6, 7] or saved_steps(run) == [3, 6, 7]


def test_a_not_finite_evaluation_does_not_end_the_search_for_the_best(data, tmp_path, monkeypatch):
    curve = iter([math.nan, 4.0, 3.0])
    monkeypatch.setattr(
        "llm.training.loop.evaluate",
        lambda *_, **__: {"eval_loss": next(curve), "eval_perplexity": 1.0, "eval_bits_per_byte": 1.0},
    )
    run = train_baseline(data, tmp_path / "run", "--steps", 4, "--eval-every", 2)
    assert best_checkpoint(run / "checkpoints").name == "step-000004"


# Stopping and going on


@pytest.fixture
def in_a_terminal():
    """SIGHUP as a shell leaves it; `nohup pytest` would have it ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("in_a_terminal")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_finishes_the_step_saves_and_going_on_is_exact(
    data, straight, tmp_path, monkeypatch, capsys, number, status
):
    before = signal.getsignal(number)
    assert stopped(monkeypatch, data, tmp_path / "run", 10, number) == status
    assert signal.getsignal(number) == before
    said = capsys.readouterr()
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000010"
    assert f"stopped after step 10 of 20, saved in {checkpoint}" in said.out + said.err
    assert "same command again" in said.out + said.err
    assert list(losses(tmp_path / "run")) == list(range(1, 11))
    assert find_checkpoints(checkpoint.parent)[-1] == checkpoint

    train_baseline(data, tmp_path / "run")
    assert "going on after step 10" in capsys.readouterr().out
    assert losses(tmp_path / "run") == losses(straight)
    assert same_weights(tmp_path / "run", straight)
    assert evaluations(tmp_path / "run") == evaluations(straight)


def test_a_run_may_be_stopped_again_and_again(data, straight, tmp_path, monkeypatch):
    for step in (1, 5, 7, 8, 15, 19):
        assert stopped(monkeypatch, data, tmp_path / "run", step) == 143
        assert saved_steps(tmp_path / "run")[-1] == step
    train_baseline(data, tmp_path / "run")
    assert losses(tmp_path / "run") == losses(straight)
    assert same_weights(tmp_path / "run", straight)
    assert (tmp_path / "run" / "samples.txt").read_bytes() == (straight / "samples.txt").read_bytes()


def test_an_objective_that_draws_goes_on_exactly(data, tmp_path, monkeypatch):
    """As a diffusion model's masks: what is drawn depends on the seed and the place, in training and in evaluation."""
    drawn, real = [], Baseline.loss

    def noisy(self, tokens):
        loss, parts = real(self, tokens)
        drawn.append(torch.rand(()).item())
        return loss * drawn[-1], parts | {"ce": parts["ce"] * drawn[-1]}

    monkeypatch.setattr(Baseline, "loss", noisy)
    flags = ("--steps", 8, "--eval-every", 4, "--eval-windows", 4)
    straight = train_baseline(data, tmp_path / "straight", *flags)
    assert drawn[0] == drawn[9] == drawn[18]  # evaluations, before 4 steps of two micro-batches each
    assert len(set(drawn)) == 1 + 16
    torch.manual_seed(99)
    stopped(monkeypatch, data, tmp_path / "run", 3, signal.SIGTERM, *flags)
    train_baseline(data, tmp_path / "run", *flags)
    assert losses(tmp_path / "run") == losses(straight) and evaluations(tmp_path / "run") == evaluations(straight)
    assert same_weights(tmp_path / "run", straight)


def test_a_signal_in_the_last_step_changes_nothing(data, straight, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        signal_at(patch, 20, signal.SIGTERM)
        train_baseline(data, tmp_path / "run")
    assert saved_steps(tmp_path / "run")[-1] == 20 and same_weights(tmp_path / "run", straight)


def test_a_finished_run_says_so_and_touches_nothing(data, straight, capsys):
    before = contents(straight)
    train_baseline(data, straight)
    assert "already finished" in capsys.readouterr().out
    assert contents(straight) == before


def test_how_to_go_on_fits_the_command(data, tmp_path, monkeypatch, capsys):
    """The same command with `--resume never` would throw away what was just saved."""
    stopped(monkeypatch, data, tmp_path / "run", 3, signal.SIGTERM, "--resume", "never")
    said = capsys.readouterr()
    assert "--resume auto" in said.out + said.err


def test_a_second_interrupt_leaves_at_once(data, tmp_path, monkeypatch):
    signal_at(monkeypatch, 8, signal.SIGINT, times=2)
    child = in_child(lambda: train_baseline(data, tmp_path / "run"))
    assert exit_status(child) == 130
    assert saved_steps(tmp_path / "run") == [5]
    assert list(losses(tmp_path / "run")) == list(range(1, 8))


def kill_until_done(data, run, kills, longest):
    """Start the run again and again, kill each process at a random moment, and let the last one finish."""
    rng = random.Random(0)
    for _ in range(kills):
        child = in_child(lambda: train_baseline(data, run))
        time.sleep(rng.uniform(0, longest))
        os.kill(child, signal.SIGKILL)
        assert exit_status(child) in (-signal.SIGKILL, 0)
    assert exit_status(in_child(lambda: train_baseline(data, run))) == 0


@pytest.mark.parametrize("moment", ["step", "metrics", "tensors written", "rename", "prune"])
def test_kill_9_costs_only_the_steps_since_the_last_checkpoint(data, straight, tmp_path, monkeypatch, moment):
    """Dead in the middle of step 13, of a line of metrics, or of the save at step 10: the rest is as if nothing was."""

    def die(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        if moment == "step":
            at_step(patch, 13, die)
        elif moment == "metrics":
            at_step(patch, 13, lambda model: patch.setattr(run_directory, "append", half_a_line))
        else:
            name = {"tensors written": "seal", "rename": "put_in_place", "prune": "prune"}[moment]
            at_step(patch, 10, lambda model: patch.setattr(f"llm.training.checkpoint.{name}", die))
        assert exit_status(in_child(lambda: train_baseline(data, tmp_path / "run"))) == -signal.SIGKILL
    assert saved_steps(tmp_path / "run")[-1] == (5 if moment in ("tensors written", "rename") else 10)
    train_baseline(data, tmp_path / "run")
    assert losses(tmp_path / "run") == losses(straight)
    assert same_weights(tmp_path / "run", straight)
    assert saved_steps(tmp_path / "run") == saved_steps(straight)
    assert not [*(tmp_path / "run" / "checkpoints").glob("*.tmp"), *tmp_path.rglob("*.replaced")]


def test_kill_9_before_the_first_checkpoint_costs_all_steps_and_nothing_else(data, straight, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda model: os.kill(os.getpid(), signal.SIGKILL))
        assert exit_status(in_child(lambda: train_baseline(data, tmp_path / "run"))) == -signal.SIGKILL
    assert saved_steps(tmp_path / "run") == [] and list(losses(tmp_path / "run")) == [1, 2]
    train_baseline(data, tmp_path / "run")
    assert losses(tmp_path / "run") == losses(straight) and same_weights(tmp_path / "run", straight)


def test_a_disk_that_fills_up_ends_the_run_and_costs_nothing_that_was_saved(
    data, straight, tmp_path, monkeypatch, capsys
):
    def fill_up(model):
        resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, limit[1]))  # room for the weights, not for AdamW's state

    limit, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with monkeypatch.context() as patch:
            at_step(patch, 8, fill_up)
            said = refusal(capsys, data, tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, ignored)
    assert "step-000010" in said and "MB" in said
    assert saved_steps(tmp_path / "run") == [5] and not list(tmp_path.rglob("*.tmp"))
    train_baseline(data, tmp_path / "run")
    assert losses(tmp_path / "run") == losses(straight) and same_weights(tmp_path / "run", straight)


def half_a_line(file, text):
    file.write(text[: len(text) // 2].encode())
    os.kill(os.getpid(), signal.SIGKILL)


def test_kill_9_at_random_moments(data, straight, tmp_path):
    kill_until_done(data, tmp_path / "run", kills=2, longest=1.0)
    assert losses(tmp_path / "run") == losses(straight) and same_weights(tmp_path / "run", straight)


@pytest.mark.slow
def test_kill_9_twenty_times(data, straight, tmp_path):
    kill_until_done(data, tmp_path / "run", kills=20, longest=1.5)
    assert losses(tmp_path / "run") == losses(straight) and same_weights(tmp_path / "run", straight)


def test_a_torn_last_line_is_mended(data, straight, tmp_path, monkeypatch):
    stopped(monkeypatch, data, tmp_path / "run", 12)
    file = tmp_path / "run" / "metrics.jsonl"
    file.write_bytes(file.read_bytes()[:-25])
    train_baseline(data, tmp_path / "run")
    assert losses(tmp_path / "run").keys() >= set(losses(straight)) - {12}
    assert same_weights(tmp_path / "run", straight)


# Which checkpoint


def test_a_damaged_newest_checkpoint_is_skipped(data, straight, tmp_path, capsys):
    run = shutil.copytree(straight, tmp_path / "run")
    newest, before = find_checkpoints(run / "checkpoints")[::-1][:2]
    flip_a_byte(newest / "model.safetensors")
    capsys.readouterr()
    train_baseline(data, run)
    said = capsys.readouterr().out
    assert f"skipped {newest.name}" in said and "model.safetensors is damaged" in said
    assert f"going on after step {int(before.name[5:])}" in said
    assert losses(run) == losses(straight) and same_weights(run, straight)


def test_a_damaged_checkpoint_asked_for_by_its_path_is_refused(data, straight, tmp_path, capsys):
    run = shutil.copytree(straight, tmp_path / "run")
    newest = find_checkpoints(run / "checkpoints")[-1]
    flip_a_byte(newest / "training_state.pt")
    before = contents(run)
    said = refusal(capsys, data, run, "--resume", newest)
    assert f"{newest / 'training_state.pt'} is damaged" in said
    assert contents(run) == before


def test_only_damaged_checkpoints_are_no_reason_to_begin_anew(data, straight, tmp_path, capsys):
    run = shutil.copytree(straight, tmp_path / "run")
    for checkpoint in find_checkpoints(run / "checkpoints"):
        flip_a_byte(checkpoint / "model.safetensors")
    before = contents(run)
    assert "--resume never" in refusal(capsys, data, run)
    assert contents(run) == before


OTHER_RUN = {
    "model.d_model": ("--model.d-model", 64),
    "model.n_layers": ("--model.n-layers", 3),
    "model.norm_eps": ("--model.norm-eps", 1e-6),
    "train.seed": ("--seed", 1),
    "train.tokens_per_step": ("--tokens-per-step", 512),
    "train.steps": ("--steps", 22),
    "train.max_lr": ("--max-lr", 0.002),
    "train.weight_decay": ("--weight-decay", 0.2),
    "train.eval_windows": ("--eval-windows", 4),
}


@pytest.mark.parametrize("field", OTHER_RUN)
def test_a_run_directory_of_other_settings_is_refused_by_name(data, straight, capsys, field):
    before = contents(straight)
    flag, value = OTHER_RUN[field]
    said = refusal(capsys, data, straight, flag, value)
    assert f"{field}: saved " in said and f"given {value}" in said and "--out" in said
    assert contents(straight) == before


def test_a_run_directory_of_another_architecture_is_refused_by_name(data, straight, capsys, monkeypatch):
    class Other(Baseline):
        pass

    monkeypatch.setitem(sys.modules["llm.training.resume"].MODELS, "other", Other)
    monkeypatch.setattr("llm.models.baseline.Baseline", Other)
    before = contents(straight)
    said = refusal(capsys, data, straight)
    assert 'model_name: saved "baseline", given "other"' in said
    assert contents(straight) == before


def test_a_run_directory_of_another_tokenizer_or_text_is_refused_by_name(data, straight, tmp_path, capsys):
    other = write_corpus(tmp_path, stories=50)
    before = contents(straight)
    said = refusal(capsys, other, straight)
    assert "data.tokenizer_sha256" in said and "data.train_sha256" in said
    assert contents(straight) == before


def test_other_eval_text_is_refused_by_name(data, straight, tmp_path, capsys):
    """One curve on two texts would mean nothing, nor would the best checkpoint."""
    other = shutil.copytree(data, tmp_path / "data")
    (other / "eval.txt").write_text((data / "eval.txt").read_text(encoding="utf-8")[:4000], encoding="utf-8")
    pre_tokenize(other / "train.txt", other / "eval.txt", other, 300)
    said = refusal(capsys, other, straight)
    assert "data.eval_sha256" in said and "tokenizer" not in said


def test_what_may_change_may_change(data, straight, tmp_path, monkeypatch):
    stopped(monkeypatch, data, tmp_path / "run", 12)
    flags = ("--micro-batch-size", 2, "--save-every", 1, "--log-every", 4)
    run = train_baseline(data, tmp_path / "run", *flags)
    assert list(losses(run)) == [*range(1, 13), 16, 20]
    assert losses(run)[20] == pytest.approx(losses(straight)[20], rel=1e-6)


def test_the_settings_of_the_optimiser_are_those_given_not_those_saved(data, straight, tmp_path, monkeypatch):
    seen = []
    real = torch.optim.AdamW.step

    def watched(self, *arguments):
        seen.append([(group["weight_decay"], group["betas"]) for group in self.param_groups])
        return real(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    checkpoint = find_checkpoints(straight / "checkpoints")[-1]
    flags = ("--resume", checkpoint, "--steps", 21, "--weight-decay", 0.5, "--beta2", 0.99)
    run = train_baseline(data, tmp_path / "run", *flags)
    assert seen == [[(0.5, (0.9, 0.99)), (0.0, (0.9, 0.99))]]
    assert config_of(run)["train"]["weight_decay"] == 0.5


def test_a_path_goes_on_elsewhere_with_another_budget(data, straight, tmp_path, capsys):
    before = contents(straight)
    checkpoint = find_checkpoints(straight / "checkpoints")[0]
    step = int(checkpoint.name[5:])
    run = train_baseline(
        data, tmp_path / "longer", "--resume", checkpoint, "--steps", step + 4, "--tokens-per-step", 512
    )
    assert list(losses(run)) == list(range(step + 1, step + 5))
    assert saved_steps(run)[-1] == step + 4
    assert contents(straight) == before
    assert not list(tmp_path.glob("longer.*")) and not list(straight.parent.glob("straight.*"))


def test_a_path_into_the_run_itself_goes_back_to_it(data, straight, tmp_path):
    run = shutil.copytree(straight, tmp_path / "run")
    first = find_checkpoints(run / "checkpoints")[0]
    train_baseline(data, run, "--resume", first)
    assert losses(run) == losses(straight) and same_weights(run, straight)
    assert not list(tmp_path.glob("run.*"))  # nothing was set aside


def test_a_path_to_another_model_is_refused(data, straight, tmp_path, capsys):
    checkpoint = find_checkpoints(straight / "checkpoints")[-1]
    said = refusal(capsys, data, tmp_path / "run", "--resume", checkpoint, "--model.d-ff", 128)
    assert "model.d_ff: saved 64, given 128" in said
    assert not (tmp_path / "run").exists()


def test_a_path_does_not_mix_two_runs_in_one_directory(data, straight, tmp_path, capsys):
    """Its record would be half of one and half of the other."""
    other = train_baseline(data, tmp_path / "other", "--model.d-ff", 128)
    before = contents(other)
    said = refusal(capsys, data, other, "--resume", find_checkpoints(straight / "checkpoints")[-1], "--steps", 30)
    assert "model.d_ff: saved 128, given 64" in said and "--out" in said
    assert contents(other) == before


def test_a_path_that_is_no_checkpoint_is_named(data, tmp_path, capsys):
    assert f"{tmp_path / 'nowhere'} is not there" in refusal(
        capsys, data, tmp_path / "run", "--resume", tmp_path / "nowhere"
    )


def test_never_starts_anew_and_keeps_the_earlier_run(data, straight, tmp_path):
    run = shutil.copytree(straight, tmp_path / "run")
    for number in (1, 2):
        train_baseline(data, run, "--resume", "never", "--seed", number, "--steps", 2)
        assert list(losses(run)) == [1, 2] and config_of(run)["train"]["seed"] == number
    assert contents(tmp_path / "run.1") == contents(straight)
    assert config_of(tmp_path / "run.2")["train"]["seed"] == 1


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_second_process_in_the_same_run_directory_is_refused(data, tmp_path, monkeypatch, capsys, resume):
    """The first one goes on as if nothing had been."""
    said = []
    train_again = lambda model: said.append(refusal(capsys, data, tmp_path / "run", "--resume", resume))  # noqa: E731
    with monkeypatch.context() as patch:
        at_step(patch, 7, lambda model: (patch.undo(), train_again(model)))
        train_baseline(data, tmp_path / "run")
    assert f"in use by process {os.getpid()}" in said[0]
    assert list(losses(tmp_path / "run")) == list(range(1, 21)) and saved_steps(tmp_path / "run")[-1] == 20
    assert not (tmp_path / "run.1").exists()


# What goes wrong while it trains


@pytest.mark.parametrize("where", ["weight", "gradient"])
def test_what_is_not_finite_stops_before_the_update(data, straight, tmp_path, monkeypatch, capsys, where):
    def spoil(model):
        if where == "weight":
            model.blocks[0].ffn_norm.weight.data[3] = math.nan
        else:
            model.norm.weight.register_hook(lambda gradient: gradient * math.inf)

    at_step(monkeypatch, 7, spoil)
    said = refusal(capsys, data, tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000005"
    assert "step 7: loss " in said and "gradient norm" in said and f"Last good step: {checkpoint}" in said
    assert f"learning rate {optim.learning_rate(7, TrainConfig(steps=20, warmup_steps=4)):.3g}" in said
    assert list(losses(tmp_path / "run")) == list(range(1, 7))
    assert saved_steps(tmp_path / "run") == [5]
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "run").values())
    monkeypatch.undo()
    monkeypatch.setattr(RunDirectory, "plot", lambda self: None)
    train_baseline(data, tmp_path / "run")
    assert losses(tmp_path / "run") == losses(straight) and same_weights(tmp_path / "run", straight)


def test_weights_are_left_as_they_were_where_the_gradient_is_not_finite(data, tmp_path, monkeypatch, capsys):
    models = []

    def spoil(model):
        models.append((model, {name: tensor.clone() for name, tensor in model.state_dict().items()}))
        model.norm.weight.register_hook(lambda gradient: gradient * math.nan)

    at_step(monkeypatch, 3, spoil)
    said = refusal(capsys, data, tmp_path / "run", "--save-every", 100)
    assert "none was saved" in said
    model, before = models[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_spike_is_clipped_and_the_run_goes_on(data, tmp_path, monkeypatch):
    def spike(model):
        handle = model.norm.register_full_backward_hook(
            lambda m, gi, go: (handle.remove(), tuple(g * 1e4 for g in gi))[1]
        )

    at_step(monkeypatch, 7, spike)
    run = train_baseline(data, tmp_path / "run")
    norms = {line["step"]: line["grad_norm"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line}
    assert norms[7] > 100 * norms[6] and saved_steps(run)[-1] == 20
    assert all(tensor.isfinite().all() for tensor in weights(run).values())


def test_out_of_memory_names_the_flag(data, tmp_path, monkeypatch, capsys):
    def run_out(self, tokens):
        raise torch.OutOfMemoryError("tried to allocate 3.00 GiB")

    monkeypatch.setattr(gradient.Objective, "forward", run_out)
    said = refusal(capsys, data, tmp_path / "run")
    assert "lower --micro-batch-size (now 4 windows" in said and "tried to allocate 3.00 GiB" in said


@pytest.mark.parametrize("reason", ["no C++ compiler\nin 40 places", ""])
@pytest.mark.parametrize("broken", ["when called", "at once"])
def test_a_compiler_that_fails_costs_one_line(data, straight, tmp_path, monkeypatch, capsys, broken, reason):
    def fail(*_, **__):
        raise RuntimeError(reason)

    monkeypatch.setattr(torch, "compile", fail if broken == "at once" else lambda function: fail)
    machine = Machine(torch.device("cpu"), bf16=False, compile=True)
    monkeypatch.setattr("llm.training.loop.find_machine", lambda *_: machine)
    capsys.readouterr()
    run = train_baseline(data, tmp_path / "run")
    said = capsys.readouterr().out
    assert said.count(f"not compiled: RuntimeError: {reason.splitlines()[0] if reason else 'no reason given'}\n") == 1
    assert "40 places" not in said
    assert losses(run) == losses(straight)


def test_a_backward_that_does_not_compile_costs_one_line_too(data, straight, tmp_path, monkeypatch, capsys):
    """torch.compile leaves it for later unless it is told to."""

    def fail(graph, inputs):
        raise RuntimeError("no kernel for the way back")

    real, backend = torch.compile, aot_autograd(fw_compiler=lambda graph, inputs: graph.forward, bw_compiler=fail)
    monkeypatch.setattr(torch, "compile", lambda function: real(function, backend=backend))
    machine = Machine(torch.device("cpu"), bf16=False, compile=True)
    monkeypatch.setattr("llm.training.loop.find_machine", lambda *_: machine)
    capsys.readouterr()
    run = train_baseline(data, tmp_path / "run")
    assert "not compiled: RuntimeError: no kernel for the way back\n" in capsys.readouterr().out
    assert losses(run) == losses(straight)


def test_a_compiler_that_was_insisted_on_must_work(data, tmp_path, monkeypatch):
    def fail(tokens):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", lambda function: fail)
    with pytest.raises(RuntimeError, match="no C"):
        train_baseline(data, tmp_path / "run", "--compile", "on")


class RaisingWandb:
    """Every call of it fails."""

    def __getattr__(self, name):
        raise RuntimeError("wandb is broken today")


@pytest.mark.parametrize("wandb", ["absent", "raising"])
def test_a_broken_or_absent_wandb_does_not_touch_the_run(data, straight, tmp_path, monkeypatch, capsys, wandb):
    monkeypatch.setitem(sys.modules, "wandb", RaisingWandb() if wandb == "raising" else None)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("WANDB_SILENT", "true")  # the mirror sets both; taken back after the test
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    capsys.readouterr()
    run = train_baseline(data, tmp_path / "run", "--wandb", "auto")
    assert capsys.readouterr().out.count("wandb mirror off") == 1
    assert losses(run) == losses(straight) and same_weights(run, straight)


# What is refused before any work

BAD = {
    "heads that do not divide": (
        ["--model.n-heads", "5"],
        r"n_heads = 5 does not divide d_model = 32.*--model\.n-heads",
    ),
    "no windows": (["--tokens-per-step", "250"], r"tokens_per_step = 250 .* max_seq_len = 32: choose 224"),
    "less than a window": (["--tokens-per-step", "16"], r"tokens_per_step = 16 .*choose 32 \(--tokens-per-step\)"),
    "micro-batch": (["--micro-batch-size", "3"], r"micro_batch_size = 3 does not divide the 8 .*--micro-batch-size"),
    "no micro-batch": (["--micro-batch-size", "0"], r"micro_batch_size = 0 must be positive \(--micro-batch-size\)"),
    "vocabulary": (["--model.vocab-size", "999"], r"vocab_size = 999, but .* has 300 entries.*--model\.vocab-size"),
    "default vocabulary": (["--model.vocab_size=10000"], r"vocab_size = 10000, but .* has 300 entries"),
    "negative rate": (["--max-lr", "-1"], r"max_lr = -1\.0 must be positive \(--max-lr\)"),
    "rates the wrong way": (["--min-lr", "1"], r"min_lr = 1\.0 must lie between 0 and max_lr = 0\.001 \(--min-lr\)"),
    "seed": (["--seed", "-1"], r"seed = -1 must not be negative \(--seed\)"),
    "decay": (["--weight-decay", "-0.1"], r"weight_decay = -0\.1 must not be negative \(--weight-decay\)"),
    "decay that is no number": (["--weight-decay", "nan"], r"weight_decay = nan must be a finite.*\(--weight-decay\)"),
    "endless rate": (["--max-lr", "inf"], r"max_lr = inf must be a finite number \(--max-lr\)"),
    "size that is no number": (["--model.norm-eps", "nan"], r"norm_eps = nan must be a finite.*\(--model\.norm-eps\)"),
    "no steps": (["--steps", "0"], r"steps = 0 must be positive \(--steps\)"),
    "no save": (["--save-every", "0"], r"save_every = 0 must be positive \(--save-every\)"),
    "no layers": (["--model.n-layers", "0"], r"n_layers = 0 must be positive \(--model\.n-layers\)"),
    "beta": (["--beta2", "1"], r"beta2 = 1\.0 must lie in \[0, 1\) \(--beta2\)"),
    "unknown flag": (["--learning-rate", "1"], r"--learning-rate"),
    "unknown choice": (["--precision", "fp8"], r"fp8.*--precision"),
    "no number": (["--steps", "many"], r"many.*--steps|--steps.*many"),
    "no device": (["--device", "tpu9000"], r"'tpu9000' is no device: use auto, cuda, cuda:1, mps or cpu \(--device\)"),
    "a device that computes nothing": (
        ["--device", "meta"],
        r"'meta' is no device: use auto, cuda, cuda:1, mps or cpu",
    ),
    "long windows": (["--model.max-seq-len", "65536", "--tokens-per-step", "65536"], r"hold .* tokens, and one window"),
}


@pytest.mark.parametrize("mistake", BAD)
def test_a_bad_setting_is_refused_before_any_work(data, tmp_path, capsys, mistake):
    flags, message = BAD[mistake]
    said = " ".join(refusal(capsys, data, tmp_path / "run", *flags).replace("│", " ").split())
    assert re.search(message, said), said
    assert not (tmp_path / "run").exists()


def test_the_vocabulary_of_the_data_may_be_given(data, tmp_path):
    run = train_baseline(data, tmp_path / "run", "--model.vocab-size", 300, "--steps", 1)
    assert config_of(run)["model"]["vocab_size"] == 300


def test_missing_data_name_the_three_ways(tmp_path, capsys):
    said = refusal(capsys, tmp_path / "nothing", tmp_path / "run")
    assert "download.sh" in said and "--train my.txt" in said and "--sample" in said
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_not_listed_is_named(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("llm.training.resume.MODELS", {})
    assert "Baseline is not in MODELS: add it to llm/models/__init__.py" in refusal(capsys, data, tmp_path / "run")


def test_a_run_directory_that_cannot_be_made_is_refused(data, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    said = refusal(capsys, data, tmp_path / "file" / "run")
    assert "cannot write to" in said and "--out" in said


# Where it runs


def test_spaces_and_other_letters_in_paths_and_another_working_directory(data, straight, tmp_path, monkeypatch):
    home = tmp_path / "Räume und 故事 $x"
    shutil.copytree(data, home / "my data")
    (home / "link").symlink_to(home / "my data")
    monkeypatch.chdir(home)
    stopped(monkeypatch, "link", "my run", 6)
    train_baseline("my data", home / "my run")
    assert losses(home / "my run") == losses(straight) and same_weights(home / "my run", straight)
