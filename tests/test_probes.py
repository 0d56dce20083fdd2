"""Each probe against a checker of its own: the targets are those that the tokens decide, and nothing else."""

import json
import random
from itertools import permutations

import pytest
import torch
from training import script

from llm.analysis.probes import TASKS, UNDECIDED, draw, multiplication_table, needle

LENGTH, ROWS = 64, 16


def texts(name, length=LENGTH):
    """Rows of (tokens, targets) as lists."""
    tokens, targets = draw(TASKS[name], seed=1, step=2, batch_size=ROWS, length=length)
    assert tokens.shape == targets.shape and tokens.shape[1] <= length
    assert tokens.min() >= 0 and tokens.max() < TASKS[name].vocab_size
    return list(zip(tokens.tolist(), targets.tolist(), strict=True))


def by_lookup(tokens, width, n_keys, period):
    """Values of keys seen before, by a dictionary; None where the text does not decide the next token."""
    known, found = {}, []
    groups = [tokens[i : i + period] for i in range(0, len(tokens), period)]
    for group in groups:
        key, value = tuple(group[:width]), group[width : 2 * width]
        answers = known.get(key)
        found += [None] * (width - 1) + (list(answers) if answers else [None] * width)
        found += [None] * (period - 2 * width + 1)
        known.setdefault(key, value)
    return found[: len(tokens)]


@pytest.mark.parametrize(
    ("name", "width", "n_keys", "period"),
    [("recall", 1, 32, 2), ("noisy_recall", 1, 32, 4), ("fuzzy_recall", 2, 16, 4)],
)
def test_recall_is_decided_by_a_dictionary(name, width, n_keys, period):
    for tokens, targets in texts(name):
        found = by_lookup(tokens, width, n_keys, period)
        for target, answer in zip(targets, found, strict=True):
            assert target == (UNDECIDED if answer is None else answer)
        assert any(target != UNDECIDED for target in targets)


def test_selective_copy_repeats_the_symbols_and_skips_the_blanks():
    for tokens, targets in texts("selective_copy"):
        end = tokens.index(15)
        assert [target for target in targets if target != UNDECIDED] == [t for t in tokens[:end] if t != 14]
        assert all(target == UNDECIDED for target in targets[:end])


def test_copy_repeats_the_string():
    for tokens, targets in texts("copy"):
        end = tokens.index(30)
        assert targets[end:] == tokens[:end] and set(targets[:end]) == {UNDECIDED}


def test_parity_is_the_sum_so_far():
    for tokens, targets in texts("parity"):
        assert targets == [sum(tokens[: t + 1]) % 2 for t in range(len(tokens))]


@pytest.mark.parametrize(("name", "n"), [("s3", 3), ("s5", 5)])
def test_products_apply_one_permutation_after_the_other(name, n):
    elements = list(permutations(range(n)))
    for tokens, targets in texts(name):
        things = list(range(n))
        for token, target in zip(tokens, targets, strict=True):
            things = [elements[token][thing] for thing in things]
            assert elements[target] == tuple(things)


def test_s5_swaps_neighbours_and_reaches_all_permutations():
    elements = list(permutations(range(5)))
    tokens, targets = draw(TASKS["s5"], 1, 2, 256, LENGTH)
    moved = [[i for i in range(5) if elements[token][i] != i] for token in tokens.unique().tolist()]
    assert sorted(moved) == [[0, 1], [1, 2], [2, 3], [3, 4]]
    assert len(targets.unique()) == 120


def test_permutations_form_a_group_that_does_not_commute():
    table = multiplication_table(3)
    assert torch.equal(table[0], torch.arange(6)) and torch.equal(table[:, 0], torch.arange(6))
    assert all(sorted(row) == list(range(6)) for row in [*table.tolist(), *table.T.tolist()])
    assert not torch.equal(table, table.T)


def test_the_needle_is_found_by_looking_for_its_mark():
    for tokens, targets in texts("needle"):
        assert tokens.count(16) == 2 and set(targets[:-1]) == {UNDECIDED}
        assert targets[-1] == tokens[tokens.index(16) + 1] < 16


