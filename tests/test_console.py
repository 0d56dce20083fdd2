"""What is printed never decides how a command ends, and a run outlives its terminal."""

import ast
import io
import os
import pty
import signal
import subprocess
import sys
import time

import pytest
from training import MODEL, ROOT, RUN, command_line, losses, saved_steps, write_corpus

from llm.console import Console, console


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("données ±"))


@pytest.mark.parametrize(
    ("encoding", "written"), [("cp1252", "café ? ±"), ("ascii", "caf? ? ?"), ("utf-8", "café 🙂 ±")]
)
def test_a_character_that_the_terminal_does_not_know_is_replaced(encoding, written):
    raw = io.BytesIO()
    stream = Console(io.TextIOWrapper(raw, encoding=encoding))
    print("café 🙂 ±", end="", file=stream, flush=True)
    assert raw.getvalue().decode(encoding) == written
    assert stream.encoding == encoding


def test_a_closed_stream_and_a_missing_one_are_ignored(monkeypatch):
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as broken:
        monkeypatch.setattr(sys, "stdout", broken)
        monkeypatch.setattr(sys, "stderr", None)
        with console():
            for _ in range(3):
                print("lost", flush=True)
                print("lost", file=sys.stderr, flush=True)
        print("lost again, as when Python ends", flush=True)
    with console():
        print("closed", flush=True)


def test_every_command_is_one_whose_output_decides_nothing():
    """Each file that is run has a `main` under `@console()`, or is a training script, which has `@command`."""
    files = [
        *ROOT.glob("llm/*.py"),
        *ROOT.glob("llm/*/*.py"),
        *ROOT.glob("train_scripts/*.py"),
        *ROOT.glob("benchmarks/*.py"),
        ROOT / "pre_tokenize.py",
    ]
    mains = {
        path.relative_to(ROOT): [ast.unparse(decorator) for decorator in node.decorator_list]
        for path in files
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name == "main"
    }
    assert len(mains) > 40
    assert not [path for path, decorators in mains.items() if not {"console()", "command"} & set(decorators)]


COMMANDS = """
import sys, runpy
from llm.analysis import compare
from llm.generate.__main__ import main as generate
sys.path[:0] = ["train_scripts", "."]
import pre_tokenize, train_baseline
data, out, *flags = sys.argv[1:]
for seed in "01":
    train_baseline.main([*flags, "--data", data, "--out", f"{out}/läuft-{seed}", "--seed", seed])
generate([f"{out}/läuft-0", "--max-new-tokens", "5", "--prompt", "é 🙂"])
generate([f"{out}/läuft-0", "--max-new-tokens", "5", "--samples", "2"])
compare.main([f"{out}/läuft-0", f"{out}/läuft-1", "--out", out])
pre_tokenize.main(["--train", f"{data}/train.txt", "--eval", f"{data}/eval.txt", "--out", data, "--vocab-size", "300"])
"""


@pytest.mark.parametrize("encoding", ["ascii", pytest.param("cp1252", marks=pytest.mark.slow)])
def test_no_command_fails_where_the_terminal_cannot_print_a_character(data, tmp_path, encoding):
    flags = command_line(RUN | MODEL | {"--model.d-ff": 64, "--steps": 4})
    words = [sys.executable, "-c", COMMANDS, data, tmp_path, *flags]
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode(encoding)
    assert (tmp_path / "comparison.md").read_text(encoding="utf-8").count("±") == 2
    assert "l?uft" in done.stdout.decode(encoding) or encoding == "cp1252"


def start(data, out, steps: int, **how) -> subprocess.Popen:
    flags = RUN | MODEL | {"--model.d-ff": 64, "--steps": steps, "--data": data, "--out": out}
    words = [sys.executable, "train_scripts/train_baseline.py", *command_line(flags)]
    return subprocess.Popen(words, cwd=ROOT, **how)


def wait_for_step(run, step: int, process: subprocess.Popen) -> None:
    while not (run / "metrics.jsonl").exists() or max(losses(run), default=0) < step:
        assert process.poll() is None
        time.sleep(0.05)


def test_a_run_outlives_the_pipe_it_prints_to(data, tmp_path):
    process = start(data, tmp_path / "run", 20, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait() == 0
    assert list(losses(tmp_path / "run")) == list(range(1, 21))


@pytest.mark.parametrize("nohup", [True, False])
def test_a_run_that_loses_its_terminal_goes_on_under_nohup_and_else_saves(data, tmp_path, nohup):
    run, (terminal, ours) = tmp_path / "run", pty.openpty()

    def prepare():
        os.setsid()
        os.close(os.open(os.ttyname(0), os.O_RDWR))  # makes it the controlling terminal
        signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)

    steps = 40 if nohup else 100_000
    process = start(data, run, steps, stdin=ours, stdout=ours, stderr=ours, preexec_fn=prepare)
    os.close(ours)
    wait_for_step(run, 3, process)
    os.close(terminal)
    assert process.wait() == (0 if nohup else 128 + signal.SIGHUP)
    assert saved_steps(run)[-1] == max(losses(run)) == (40 if nohup else max(losses(run)))
