"""The benchmarks: contestants in turn, and rivals that do the same work. No test here measures time."""

import json
import sys
from pathlib import Path

import pytest
import torch
from training import ROOT, load

BENCHMARKS = ROOT / "benchmarks"
TURNS = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from measure import answer

def turn():
    log = Path(sys.argv[2])
    with log.open("a") as file:
        file.write(sys.argv[3])
    turn = log.read_text().count(sys.argv[3])
    if sys.argv[3] == sys.argv[4] and turn == 2:
        sys.exit(3)
    return {"turn": turn}

answer(turn)
"""


@pytest.fixture(autouse=True)
def beside_each_other(monkeypatch):
    """Scripts find the modules of their own folder."""
    monkeypatch.syspath_prepend(BENCHMARKS)


def contestants(tmp_path, dies="never"):
    measure = load(BENCHMARKS / "measure.py")
    log = tmp_path / "log"
    log.write_text("")
    make = {name: ["-c", TURNS, str(BENCHMARKS), str(log), name, dies] for name in "ab"}
    return measure, {name: measure.Contestant(command) for name, command in make.items()}, log


def test_contestants_take_turns_and_the_first_turn_does_not_count(tmp_path):
    measure, both, log = contestants(tmp_path)
    results = measure.in_turn(both, turns=2)
    assert sorted(log.read_text()[:2]) == ["a", "b"]  # all warm up at once
    assert log.read_text()[2:] == "abab"
    assert results == {"a": [{"turn": 2}, {"turn": 3}], "b": [{"turn": 2}, {"turn": 3}]}
    assert all(child.child.poll() == 0 for child in both.values())


def test_a_contestant_that_dies_is_left_out_and_named(tmp_path, capsys):
    measure, both, log = contestants(tmp_path, dies="b")
    assert measure.in_turn(both, turns=2) == {"a": [{"turn": 2}, {"turn": 3}]}
    assert log.read_text()[2:] == "aba"
    assert "b is left out" in capsys.readouterr().err


def test_ratios_are_taken_within_a_turn():
    measure = load(BENCHMARKS / "measure.py")
    slow, fast = [{"s": 2.0}, {"s": 20.0}, {"s": 6.0}], [{"s": 1.0}, {"s": 10.0}, {"s": 2.0}]
    assert measure.ratio(slow, fast, "s") == 2.0
    assert measure.median(slow, "s") == 6.0


@pytest.mark.parametrize("name", ["transformers GPT-2", "transformers Llama"])
@pytest.mark.parametrize("size", ["default", "gpt2"])
def test_rivals_have_the_size_of_the_baseline(name, size):
    train = load(BENCHMARKS / "train.py")
    with torch.device("meta"):
        counts = [
            sum(p.numel() for p in train.MAKE[n](train.SIZES[size])[0].parameters() if p.dim() > 1)
            for n in ("ours", name)
        ]
    tables = train.SIZES[size].max_seq_len * train.SIZES[size].d_model if name == "transformers GPT-2" else 0
    assert counts[1] - tables == pytest.approx(counts[0], rel=0.01)


def test_rivals_compute_a_loss_with_a_gradient():
    train = load(BENCHMARKS / "train.py")
    config = train.Baseline.Config(vocab_size=97, max_seq_len=32, d_model=64, n_layers=1, n_heads=4, d_ff=96)
    for name in ("ours", "transformers GPT-2", "transformers Llama"):
        model, loss = train.MAKE[name](config)
        value = loss(torch.randint(97, (2, 17)))
        value.backward()
        assert 3 < value.item() < 8
        assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("script", sorted(path.stem for path in BENCHMARKS.glob("*.py") if path.stem != "measure"))
def test_every_benchmark_explains_its_flags(script, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--help"])
    with pytest.raises(SystemExit) as end:
        load(BENCHMARKS / f"{script}.py").main()
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert script == "gpu" or any(flag in said for flag in ("--turns", "--megabytes", "--fast-memory"))


def test_a_part_of_the_gpu_job_ends_at_its_limit_and_what_is_done_is_written(tmp_path, monkeypatch):
    """The second part runs for ever, in a child of its own, too; the results of the first stand by then."""
    gpu = load(BENCHMARKS / "gpu.py")
    child = (
        "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)', sys.argv[1]])"
    )
    look = "import sys; print('bar  10%\\rbar 100%'); print(open(sys.argv[1]).read() if len(sys.argv) > 1 else 'first')"
    written, mark = tmp_path / "results.md", "a-child-of-" + tmp_path.name
    parts = [
        gpu.Part("one", 60, ["-c", look]),
        gpu.Part("for-ever", 2, ["-c", child, mark]),
        gpu.Part("broken", 60, ["-c", "raise SystemExit(3)"]),
        gpu.Part("last", 60, ["-c", look, str(written)]),
    ]
    monkeypatch.setattr(gpu, "all_parts", lambda flags: parts)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cuda", "--out", str(tmp_path)])
    monkeypatch.setattr(gpu, "find_device", torch.device)
    monkeypatch.setattr(gpu, "machine_line", lambda device: "a GPU")
    with pytest.raises(SystemExit) as end:
        gpu.main()
    assert end.value.code == 1
    found = json.loads((tmp_path / "results.json").read_text())
    assert {part["name"]: part["status"] for part in found["parts"]} == {
        "one": 0,
        "for-ever": "stopped after 2 s",
        "broken": 3,
        "last": 0,
    }
    text = written.read_text()
    assert "first" in text and "bar 100%" in text and "bar  10%" not in text
    assert "## for-ever: FAILED (stopped after 2 s)" in (tmp_path / "last.log").read_text()
    assert not [p for p in Path("/proc").glob("[0-9]*/cmdline") if mark.encode() in read(p)]


def read(path):
    """The bytes of a file; none where it is gone."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_the_parts_of_the_gpu_job_take_eight_minutes_and_have_a_name_each(tmp_path):
    gpu = load(BENCHMARKS / "gpu.py")
    for tiny in (False, True):
        parts = gpu.all_parts(gpu.Arguments(tiny=tiny, out=tmp_path))
        assert sum(part.limit for part in parts) <= 480
        assert len({part.name for part in parts}) == len(parts)
        assert all((BENCHMARKS.parent / part.words[0]).exists() or part.words[0] == "-m" for part in parts)


@pytest.mark.parametrize("name", ["models", "recurrent", "sequence_length"])
def test_an_unknown_model_is_named_before_anything_is_measured(name, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    benchmark = load(BENCHMARKS / f"{name}.py")
    with pytest.raises(SystemExit, match="no model is called mamba3: choose from"):
        benchmark.main(["--models", "baseline", "mamba3"])
