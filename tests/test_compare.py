"""Tables and pictures of finished runs; and the loss at each position."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import VOCABULARY, tiny_model
from training import ROOT

from llm.analysis.compare import check_fair, main, name_apart, read_run, table
from llm.analysis.length import loss_by_position, set_scaling
from llm.config import TrainConfig
from llm.modules.position_encoding.context_extension import LinearInterpolation
from llm.training.run_directory import RunDirectoryError


def write_run(folder: Path, name: str, loss: float, seed: int = 0, **changes) -> Path:
    config = {
        "model_name": name,
        "model": {"max_seq_len": 32, "initialization": "normal"},
        "train": asdict(TrainConfig(steps=4, tokens_per_step=64, eval_windows=8, seed=seed, data="", out="")),
        "data": {"tokenizer_sha256": "a" * 64, "train_sha256": "b" * 64, "eval_sha256": "c" * 64},
        "device": "cpu",
        "precision": "fp32",
        "costs": {
            "parameters": 2_000_000,
            "active_parameters": 1_500_000,
            "flops_per_token": 3.25e6,
            "cache_bytes_per_token": 512.0,
        },
    }
    for field, value in changes.items():
        next(part for part in (config["train"], config["data"], config["model"]) if field in part)[field] = value
    lines = [
        {"step": 0, "tokens": 0, "eval_loss": 9.0, "eval_bits_per_byte": 3.0},
        {"step": 2, "tokens": 128, "loss": 5.0, "tokens_per_second": 100.0},
        {"step": 4, "tokens": 256, "loss": 4.0, "tokens_per_second": 300.0},
        {"step": 4, "tokens": 256, "eval_loss": loss, "eval_bits_per_byte": loss / 3, "peak_memory_bytes": 2**28},
    ]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


def test_a_row_holds_costs_and_results_and_seeds_share_it(tmp_path):
    folders = [write_run(tmp_path / str(seed), "baseline", 3.0 + seed, seed) for seed in range(3)]
    (header, _, row) = table([read_run(folder) for folder in folders]).strip().split("\n")
    cells = dict(zip(header.split(" | "), row.split(" | "), strict=True))
    assert cells["seeds"] == "3"
    assert cells["parameters (active)"] == "2.00 M (1.50 M)"
    assert cells["eval loss"] == "4.0000 ± 1.0000"
    assert cells["bits / byte"] == "1.3333 ± 0.3333"
    assert cells["tokens / s"] == "200"
    assert cells["memory, MiB"] == "256"


def test_the_command_writes_a_table_and_a_picture_and_leaves_other_folders_out(tmp_path, capsys):
    runs = [write_run(tmp_path / name, name, loss) for name, loss in (("baseline", 3.5), ("rope", 3.25))]
    (tmp_path / "notes").mkdir()
    main([*map(str, runs), str(tmp_path / "notes"), "--out", str(tmp_path)])
    text = (tmp_path / "comparison.md").read_text(encoding="utf-8")
    assert text in capsys.readouterr().out
    assert "| rope | 1 |" in text
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")


PICTURES = """
import sys; sys.path.insert(0, "train_scripts")
import torch, extend_context, llm.analysis.plot_initialization
from pathlib import Path
from llm.analysis.compare import main
from llm.training.curve import draw_losses
out = Path(sys.argv[1])
main([str(out / "baseline"), "--out", str(out)])
draw_losses([], out / "loss.png", "x")
extend_context.draw({"rope": [(1.0, 0.1), None]}, out / "context.png", 16)
one = llm.analysis.plot_initialization.Profile([1.0, 1.0], [1.0, 1.0], 1.0)
llm.analysis.plot_initialization.draw_scales(dict.fromkeys("abcde", one), out / "scales.png", "x")
"""


def test_in_a_notebooks_environment_every_picture_is_drawn(tmp_path):
    """Jupyter sets MPLBACKEND for every child, and the backend may not be installed where the child runs."""
    write_run(tmp_path / "baseline", "baseline", 3.5)
    environment = os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_of_another_environment"}
    subprocess.run([sys.executable, "-c", PICTURES, tmp_path], cwd=ROOT, env=environment, check=True)
    assert len(list(tmp_path.glob("*.png"))) == 4


def test_a_picture_that_fails_costs_one_line_and_the_table_is_there(tmp_path, monkeypatch, capsys):
    run = write_run(tmp_path / "baseline", "baseline", 3.5)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    main([str(run), "--out", str(tmp_path)])
    assert "no comparison.png: ModuleNotFoundError" in capsys.readouterr().out
    assert (tmp_path / "comparison.md").exists()


def test_runs_that_were_trained_differently_are_refused_by_name(tmp_path):
    one = read_run(write_run(tmp_path / "a", "baseline", 3.0))
    other = read_run(write_run(tmp_path / "b", "rope", 3.0, tokens_per_step=128))
    with pytest.raises(ValueError, match="baseline and rope were not trained alike: tokens_per_step: 64 and 128"):
        check_fair([one, other])


@pytest.mark.parametrize("what", ["train_sha256", "eval_sha256", "tokenizer_sha256", "max_seq_len"])
def test_runs_on_other_text_or_context_are_refused(tmp_path, what):
    runs = [write_run(tmp_path / "a", "baseline", 3.0), write_run(tmp_path / "b", "rope", 3.0, **{what: "9" * 64})]
    with pytest.raises(ValueError, match="not trained alike"):
        check_fair([read_run(run) for run in runs])


def test_only_seeds_share_a_row(tmp_path):
    """What else differs is another experiment, and its row says which."""
    changes = [{}, {"seed": 1}, {"initialization": "kaiming"}, {"max_lr": 0.003, "seed": 1}, {"optimizer": "muon"}]
    runs = [write_run(tmp_path / str(i), "baseline", 3.0, **change) for i, change in enumerate(changes)]
    runs.append(write_run(tmp_path / "rope", "rope", 3.0, max_lr=0.003))
    names = [result.name for result in name_apart([read_run(run) for run in runs])]
    assert names == [
        "baseline",
        "baseline",
        "baseline, initialization = kaiming",
        "baseline, max_lr = 0.003",
        "baseline, optimizer = muon",
        "rope, max_lr = 0.003",
    ]


def test_the_same_run_twice_is_no_second_seed(tmp_path):
    runs = [read_run(write_run(tmp_path / str(i), "baseline", 3.0)) for i in range(2)]
    with pytest.raises(ValueError, match="baseline with seed 0 is there twice"):
        name_apart(runs)


def test_a_run_that_is_not_finished_is_refused(tmp_path):
    with pytest.raises(RunDirectoryError, match="stopped at step 4 of 9"):
        read_run(write_run(tmp_path / "a", "baseline", 3.0, steps=9))
    with pytest.raises(RunDirectoryError, match="no run directory"):
        read_run(tmp_path)


def test_the_mean_loss_over_positions_is_the_loss_and_scaling_changes_it():
    model = tiny_model("rope")
    windows = torch.randint(VOCABULARY, (5, 33), generator=torch.Generator().manual_seed(0))
    by_position = loss_by_position(model, windows)
    assert by_position.shape == (32,)
    assert by_position.mean().item() == pytest.approx(model.loss(windows)[1]["ce"].item(), rel=1e-5)
    set_scaling(model, LinearInterpolation(4.0))
    scaled = loss_by_position(model, windows)
    assert not torch.allclose(scaled, by_position)
    assert scaled[0] == by_position[0]  # position 0 is not turned
