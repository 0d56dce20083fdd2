"""The run directory: one owner, a record without gaps or doubles, and a wandb mirror that cannot hurt."""

import json
import multiprocessing
import os
import resource
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from llm.training import provenance, run_directory, wandb_mirror
from llm.training.curve import running_mean, series
from llm.training.run_directory import RunDirectory, RunDirectoryError, existing_config, read_metrics

CONFIG = {"model_name": "baseline", "model": {"d_model": 6}, "device": "cpu"}


@pytest.fixture(autouse=True)
def no_wandb_from_outside(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("WANDB_SILENT", "WANDB_ERROR_REPORTING"):  # set by the mirror, taken back after the test
        monkeypatch.setenv(name, "true")
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


def open_run(path, wandb="off", resume_step=0):
    return RunDirectory(path, CONFIG, wandb=wandb, resume_step=resume_step)


def steps(path):
    return [line["step"] for line in read_metrics(path / "metrics.jsonl")]


def write_run(path, n_steps, wandb="off"):
    run = open_run(path, wandb)
    for step in range(1, n_steps + 1):
        run.log(step, tokens=10 * step, loss=9.0 / step)
        run.sample(step, f"Story {step}\n\nin two paragraphs é")
    run.close()


def test_config_holds_what_was_given_and_where_it_ran(tmp_path):
    assert existing_config(tmp_path / "run") is None
    open_run(tmp_path / "run").close()
    config = existing_config(tmp_path / "run")
    assert {name: config[name] for name in CONFIG} == CONFIG
    assert config["versions"]["torch"] == torch.__version__ and config["versions"]["numpy"] == np.__version__
    assert config["commit"] is None or len(config["commit"].removesuffix("-dirty")) == 40
    (tmp_path / "run" / "config.json").write_text("{")
    with pytest.raises(RunDirectoryError, match=r"config\.json cannot be read"):
        existing_config(tmp_path / "run")


def test_no_commit_outside_git(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "llm" / "training" / "provenance.py"))
    open_run(tmp_path / "run").close()
    assert existing_config(tmp_path / "run")["commit"] is None


def test_every_line_is_valid_json_whatever_is_logged(tmp_path):
    run = open_run(tmp_path / "räume und $x$")
    run.log(1, loss=float("nan"), grad_norm=float("inf"), load=[torch.tensor(0.5), np.float32(2)], counts=np.arange(2))
    run.log(2, load={"layer 0": torch.tensor([1.0, float("-inf")])}, note=None, path=tmp_path)

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    lines = [json.loads(line, parse_constant=refuse) for line in (run.path / "metrics.jsonl").open(encoding="utf-8")]
    assert lines[0] == {"step": 1, "loss": None, "grad_norm": None, "load": [0.5, 2.0], "counts": [0, 1]}
    assert lines[1] == {"step": 2, "load": {"layer 0": [1.0, None]}, "note": None, "path": str(tmp_path)}
    assert read_metrics(run.path / "metrics.jsonl") == lines  # flushed: the run is still open
    run.close()


@pytest.mark.parametrize("torn", ["", '{"step": 7, "tok', '{"step": 7, "loss": 1.5}', "\0\0\0"])
def test_resume_drops_the_torn_line_and_the_steps_that_come_again(tmp_path, torn):
    write_run(tmp_path, 6)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(torn)
    run = open_run(tmp_path, resume_step=4)
    for step in range(5, 8):
        run.log(step, loss=0.5)
        run.sample(step, "again")
    run.close()
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6, 7]
    assert [line["loss"] for line in read_metrics(tmp_path / "metrics.jsonl")][3:] == [9 / 4, 0.5, 0.5, 0.5]
    stories = (tmp_path / "samples.txt").read_text(encoding="utf-8")
    assert "Story 4\n\nin two paragraphs é" in stories and "Story 5" not in stories
    assert stories.count("--- step ") == 7 and stories.count("again") == 3
    open_run(tmp_path).close()  # from the start
    assert steps(tmp_path) == [] and (tmp_path / "samples.txt").read_text() == ""


def test_reading_tolerates_a_torn_end_only(tmp_path):
    file = tmp_path / "metrics.jsonl"
    assert read_metrics(file) == []
    file.write_text('{"step": 1}\n{"st')
    assert read_metrics(file) == [{"step": 1}]
    file.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(RunDirectoryError, match="line 2 is not JSON"):
        read_metrics(file)


