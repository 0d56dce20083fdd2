"""Studies: runs as lines of JSON, models of equal cost, and the scripts that train many models."""

import json
import math
from dataclasses import replace

import pytest
import torch
from scipy import stats
from training import script, write_corpus

from llm.analysis import studies
from llm.analysis.accounting import describe
from llm.analysis.matching import COSTS, cost, matched
from llm.analysis.results import find, read_runs
from llm.analysis.studies import T_95, Run, Study, complete, mean_and_error, t_95, verdict
from llm.models import MODELS


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def study(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Study("test", tmp_path / "rows.jsonl", data, steps=8, tokens_per_step=64, max_seq_len=32, eval_windows=4)


def test_a_row_has_what_a_reader_needs_to_judge_it(study):
    (row,) = complete(study, [Run("rope", 1e-2, 1, {"initialization": "xavier", "optimizer": "muon"})])
    assert read_runs(study.rows) == [row]
    model = study.model_config("rope", initialization="xavier")
    assert row.items() >= describe(MODELS["rope"](model)).items()
    assert [tokens for tokens, _ in row["curve"]] == [64 * step for step in range(9)]
    assert row["curve"][0][1] > row["curve"][-1][1] == row["eval_loss"]
    assert row["tokens"] == 512 and row["device"] == "cpu" and row["precision"] and row["commit"]
    assert (row["rate"], row["seed"], row["settings"]["optimizer"]) == (1e-2, 1, "muon")
    assert not list(study.rows.parent.glob("runs/test/*"))


def test_the_load_of_experts_is_the_mean_over_the_last_eighth(study, monkeypatch):
    lines, read = [], studies.read_metrics
    monkeypatch.setattr(studies, "read_metrics", lambda file: lines.extend(read(file)) or read(file))
    (row,) = complete(replace(study, steps=16), [Run("mixture_of_experts", 1e-2, settings={"log_every": 1})])
    late = [line for line in lines if line["step"] > 14 and "expert_load/1" in line]
    assert [line["step"] for line in late] == [15, 16] and late[0]["expert_load/1"] != late[1]["expert_load/1"]
    loads = torch.tensor([[line[f"expert_load/{layer}"] for layer in range(4)] for line in late])
    torch.testing.assert_close(torch.tensor(row["expert_load"]), loads.mean(0))


def test_only_runs_without_a_line_are_trained(study, monkeypatch):
    runs = [Run("rope", rate) for rate in (1e-3, 1e-2)]
    complete(study, runs[:1])
    trained = []
    monkeypatch.setattr(
        studies, "execute", lambda study, run: trained.append(run) or study.key(run) | dict(diverged=True, seconds=0)
    )
    assert [row["rate"] for row in complete(study, [*reversed(runs), Run("nope", 1e-2)])] == [1e-2, 1e-3, 1e-2]
    assert trained == [runs[1], Run("nope", 1e-2)]
    complete(replace(study, steps=9), runs[:1])  # another budget is another run
    assert len(trained) == 3


def test_a_run_that_diverges_has_a_line_without_a_loss(study):
    (row,) = complete(study, [Run("baseline", 1e30, settings={"grad_clip": 1e30})])
    assert row["diverged"] and row["eval_loss"] is None
    json.loads(study.rows.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_settings_that_cannot_work_are_refused_before_anything_is_trained(study):
    with pytest.raises(ValueError, match="n_heads = 3 does not divide"):
        complete(study, [Run("rope", 1e-3), Run("rope", 1e-3, settings={"n_heads": 3})])
    assert not study.rows.exists()


def test_two_processes_write_the_rows_of_one(study):
    runs = [Run(name, 1e-2) for name in ("rope", "nope")]
    losses = [row["eval_loss"] for row in complete(study, runs)]
    study.rows.unlink()
    assert [row["eval_loss"] for row in complete(study, runs, processes=2)] == losses


# Equal cost


@pytest.mark.parametrize("quantity", COSTS)
@pytest.mark.parametrize("name", ["swiglu", "multi_query", "mixtral", "deepseek_v3", "hybrid", "qwen2_moe"])
def test_the_matched_model_costs_what_the_baseline_costs(study, name, quantity):
    target = cost(MODELS["baseline"], study.model_config("baseline"), quantity)
    config = matched(MODELS[name], study.model_config(name), target, quantity)
    model = MODELS[name](config)
    found = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "flops": describe(model)["training_flops_per_token"],
    }
    assert found[quantity] == pytest.approx(target, rel=0.01)


def test_what_costs_the_same_is_left_as_it_is(study):
    config = study.model_config("rope")
    assert matched(MODELS["rope"], config, cost(MODELS["rope"], config, "flops") * 1.009, "flops") is config


# Statistics


def test_the_verdict_is_the_t_test_of_scipy():
    generator = torch.Generator().manual_seed(0)
    assert t_95(1) == math.inf and t_95(20) == T_95[8]
    for n in T_95:
        for _ in range(50):
            values = (0.1 + 0.15 * torch.randn(n, generator=generator)).tolist()
            significant = stats.ttest_1samp(values, 0).pvalue < 0.05
            expected = ("better" if sum(values) < 0 else "worse") if significant else "cannot be told"
            assert verdict(values) == expected
            assert mean_and_error(values)[1] == pytest.approx(stats.sem(values))
    assert verdict([-1.0]) == "cannot be told"


# The scripts


def row(model, loss, rate=4e-3, seed=0, **more):
    costs = dict(parameters=1_000_000, active_parameters=900_000, training_flops_per_token=6e6)
    costs |= dict(cache_bytes_per_token=4096.0, tokens=524_288)
    key = dict(study="ladder", model=model, rate=rate, seed=seed, match="none", settings={}, commit="abc", device="cpu")
    results = dict(eval_loss=loss, eval_bits_per_byte=loss and loss / 3, diverged=loss is None, curve=[[0, 9], [1, 5]])
    return {**key, **costs, **results, "precision": "fp32", **more}


def test_the_table_takes_the_best_rate_and_pairs_seeds(tmp_path, capsys):
    rows = [row("baseline", loss, seed=seed) for seed, loss in enumerate([3.0, 3.2, 3.4])]
    rows += [row("rope", 2.95, rate=2e-3), row("rope", None, rate=8e-3)]
    rows += [row("rope", loss, seed=seed) for seed, loss in enumerate([2.9, 3.09, 3.31])]
    rows += [row("masked_diffusion", 4.0, eval_loss_error=0.01)]
    ladder = script("ladder")
    ladder.report(rows, "none", tmp_path / "ladder.jsonl")
    text = (tmp_path / "ladder.md").read_text(encoding="utf-8")
    lines = {name: cells for name, *cells in (line.strip("| ").split(" | ") for line in text.splitlines())}
    rate, seeds, _, _, _, loss, apart, told, *_ = lines["rope"]
    assert (rate, seeds, loss, told) == ("0.004", "3", "3.100 ± 0.205", "better")
    assert apart == "-0.100 ± 0.006"
    assert lines["masked_diffusion"][5].startswith("≤ 4.000")
    assert text.index("Monte-Carlo") < text.index("| masked_diffusion")
    for picture in ("ladder.png", "ladder_curves.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_the_ladder_tries_three_rates_and_gives_the_best_more_seeds(data, tmp_path, monkeypatch):
    ladder, asked = script("ladder"), []
    losses = {("baseline", 8e-3): 3.0, ("rope", 4e-3): 2.5}

    def pretend(study, runs, processes):
        asked.extend(runs)
        return [row(r.model, losses.get((r.model, r.rate), 4.0), r.rate, r.seed, match=r.match) for r in runs]

    monkeypatch.setattr(ladder, "complete", pretend)
    monkeypatch.setattr(ladder, "report", lambda rows, match, out: None)
    ladder.main(["--small", "--models", "rope", "--data", str(data), "--out", str(tmp_path / "rows.jsonl")])
    runs = [(run.model, run.rate, run.seed) for run in asked]
    assert sorted(runs[:6]) == [(name, rate, 0) for name in ("baseline", "rope") for rate in (4e-3, 8e-3, 1.6e-2)]
    assert runs[6:] == [("baseline", 8e-3, 1), ("rope", 4e-3, 1), ("baseline", 8e-3, 2), ("rope", 4e-3, 2)]
    assert {run.settings["initialization"] for run in asked} == {ladder.INITIALIZATION}


def test_the_default_ladder_reads_the_text_ten_times_at_most(data):
    study = script("ladder").Arguments(data=data).study()
    n_tokens = len(studies.opened(data).train)
    assert study.steps == max(1, 10 * n_tokens // 131_072) and not study.small


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--models", "ropee"], "no model is called ropee; there are baseline"),
        (["--small", "--data", "nowhere"], "no complete token arrays in nowhere"),
        (["--small", "--report", "--out", "nowhere.jsonl"], "nowhere.jsonl has no run of the baseline"),
    ],
)
def test_the_ladder_refuses_before_it_trains(arguments, says):
    with pytest.raises(SystemExit, match=says):
        script("ladder").main(arguments)


def test_the_reference_study_writes_table_and_picture(data, tmp_path, monkeypatch):
    reference = script("reference")
    small = replace(Study("reference", tmp_path / "r.jsonl", data), steps=2, tokens_per_step=64, max_seq_len=32)
    monkeypatch.setattr(reference, "Study", lambda *_: small)
    reference.main(["--quick", "--processes", "1", "--data", str(data), "--out", str(tmp_path / "r.jsonl")])
    rows = read_runs(tmp_path / "r.jsonl")
    assert len(rows) == 6 and len(find(rows, model="output_norm")) == 2
    assert "| sandwich_norm | truncated_normal |" in (tmp_path / "r.md").read_text(encoding="utf-8")
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
