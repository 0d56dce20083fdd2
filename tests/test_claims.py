"""The claims: a verdict needs a difference that a t-test tells from noise, and the page is what the rows give."""

import json
import math
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
from scipy import stats
from training import ROOT, script

from llm.analysis.claims import CLAIMS, Arm, Claim, Long, Probe, Reach, imbalance, judge
from llm.config import TrainConfig
from llm.models import MODELS

LOSS = Claim("a", "b", Arm("rope"), Arm("baseline"))
LITTLE = Claim("a", "b", Arm("rope"), Arm("baseline"), margin=0.05)
ACCURACY = Claim("a", "b", Probe("rope", "recall"), Probe("retnet", "recall"))


RESULTS = ROOT / "docs" / "results"


def by_seed(*values):
    return dict(enumerate(values))


@pytest.mark.parametrize(
    "claim, first, second, verdict",
    [
        (LOSS, (3.0, 3.1, 3.2), (3.1, 3.21, 3.29), "holds"),
        (LOSS, (3.1, 3.21, 3.29), (3.0, 3.1, 3.2), "does not hold here"),
        (LOSS, (3.0, 3.1, 3.2), (3.3, 3.1, 3.21), "cannot be told at this size"),
        (LOSS, (3.0, 3.1), (4.0, 4.1), "not run yet"),
        (LOSS, (3.0, 3.1, 3.2), (math.inf,) * 3, "holds"),
        (LOSS, (3.0, 3.1, math.inf), (3.0, 3.1, 3.2), "does not hold here"),
        (LOSS, (3.0, 3.1, 3.2), (3.0, 3.1, math.inf), "cannot be told at this size"),
        (LITTLE, (3.01, 3.11, 3.22), (3.0, 3.1, 3.2), "holds"),
        (LITTLE, (3.2, 3.31, 3.42), (3.0, 3.1, 3.2), "does not hold here"),
        (ACCURACY, (0.9, 0.92, 0.95), (0.2, 0.3, 0.25), "holds"),
        (ACCURACY, (0.2, 0.3, 0.25), (0.9, 0.92, 0.95), "does not hold here"),
    ],
)
def test_the_verdict(claim, first, second, verdict):
    _, told = judge(claim, by_seed(*first), by_seed(*second))
    assert told == verdict
    if told in ("holds", "does not hold here") and math.inf not in (*first, *second) and not claim.margin:
        assert stats.ttest_rel(first, second).pvalue < 0.05
    if claim is LITTLE:
        upper = stats.ttest_rel(first, second).confidence_interval(0.95)
        assert (upper.high < 0.05) == (told == "holds")


def test_numbers_are_first_minus_second():
    assert judge(LOSS, by_seed(3.0, 3.1, 3.2), by_seed(3.1, 3.2, 3.3))[0].startswith("-0.100 ± 0.000")
    assert judge(ACCURACY, by_seed(0.9, 0.9, 0.9), by_seed(0.4, 0.4, 0.4))[0] == "+50.0 ± 0.0 points"


def test_a_probe_counts_at_its_best_rate_and_a_reach_is_what_is_lost_beyond_the_trained_length():
    runs = [(1e-3, 0, 0.5), (1e-3, 1, 0.6), (3e-3, 0, 0.9), (3e-3, 1, 0.8)]
    rows = [dict(model="rope", task="copy", rate=r, seed=s, accuracy={"1": a, "4": a / 2}) for r, s, a in runs]
    assert Probe("rope", "copy", 4).result(rows) == {0: 0.45, 1: 0.4}
    assert Probe("nope", "copy").result(rows) == {}
    lost = dict(model="rope", scaling=None, tuned=False, seed=2, loss=[3.0, 3.5, 4.25])
    none = lost | dict(seed=1, loss=[3.0, None, None])
    assert Reach("rope").result([lost, none]) == {2: 1.25} and Long("rope").result([lost, none]) == {2: 4.25}
    assert imbalance({"expert_load": [[0.25, 0.5, 0.125, 0.125]]}) == 2
    assert imbalance({"expert_load": [[0.5, 0.5], [0.75, 0.25]]}) == 1.5


def test_there_are_enough_claims_and_each_names_what_exists():
    assert len(CLAIMS) >= 20
    names = {field.name for field in fields(TrainConfig)}
    probe = script("probe")
    for claim in CLAIMS:
        for side in (claim.first, claim.second):
            if isinstance(side, Probe):
                assert probe.name_and_settings(side.model)[0] in probe.MODEL_NAMES and side.task in probe.TASKS
            else:
                assert side.model in MODELS
            if isinstance(side, Arm):
                assert side.settings.keys() <= names | {field.name for field in fields(MODELS[side.model].Config)}
        assert "arXiv" in claim.source


def test_the_committed_page_is_what_the_committed_rows_give(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "train_scripts")
    monkeypatch.chdir(ROOT)
    script("claims").main(["--report", "--out", str(tmp_path / "claims.md")])
    assert (tmp_path / "claims.md").read_text("utf-8") == (ROOT / "docs" / "claims.md").read_text("utf-8")


@pytest.mark.parametrize(
    "name, flags, page",
    [
        ("ladder", ["--small", "--match", "flops"], "ladder_flops.md"),
        ("ladder", ["--small", "--match", "parameters"], "ladder_parameters.md"),
        ("reference", [], "reference.md"),
        ("probe", [], "probes.md"),
        ("extend_context", [], "context.md"),
    ],
)
def test_the_committed_tables_are_what_the_committed_rows_give(name, flags, page, tmp_path, monkeypatch):
    module, rows = script(name), page.split("_")[0].removesuffix(".md") + ".jsonl"
    monkeypatch.setattr(module, "try_to_draw", lambda *inputs: None)
    shutil.copy(RESULTS / rows, tmp_path)
    module.main([*flags, "--report", "--out", str(tmp_path / rows)])
    assert (tmp_path / page).read_text("utf-8") == (RESULTS / page).read_text("utf-8")


def test_probes_that_a_claim_compares_are_trained_with_three_seeds(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "train_scripts")
    claims, filled = script("claims"), []
    monkeypatch.setattr(claims, "CLAIMS", [ACCURACY, Claim("c", "d", Probe("rope", "copy", 4), Probe("lstm", "copy"))])
    monkeypatch.setattr(claims.probe, "fill", filled.append)
    claims.main(["--results", str(tmp_path), "--out", str(tmp_path / "claims.md")])
    assert [(a.tasks, a.models, a.seeds) for a in filled] == [
        (("copy",), ("rope", "lstm"), 3),
        (("recall",), ("rope", "retnet"), 3),
    ]
    assert {a.out for a in filled} == {tmp_path / "probes.jsonl"}
    filled.clear()
    claims.main(["--report", "--results", str(tmp_path), "--out", str(tmp_path / "claims.md")])
    assert not filled


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*.jsonl")), ids=lambda file: file.name)
def test_every_committed_row_says_where_it_ran_and_with_which_seed(file: Path):
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row.get("model") == "text":  # the stories themselves, which nobody trained
            continue
        assert {"seed", "commit", "device"} <= row.keys() and len(row["commit"]) >= 40
