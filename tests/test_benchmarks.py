"""The benchmarks: contestants in turn, and rivals that do the same work. No test here measures time."""

import sys

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
    text = log.read_text() + sys.argv[3]
    log.write_text(text)
    if text.endswith(sys.argv[4]):
        sys.exit(3)
    return {"turn": text.count(sys.argv[3])}

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
    assert log.read_text() == "ababab"
    assert results == {"a": [{"turn": 2}, {"turn": 3}], "b": [{"turn": 2}, {"turn": 3}]}
    assert all(child.child.poll() == 0 for child in both.values())


def test_a_contestant_that_dies_is_left_out_and_named(tmp_path, capsys):
    measure, both, log = contestants(tmp_path, dies="abab")
    assert measure.in_turn(both, turns=2) == {"a": [{"turn": 2}, {"turn": 3}]}
    assert log.read_text() == "ababa"
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