@pytest.mark.parametrize("distance", [1, 20, 60])
def test_the_needle_may_have_a_given_distance(distance):
    tokens, _ = needle(torch.Generator().manual_seed(0), 8, LENGTH, 16, distance)
    assert all(len(row) - 1 - row.index(16) - 1 == distance for row in tokens.tolist())


def test_induction_repeats_what_followed_last_time():
    for tokens, targets in texts("induction"):
        first, asked = tokens[: LENGTH // 2], tokens[LENGTH // 2 :: 2]
        assert len(set(first)) == len(first) and len(asked) == LENGTH // 4
        assert targets[LENGTH // 2 :: 2] == [first[first.index(token) + 1] for token in asked]
        assert {*targets[: LENGTH // 2], *targets[LENGTH // 2 + 1 :: 2]} == {UNDECIDED}


def test_nested_brackets_close_as_a_stack_says():
    for tokens, targets in texts("nested"):
        stack = []
        for token, target in zip(tokens, targets, strict=True):
            if token < 2:
                stack.append(token)
            elif token == 4:
                assert target == 2 + stack.pop()
            assert (token == 4) == (target != UNDECIDED) and len(stack) <= 8


@pytest.mark.parametrize("name", TASKS)
def test_a_guess_among_the_answers_is_right_as_often_as_chance_says(name):
    targets = torch.cat([draw(TASKS[name], 1, step, ROWS, LENGTH)[1].flatten() for step in range(100)])
    targets = targets[targets != UNDECIDED].tolist()
    answers, guess = sorted(set(targets)), random.Random(0)
    right = sum(guess.choice(answers) == target for target in targets) / len(targets)
    assert right == pytest.approx(TASKS[name].chance, rel=0.5)


@pytest.mark.parametrize("name", TASKS)
def test_texts_are_a_function_of_seed_and_step(name):
    one, again, other = (draw(TASKS[name], 1, step, 4, LENGTH) for step in (5, 5, 6))
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one[0], other[0])
    assert draw(TASKS[name], 1, 5, 4, 4 * LENGTH)[0].shape[1] > 3 * LENGTH


# The script


SMALL = ["--processes", "1", "--tasks", "parity", "--steps", "2", "--length", "8", "--batch-size", "2"]


def test_the_script_goes_on_with_the_runs_that_are_missing(tmp_path, capsys):
    out = tmp_path / "runs.jsonl"
    main = script("probe").main
    main(["--models", "rope", "lstm", *SMALL, "--rates", "0.003", "--out", str(out)])
    first = out.read_text()
    main(["--models", "rope", "lstm", "mamba2", *SMALL, "--rates", "0.003", "--out", str(out)])
    assert out.read_text().startswith(first)
    runs = [json.loads(line) for line in out.read_text().splitlines()]
    assert [run["model"] for run in runs] == ["rope", "lstm", "mamba2"]
    assert all(list(run["accuracy"]) == ["1", "2", "4"] for run in runs)
    table = capsys.readouterr().out
    assert all(f"| {name} |" in table for name in ("rope", "lstm", "mamba2", "chance"))
    assert (tmp_path / "runs.png").read_bytes().startswith(b"\x89PNG")


def test_rates_are_tried_until_one_solves_the_task_and_more_seeds_take_the_best(tmp_path, monkeypatch):
    probe = script("probe")
    reached = {("rope", 1e-2): 1.0, ("nope", 1e-2): 0.5, ("nope", 5e-3): 0.7, ("nope", 2e-2): 0.6}
    reached |= {("alibi", 1e-2): 1.0, ("alibi", 5e-3): 0.999}
    fails = {"model": "alibi", "rate": 1e-2, "seed": 1}.items()  # the only one that does not reach the same

    def train(run, a):
        return {"accuracy": {"1": 0.2 if fails <= run.items() else reached[run["model"], run["rate"]]}}

    monkeypatch.setattr(probe, "train", train)
    monkeypatch.setattr(probe, "report", lambda found, a: None)
    out = tmp_path / "runs.jsonl"
    probe.main(["--models", "rope", "nope", "alibi", "--seeds", "2", *SMALL, "--longer", "1", "--out", str(out)])
    runs = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(run["model"], run["rate"], run["seed"]) for run in runs] == [
        ("rope", 1e-2, 0), ("nope", 1e-2, 0), ("alibi", 1e-2, 0), ("nope", 5e-3, 0), ("nope", 2e-2, 0),
        ("rope", 1e-2, 1), ("nope", 5e-3, 1), ("alibi", 1e-2, 1), ("alibi", 5e-3, 0), ("alibi", 5e-3, 1),
    ]  # fmt: skip
    assert [run["rate"] for run in probe.at_best_probe_rate(run for run in runs if run["model"] == "alibi")] == [
        5e-3
    ] * 2


def test_every_causal_model_can_be_named_and_a_hybrid_of_two_layers_has_both_kinds():
    probe = script("probe")
    with torch.device("meta"):
        for name in probe.MODEL_NAMES:
            probe.make_model(name, 64, probe.Arguments())
        hybrid = probe.make_model("hybrid", 64, probe.Arguments())
    assert [type(block.mixer).__name__ for block in hybrid.blocks] == ["GatedDeltaNet", "MultiHeadAttention"]


def test_the_needle_is_asked_for_at_each_distance(tmp_path):
    probe, out = script("probe"), tmp_path / "runs.jsonl"
    flags = ["--tasks", "needle", "--models", "nope", "--rates", "1e-2", "--longer", "1", "3", "--out", str(out)]
    probe.main(["--processes", "1", "--steps", "2", "--length", "8", "--batch-size", "2", *flags])
    (run,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert list(run["accuracy_at_distance"]) == ["1", "4", "16"]  # of 24 tokens
    assert (tmp_path / "runs_needle.png").read_bytes().startswith(b"\x89PNG")
    tokens, targets = draw(probe.needle_at(16), 0, 0, 8, 24)
    assert (tokens[:, [-18, -1]] == 16).all() and torch.equal(targets[:, -1], tokens[:, -17])


def test_a_window_is_all_that_a_model_sees_of_a_longer_text():
    """As long as the texts of training, a window changes nothing in training, so the two models learn the same."""
    probe = script("probe")
    settings = probe.Arguments(length=8, longer=(4,))
    tokens = torch.randint(20, (2, 32), generator=torch.Generator().manual_seed(0))

    def logits(name, tokens):
        torch.manual_seed(0)
        return probe.make_model(name, 20, settings)(tokens).detach()

    windowed = logits("rope, window = 8", tokens)
    torch.testing.assert_close(windowed[:, :8], logits("rope", tokens)[:, :8], rtol=0, atol=1e-6)
    n_seen = 2 * 7 + 1  # by two layers
    changed = tokens.clone()
    changed[:, : 32 - n_seen] = 0
    torch.testing.assert_close(windowed[:, -1], logits("rope, window = 8", changed)[:, -1], rtol=0, atol=1e-6)
    assert (windowed[:, -1] - logits("rope", tokens)[:, -1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--models", "masked_diffusion"], "no causal model is called masked_diffusion; there are baseline"),
        (["--models", "retnet, window = 8"], r"RetNet has no layer of attention with a mask, so Window\(size=8\)"),
        (["--models", "rope, window = 0"], "size = 0"),
        (["--models", "block_mixture, window = 8"], "BlockMixture has no layer of attention with a mask"),
        (["--models", "rope", "--longer", "2", "4"], "must have 1, the trained length"),
        (["--models", "lstm, window = 8"], "lstm has no settings, and was given window"),
        (["--tasks", "sums"], "no task is called sums; there are recall"),
        (["--models", "rope", "--out", "."], "is a folder: name a file"),
    ],
)
def test_the_script_refuses_before_it_trains(arguments, says):
    with pytest.raises(SystemExit, match=says):
        script("probe").main(arguments)