def test_a_second_owner_is_refused_by_name_and_a_dead_one_is_forgotten(tmp_path):
    run = open_run(tmp_path)
    run.log(1, loss=1.0)
    with pytest.raises(RunDirectoryError, match=rf"in use by process {os.getpid()}: .*--out"):
        open_run(tmp_path)
    run.log(2, loss=1.0)
    assert steps(tmp_path) == [1, 2]  # the refused one changed nothing
    run.close()
    run.close()

    fork = multiprocessing.get_context("fork")
    ready = fork.Event()
    owner = fork.Process(target=own_forever, args=(tmp_path, ready))
    owner.start()
    ready.wait()
    with pytest.raises(RunDirectoryError, match=f"in use by process {owner.pid}:"):
        open_run(tmp_path)
    owner.kill()
    owner.join()
    assert (tmp_path / "lock").read_text() == f"{owner.pid}\n"
    open_run(tmp_path).close()
    assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"


def own_forever(path, ready):
    run = open_run(path)
    ready.set()
    threading.Event().wait()
    run.close()


def name_of(file: int) -> str:
    return os.readlink(f"/proc/self/fd/{file}")


def test_locking_without_fcntl_and_where_nothing_can_be_locked(tmp_path, monkeypatch, capsys):
    locked = []
    windows = SimpleNamespace(LK_NBLCK=2, locking=lambda file, *how: locked.append((name_of(file), *how)))
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", windows)
    open_run(tmp_path).close()
    assert locked.count((str(tmp_path / "lock"), 2, 1)) == 1
    assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    windows.locking = refuse
    with pytest.raises(RunDirectoryError, match=f"in use by process {os.getpid()}"):
        open_run(tmp_path)

    def cannot(*_):
        raise OSError(37, "No locks available")

    windows.locking = cannot
    open_run(tmp_path).close()
    assert "cannot be locked here" in capsys.readouterr().out


