"""Quality against steps, and the picture of a story: what they measure and draw, from runs trained for a few steps."""

import json
import xml.etree.ElementTree as ET

import pytest
import torch
from conftest import tiny_model

from llm.analysis import story_picture, writing_steps
from llm.analysis.judge import read, surprise
from llm.analysis.story_picture import Arguments, svg, write_watched
from llm.models import MODELS
from llm.modules.diffusion.unmasking import Unmasking
from llm.training.flags import parse_arguments
from llm.training.loop import train

SMALL = "--sample --steps 2 --tokens-per-step 128 --micro-batch-size 4 --eval-windows 4 --warmup-steps 1 --wandb off"
SIZES = "--model.max-seq-len 32 --model.d-model 16 --model.n-layers 1 --model.n-heads 2 --model.d-ff 16 --device cpu"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder with a run of each of these, and the data."""
    from llm.data.files import open_tokens

    folder, found = tmp_path_factory.mktemp("runs"), {}
    for name in ("block_diffusion", "autoregressive_twin", "masked_diffusion"):
        flags = [*SMALL.split(), *SIZES.split(), "--out", str(folder / name)]
        settings = parse_arguments(MODELS[name].Config, flags)
        data = open_tokens(settings.train.data)
        train(MODELS[name], settings.model_for(data), settings.train, data)
        found[name] = folder / name
    return found, settings.train.data


@pytest.mark.parametrize("name", ["baseline", "autoregressive_twin"])
def test_the_judges_surprise_is_the_chain_rule(name, tokens):
    """Each token after those before it, one by one."""
    judge = tiny_model(name)
    found = surprise(judge, tokens)
    for t in (1, 7, 23):
        left = tokens[:, :t]
        if name == "autoregressive_twin":
            left = torch.cat([left, torch.full_like(left[:, :1], judge.mask_token)], 1)
        with torch.no_grad():
            expected = -judge(left)[:, -1].log_softmax(-1).gather(-1, tokens[:, t, None])[:, 0]
        torch.testing.assert_close(found[:, t - 1], expected, rtol=0, atol=1e-9)


def test_only_an_autoregressive_model_can_judge(tokens):
    with pytest.raises(ValueError, match="autoregressive"):
        surprise(tiny_model("masked_diffusion"), tokens)


def test_a_text_is_read_from_the_end_of_the_prompt_to_its_own_end(tokens):
    judge = tiny_model("baseline")
    tokens[:, 10:] = tokens[:, 10:].clamp(min=1)
    tokens[0, 15] = tokens[1, 23] = 0
    nats, found = surprise(judge, tokens), read(judge, tokens, 10, eot=0)
    each = torch.stack([nats[0, 9:15].mean(), nats[1, 9:].mean(), nats[2, 9:].mean()])
    assert found["nats"] == pytest.approx(each.mean().item())
    assert found["nats_error"] == pytest.approx((each.std() / 3**0.5).item())
    lengths = zip(tokens, (16, 24, 24), strict=True)
    assert found["different"] == pytest.approx(sum(len(set(t[10:n].tolist())) / (n - 10) for t, n in lengths) / 3)


def test_rows_count_forward_passes_and_a_second_call_replaces_them(runs, tmp_path):
    found, data = runs
    rows, picture = tmp_path / "rows.jsonl", tmp_path / "steps.png"
    flags = ["--judge", str(found["autoregressive_twin"]), "--data", str(data), "--texts", "3", "--prompt", "8"]
    flags += ["--steps", "1", "2", "4", "--rows", str(rows), "--out", str(picture), "--device", "cpu"]
    both = [str(found["block_diffusion"]), str(found["masked_diffusion"])]
    writing_steps.main([*both, *flags])
    first = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    assert len(first) == 2 * 3 * 2 + 1 and picture.stat().st_size > 1000
    for row in first[:-1]:
        blocks = 6 if row["model"] == "block_diffusion" else 1  # 24 tokens, in blocks of 4 or in less than one of 32
        passes = blocks * (row["steps"] + 1) + 1 if blocks == 6 else row["steps"]
        assert row["tokens_per_pass"] == 24 / passes
        assert row["nats_error"] < row["nats"] < 20 and 0 < row["different"] <= 1
    assert first[-1]["model"] == "text"
    writing_steps.main([both[0], *flags])
    second = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    speeds = [row.pop("tokens_per_second") for row in first[:-1]]
    assert min(speeds) > 0 and [row.pop("tokens_per_second", None) for row in second].count(None) == 1
    key = lambda row: (row["model"], row.get("steps", 0), row.get("order", ""))  # noqa: E731
    assert sorted(second, key=key) == sorted(first, key=key)


@pytest.mark.parametrize("name", ["block_diffusion", "masked_diffusion"])
def test_every_token_has_the_step_that_wrote_it(name, runs):
    """One token a step: each block has each step once, and the moments of the story are all different."""
    found, _ = runs
    from llm.generate.load import load_run

    model, tokenizer = load_run(found[name], torch.device("cpu"))
    n = model.config.block_size if name == "block_diffusion" else 8
    settings = Arguments(found[name], prompt="Once upon", unmasking=Unmasking(block_size=n, steps=n), max_new_tokens=16)
    n_prompt = len(story_picture.encode_prompt(tokenizer, "Once upon"))
    story = write_watched(model, tokenizer, settings, torch.device("cpu"))
    assert "".join(token.text for token in story[:n_prompt]) == "Once upon"
    steps = [token.step for token in story]
    assert steps[:n_prompt] == [0] * n_prompt and min(steps[n_prompt:]) == 1
    moments = [token.moment for token in story[n_prompt:]]
    assert len(set(moments)) == len(moments) and 0 not in moments
    whole = steps[-(n - 1) // n * n :] if name == "masked_diffusion" else steps[n - n_prompt % n + n_prompt :]
    for first in range(0, len(whole) - n + 1, n):
        assert sorted(whole[first : first + n]) == list(range(1, n + 1))


def test_the_picture_is_xml_that_holds_the_story_and_appears_in_order(runs):
    story = [story_picture.Written("<Once"), story_picture.Written(" a&b", 2, 2), story_picture.Written("\nc", 1, 1)]
    root = ET.fromstring(svg(story))
    name = "{http://www.w3.org/2000/svg}"
    groups = root.findall(f"{name}g")
    assert [group.find(f"{name}text").text for group in groups] == ["<Once", "a&b", "c"]
    times = [group.find(f"{name}animate") for group in groups]
    assert times[0] is None
    starts = [float(t.get("keyTimes").split(";")[1]) for t in times[1:]]
    assert starts[0] == pytest.approx(2 * starts[1], abs=1e-4)
    lines = {group.find(f"{name}text").get("y") for group in groups}
    assert len(lines) == 2


def test_a_model_that_writes_from_left_to_right_has_no_such_picture(runs, monkeypatch, tmp_path):
    model = tiny_model("baseline")
    monkeypatch.setattr(story_picture, "load_run", lambda *_: (model, None))
    with pytest.raises(ValueError, match="diffusion"):
        story_picture.main([str(tmp_path), "--out", str(tmp_path / "a.svg")])