def test_a_place_that_cannot_be_written_is_refused_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirectoryError, match=r"cannot write to .*file.*--out"):
        open_run(tmp_path / "file" / "run")
    (tmp_path / "read-only").mkdir()

    def read_only(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(run_directory, "FileIO", read_only)
    with pytest.raises(RunDirectoryError, match="Read-only file system"):
        open_run(tmp_path / "read-only")


def test_a_full_disk_is_said_and_the_record_stays_readable(tmp_path):
    run = open_run(tmp_path)
    run.log(1, loss=1.0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        for message in ("disk full after", "File too large"):  # the first write is cut short, the next one refused
            with pytest.raises(RunDirectoryError, match=message):
                run.log(2, note="x" * 200)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    run.close()
    assert steps(tmp_path) == [1]
    run = open_run(tmp_path, resume_step=1)
    run.log(2, loss=1.0)
    run.close()
    assert steps(tmp_path) == [1, 2]


def test_the_plot_is_a_picture_of_the_record(tmp_path, capsys):
    run = open_run(tmp_path / "run $x_{1$")
    run.plot()  # nothing logged yet
    for step in range(1, 41):
        run.log(step, tokens=100 * step, loss=None if step == 3 else 5 / step)
    run.log(40, tokens=4000, eval_loss=0.5)
    run.log(41, loss=float("nan"), tokens=4100)
    run.plot()
    assert (run.path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out == ""
    tokens, losses = series(read_metrics(run.path / "metrics.jsonl"), "loss")
    assert len(tokens) == 39 and tokens[-1] == 4000 and losses[-1] == 5 / 40
    _, smooth = running_mean(tokens, losses)
    assert smooth[10] == pytest.approx(losses[8:13].mean())
    run.close()


def test_a_failing_plot_costs_one_line(tmp_path, monkeypatch, capsys):
    run = open_run(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run.plot()
    assert capsys.readouterr().out.count("\n") == 1
    run.close()


class FakeWandb:
    """Does what wandb does, or fails where it is told to."""

    def __init__(self, broken=""):
        self.broken, self.calls, self.release = broken, [], threading.Event()

    def __getattr__(self, name):
        def call(*args, **kwargs):
            self.calls.append((name, args, kwargs))
            if self.broken == f"{name} raises":
                raise RuntimeError("no such luck\nand a second line")
            if self.broken == f"{name} exits":
                raise SystemExit(1)
            if self.broken == f"{name} hangs":
                self.release.wait()
            return self

        return call

    def named(self, name):
        return [call for call in self.calls if call[0] == name]


BROKEN = ["import fails", "init raises", "init exits", "log raises", "finish raises", "init hangs", "finish hangs"]


@pytest.mark.parametrize("broken", BROKEN)
def test_no_failure_of_wandb_reaches_the_run(tmp_path, monkeypatch, capsys, broken):
    fake = FakeWandb(broken)
    monkeypatch.setitem(sys.modules, "wandb", None if broken == "import fails" else fake)
    monkeypatch.setattr(wandb_mirror, "FINISH_SECONDS", 0.1)
    write_run(tmp_path, 5, wandb="online")
    assert steps(tmp_path) == [1, 2, 3, 4, 5]
    said = capsys.readouterr().out
    assert said.count("wandb mirror") == 1 and said.count("\n") == 1
    assert ("left behind" if "hangs" in broken else "off") in said
    fake.release.set()


def test_the_mirror_gets_every_line_and_the_exit_code(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setitem(sys.modules, "wandb", fake := FakeWandb())
    run = open_run(tmp_path, wandb="auto")
    run.log(1, loss=2.5, load=np.arange(2))
    run.log(2, loss=float("nan"))
    run.close(exit_code=3)
    assert [call[1:] for call in fake.named("log")] == [
        (({"loss": 2.5, "load": [0, 1]},), {"step": 1}),
        (({"loss": None},), {"step": 2}),
    ]
    assert fake.named("finish")[0][2] == {"exit_code": 3}
    init = fake.named("init")[0][2]
    assert init["mode"] == "online" and init["config"]["model"] == {"d_model": 6} and init["dir"] == tmp_path


def test_a_resumed_run_goes_on_in_its_wandb_run(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", fake := FakeWandb())
    for resume_step in (0, 5, 0):
        open_run(tmp_path, "online", resume_step).close()
    first, resumed, anew = [call[2]["id"] for call in fake.named("init")]
    assert first == resumed != anew


@pytest.mark.parametrize(("mode", "key"), [("auto", None), ("auto", ""), ("off", "k" * 40)])
def test_without_a_key_or_when_off_wandb_is_not_even_imported(tmp_path, monkeypatch, capsys, mode, key):
    if key is not None:
        monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it would fail, and say so
    write_run(tmp_path, 2, wandb=mode)
    assert capsys.readouterr().out == ""


def test_wandb_itself_offline_and_with_an_unreachable_server(tmp_path, monkeypatch, capsys):
    """The real package; both in one test because its service takes seconds to start."""
    import wandb

    monkeypatch.setattr(wandb_mirror, "FINISH_SECONDS", 60.0)
    write_run(tmp_path / "offline", 3, wandb="offline")
    assert capsys.readouterr().out == ""
    wandb.teardown()  # what wandb does when the process ends; until then its file may be incomplete
    (record,) = (tmp_path / "offline" / "wandb").glob("offline-run-*/run-*.wandb")
    content = record.read_bytes()
    assert b"tokens" in content and b"baseline" in content and str(9.0 / 2).encode() in content

    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setitem(wandb_mirror.SETTINGS, "init_timeout", 1.0)
    write_run(tmp_path / "unreachable", 3, wandb="online")
    assert steps(tmp_path / "unreachable") == [1, 2, 3]
    said = capsys.readouterr().out
    assert said.count("wandb mirror off: ") == 1 and said.count("\n") == 1
    wandb.teardown()

    def ask(*_, **__):
        asked.append(True)
        return ""

    asked = []
    monkeypatch.delenv("WANDB_API_KEY")
    for question in ("builtins.input", "getpass.getpass"):
        monkeypatch.setattr(question, ask)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    write_run(tmp_path / "no key", 3, wandb="online")
    assert steps(tmp_path / "no key") == [1, 2, 3] and not asked
    assert capsys.readouterr().out.count("wandb mirror off: ") == 1
    wandb.teardown()
